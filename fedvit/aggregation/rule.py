"""Interface of aggregation rules: a server half that folds updates, and a client half where a rule needs one.

A rule object holds no state. Its state between rounds (momentum, control variates, thresholds) is an argument and a
result of every fold and is committed with the round, so that a restart continues bit for bit. All arithmetic is float64
in the order of the updates, which are sorted by client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from fedvit.aggregation.update_bounds import NO_EFFECT, CorrectionEffect
from fedvit.config import TrainingConfig
from fedvit.errors import AggregationError, UpdateRejectedError
from fedvit.exact_sums import ExactSums, peak_of, zeros
from fedvit.types import FloatArray, TrainTask, Weights
from fedvit.updates import WeightedUpdate

Array: TypeAlias = npt.NDArray[np.float64]
Needs = Literal["partial_sums", "single_updates"]
Updates: TypeAlias = Sequence[WeightedUpdate]
State: TypeAlias = Mapping[str, Array]
"""State of a rule: float64 arrays by name. Empty at the beginning of a run."""
BROADCAST = "@"
"""Prefix of the names of a rule's broadcast state: arrays that clients receive with the weights."""


class Options(BaseModel):
    """The settings of a rule, ``training.aggregation_options``; this class has none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Fold:
    """The result of a fold: the next weights by name, float32, and the next state."""

    weights: dict[str, FloatArray]
    state: State


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """Facts of a round for rules that need more than the updates.

    ``start`` gives the weights that a round, by its index, started from; ``population`` is how many clients could be
    drawn when the run began; ``staleness_weight`` is the weight of an update by its staleness; ``least_divisor`` is the
    smallest divisor of an average with which no client has too large a share.
    """

    round_index: int = 1
    population: int = 1
    start: Callable[[int], Weights] | None = None
    staleness_weight: Callable[[int], float] = lambda staleness: 1.0
    least_divisor: float = 0.0


@dataclass(frozen=True, slots=True)
class GradientCorrection:
    """An addition to the gradient of every local step: ``pull * (w - anchor) + shift``; see FedProx and SCAFFOLD.

    It depends on no record and is added after clipping and noise, so the step's privacy does not change.
    """

    pull: float = 0.0
    anchor: Weights | None = None
    shift: Weights | None = None


NO_FACTS = RoundFacts()
"""For rules that need none."""


class ClientHalf:
    """The part of a rule that runs on clients. This one does nothing.

    ``client_state`` are float32 arrays that stay on the client between its rounds; there are none at first.
    ``broadcast`` is the rule's broadcast state, see :meth:`Rule.broadcast`.
    """

    keeps_state: ClassVar[bool] = False
    """Whether :meth:`after_training` returns a new client state."""
    personal_pull: float | None = None
    """Lambda of Ditto: how strongly the client's personal model is pulled to the global one. None: there is none."""

    def before_training(self, base: Weights, broadcast: Weights, client_state: Weights) -> GradientCorrection | None:
        """The correction of every step from ``base``."""
        return None

    def after_training(
        self, delta: Mapping[str, FloatArray], broadcast: Weights, client_state: Weights
    ) -> Mapping[str, FloatArray]:
        """The new client state, given the update that the client releases."""
        return client_state

    def effect(self, task: TrainTask, broadcast: Weights) -> CorrectionEffect:
        """How the corrections of an honest client change what its update may look like."""
        return NO_EFFECT


class Rule(ABC):
    """An aggregation rule.

    Args:
        options: of the class that :attr:`options_type` names.
        training: the settings of rounds and local steps.

    Attributes:
        needs: ``partial_sums``: a proxy adds up its clients. ``single_updates``: it sends each client's update.
        weighting: the weight of a client in a sum: its number of ``examples``, or 1 (``uniform``).
        needs_one_base: all updates of a round must start from the same version: no update may be late.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[Options]] = Options
    needs: ClassVar[Needs] = "partial_sums"
    weighting: ClassVar[Literal["examples", "uniform"]] = "examples"
    needs_one_base: ClassVar[bool] = False
    client_level: ClassVar[str | None] = "the aggregator may look at nothing but one noised sum"
    """Why the rule does not go with ``privacy_unit: client``, or with noise on sums alone; None where it does."""
    instead: ClassVar[str] = "Use fedavg, fedavgm, fedprox, fedadam, fedyogi, fedadagrad or ditto."
    """The cure in that error."""
    client: ClientHalf = ClientHalf()

    def __init__(self, options: Options, training: TrainingConfig) -> None:
        self.options = options
        self.server_learning_rate = training.server_learning_rate

    @property
    def least_updates(self) -> int:
        """The fewest updates that can be folded."""
        return 1

    def what(self) -> str:
        """The rule's name in error messages."""
        return self.name

    def broadcast(self, base: Weights, state: State) -> dict[str, FloatArray]:
        """Arrays that clients receive with the weights, float32; their names begin with :data:`BROADCAST`."""
        return {}

    @abstractmethod
    def fold(self, base: Weights, updates: Updates, state: State, facts: RoundFacts = NO_FACTS) -> Fold:
        """The weights after a round.

        Args:
            base: the weights before it, by name.
            updates: in a fixed order, each discounted for its staleness.
            state: the result of the fold before.

        Raises:
            UpdateRejectedError: too few updates.
        """


class MeanRule(Rule):
    """A rule whose server half is a step along the mean update, which may be noised.

    With clients as the privacy unit the mean comes from :mod:`fedvit.privacy.mechanism`; what is done with it
    afterwards costs no privacy.
    """

    client_level: ClassVar[str | None] = None

    def fold(self, base: Weights, updates: Updates, state: State, facts: RoundFacts = NO_FACTS) -> Fold:
        return self.step(base, mean(base, updates, facts.least_divisor), state, facts)

    @abstractmethod
    def step(self, base: Weights, delta: Mapping[str, Array], state: State, facts: RoundFacts) -> Fold:
        """The weights after a step along ``delta``, the mean update by the names of ``base``, float64."""


def mean(base: Weights, updates: Updates, least_divisor: float = 0.0) -> dict[str, Array]:
    """``sum_k a(s_k) n_k delta_k / sum_k n_k`` by the names of ``base``, float64; of a fresh update, a(0) is 1.

    The divisor is not discounted: a round of old updates takes a smaller step (Nguyen et al. 2022, arXiv:2106.06639).
    It is at least ``least_divisor``.

    Raises:
        UpdateRejectedError: no client contributed.
    """
    total = sum(update.total_weight for update in updates)
    if not total > 0:
        raise too_few("A round", 0, 1)
    sums = ExactSums({name: array.shape for name, array in base.items()})
    for update in updates:
        for addend in update.addends:
            sums.add(addend)
    divisor = max(total, least_divisor)
    return {name: np.divide(array, divisor, out=array) for name, array in sums.totals().items()}


def singles(updates: Updates) -> list[dict[str, Array]]:
    """The update of each client, float64, in the order given."""
    return [
        {name: np.divide(array, update.total_weight, dtype=np.float64) for name, array in update.total().items()}
        for update in updates
        if update.total_weight > 0
    ]


def moved(base: Weights, delta: Mapping[str, Array], rate: float = 1.0) -> dict[str, FloatArray]:
    """``base + rate * delta``, float32."""
    moved_weights = zeros({name: array.shape for name, array in base.items()}, np.float32)
    for name, array in base.items():
        step = delta[name] if rate == 1.0 else rate * delta[name]
        np.add(array, step, out=moved_weights[name], dtype=np.float64, casting="same_kind")
    return moved_weights


def checked_fold(rule: Rule, base: Weights, fold: Fold) -> Fold:
    """The fold, if it is what every later round can start from.

    Raises:
        AggregationError: a parameter is missing, unknown, of another shape or type, or holds a number that is not
            finite; or an array of the state does.
    """
    if not isinstance(fold, Fold):
        raise AggregationError(f"{rule.what()} returned {type(fold).__name__}.", cure="A rule returns a Fold.")
    for name in sorted(base.keys() ^ fold.weights.keys()):
        fault = f"lacks {name!r}" if name in base else f"holds {name!r}, which is no parameter of this model"
        raise AggregationError(f"{rule.what()} returned weights whose set of names {fault}.")
    for name, array in base.items():
        _check_folded(rule, f"the parameter {name!r}", fold.weights[name], np.dtype(np.float32), array.shape)
    for name, state in fold.state.items():
        _check_folded(rule, f"the state {name!r}", state, np.dtype(np.float64), None)
    return fold


def _check_folded(
    rule: Rule, what: str, array: object, dtype: np.dtype[np.floating], shape: tuple[int, ...] | None
) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or shape not in (None, array.shape):
        found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        wanted = f"{dtype}{'' if shape is None else list(shape)}"
        raise AggregationError(f"{rule.what()} returned {what} as {found}.", cure=f"It must be {wanted}.")
    if not np.isfinite(peak_of({what: array})):
        raise AggregationError(
            f"{rule.what()} returned {what} with a number that is not finite.",
            cure="Nothing was committed. Lower training.server_learning_rate or training.learning_rate.",
        )


def too_few(who: str, count: int, needed: int) -> UpdateRejectedError:
    """The error of a fold with fewer updates than the rule needs."""
    return UpdateRejectedError(
        f"{who} needs {needed} updates, and has {count}.", cure="Draw more clients, or lower the rule's num_byzantine."
    )
