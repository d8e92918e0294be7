"""Update validation: the checks that every update must pass before it may count.

A client host validates each update before it adds it to a sum, so that an invalid update affects no other client. The
aggregator validates every message again, because a sum cannot be taken apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedvit.aggregation.rule import Rule
from fedvit.aggregation.update_bounds import FLOAT32_SLACK, MechanismBounds
from fedvit.config import Settings
from fedvit.errors import UpdateRejectedError
from fedvit.exact_sums import largest, peak_of
from fedvit.privacy.mechanism import ROUNDING, l2_norm, sensitivity
from fedvit.secagg.noise import Plan
from fedvit.types import ClientOutcome, TrainTask, Weights
from fedvit.updates import ClientFailures, ClientUpdate, EncodedUpdate, RingSum, Summand, WeightedUpdate
from fedvit.wire.updates import decode_claim

_NO_OVERFLOW = 1e100
"""Arrays of numbers below it have a finite norm."""


@dataclass(frozen=True, slots=True)
class UpdateValidator:
    """Validates updates.

    Args:
        shapes: of the trainable parameters, by name.
        by_examples: whether the weight of a client is its number of examples, or 1.
        single: whether an update must come from a single client.
        max_update_norm: of one client's update; None: any finite one.
        bounds: that follow from the ordered DP-SGD; None where it is not known that updates come from it.
        max_weights: the largest weight of one client, by the round that the update is for; without it, any.
        num_examples: how many each client is registered with, where that is known.
        max_update_bytes: of an encoded update.
        ring: the plan of integer contributions, where updates must be such.
        attempt: of the round, with ``ring``.
    """

    shapes: Mapping[str, tuple[int, ...]]
    by_examples: bool
    single: bool
    max_update_norm: float | None = None
    bounds: MechanismBounds | None = None
    max_weights: Mapping[int, int] = field(default_factory=dict)
    num_examples: Mapping[str, int] | None = None
    max_update_bytes: int = 2**40
    ring: Plan | None = None
    attempt: int = 0

    @classmethod
    def of(
        cls,
        settings: Settings,
        rule: Rule,
        weights: Weights,
        num_examples: Mapping[str, int] | None = None,
        *,
        task: TrainTask | None = None,
        broadcast: Weights | None = None,
        max_weights: Mapping[int, int] | None = None,
        ring: Plan | None = None,
    ) -> UpdateValidator:
        """The validator of a run with these settings, this rule and these trainable weights.

        Args:
            task: of the round; without it, the bounds of DP-SGD are not checked.
            broadcast: the rule's broadcast state in that round.
            ring: the plan of integer contributions, where the updates to validate are such.
        """
        record, noised = settings.privacy.privacy_unit == "record", settings.privacy.noise_place == "client"
        shapes = {name: array.shape for name, array in weights.items()}
        # The local steps of a workload are its own, and so is the way in which it protects records.
        by_dpsgd = record and settings.simulation.private and settings.workload.clients_class is None
        bounds, max_update_norm = None, settings.training.validation.max_update_norm
        if task is not None and by_dpsgd and not noised:
            # Holds for all records and coins, so that a rejection says nothing about them.
            max_update_norm = (1 + FLOAT32_SLACK) * sensitivity(task)
        elif task is not None and by_dpsgd:
            bounds = MechanismBounds(task, shapes, rule.client.effect(task, broadcast or {}))
        return cls(
            shapes=shapes,
            by_examples=record and rule.weighting == "examples",
            single=rule.needs == "single_updates",
            max_update_norm=max_update_norm,
            bounds=bounds,
            max_weights=max_weights or {},
            num_examples=num_examples,
            max_update_bytes=settings.training.validation.max_update_bytes,
            ring=ring,
            attempt=0 if task is None else task.attempt,
        )

    def decoded(self, update: EncodedUpdate) -> ClientUpdate | ClientFailures:
        """The client's answer, its outcome with the number of bytes and the encoding.

        Raises:
            UpdateRejectedError: the bytes are not what :mod:`fedvit.wire.updates` writes, or name another client.
        """
        asked = update.outcome
        claim, encoding = decode_claim(update.content, max_bytes=self.max_update_bytes, shapes=self.shapes)
        failed = len(claim.outcomes) == 1 and claim.outcomes[0].error is not None
        named = [(o.client_id, o.num_examples) for o in claim.outcomes]
        if claim.round_index != update.round_index or named != [(asked.client_id, 0 if failed else asked.num_examples)]:
            raise UpdateRejectedError(
                f"It speaks for {named} in round {claim.round_index}; {asked.client_id} was asked in round "
                f"{update.round_index} to train {asked.num_examples} examples."
            )
        outcome = replace(claim.outcomes[0], sent_bytes=len(update.content), encoding=encoding)
        if failed:
            return ClientFailures(claim.round_index, (outcome,))
        return ClientUpdate(claim.round_index, outcome, claim.weighted_sum, claim.total_weight, claim.within_clip)

    def limited(self, update: ClientUpdate) -> ClientUpdate:
        """The update with at most the largest weight: a client that encodes its update does not know the limit."""
        weight = self.weight_of(update.outcome, update.round_index)
        # Another weight is a fault.
        if not self.by_examples or update.total_weight != update.outcome.num_examples or update.total_weight == weight:
            return update
        factor = weight / update.outcome.num_examples
        sums = {name: factor * array for name, array in update.weighted_sum.items()}
        return replace(update, weighted_sum=sums, total_weight=float(weight))

    def fault_of(self, update: Summand, scale: float = 1.0, *, peak: float | None = None) -> str | None:
        """The first fault of an update, as the end of a sentence about it; None if it is valid.

        Args:
            scale: a factor that its arrays are still to be multiplied by.
            peak: the largest magnitude in them, where that is known.
        """
        contributors = [outcome for outcome in update.outcomes if outcome.error is None]
        if not contributors:
            return None
        if self.single and len(contributors) > 1:
            return f"it sums {len(contributors)} clients, and the rule takes single updates"
        if isinstance(update, RingSum):
            return self._fault_of_ring(update) or self._fault_of_weight(update, contributors)
        if self.ring is not None:
            return "it is no vector of integers, as secure aggregation adds up"
        if fault := self._fault_of_names(update) or self._fault_of_arrays(update):
            return fault
        if peak is None:
            peak = largest(peak_of(sums) for sums in update.addends)
        return (
            self._fault_of_numbers(update, peak)
            or self._fault_of_weight(update, contributors)
            or self._fault_of_norm(update, scale, peak)
        )

    def shape_fault_of(self, update: ClientUpdate) -> str | None:
        """The fault of a valid update that is as long as its noise, but is not noise; see :mod:`.update_bounds`.

        It takes some milliseconds for each matrix. Client hosts skip it for what they have trained themselves.
        """
        if self.bounds is None:
            return None
        bound = self.bounds.of(update.outcome.num_examples)
        excess = bound.excess(self.bounds.without_shift(update))
        if excess <= bound.signal:
            return None
        return f"its matrices exceed their noise by {excess:.6g}; training can explain {bound.signal:.6g}"

    def _fault_of_ring(self, update: RingSum) -> str | None:
        vector, plan = update.vector, self.ring
        if plan is None:
            return "it is a vector of integers, and this run has no secure aggregation"
        if update.attempt != self.attempt:
            return f"it is of attempt {update.attempt}, and this is attempt {self.attempt}"
        if vector.dtype != np.uint32 or vector.shape != (plan.padded,):
            return f"it is {vector.dtype}{list(vector.shape)}, not uint32[{plan.padded}]"
        if int(vector.max(initial=0)) >= 2**plan.bits:
            return f"it holds a number beyond the ring of {plan.bits} bits"
        return None

    def _fault_of_names(self, update: WeightedUpdate) -> str | None:
        for sums in update.addends:
            if missing := sorted(self.shapes.keys() - sums.keys()):
                return f"it lacks the parameter {missing[0]!r}"
            if unknown := sorted(sums.keys() - self.shapes.keys()):
                return f"it holds {unknown[0]!r}, which is no parameter of this model"
        return None

    def _fault_of_arrays(self, update: WeightedUpdate) -> str | None:
        for name, array in (entry for sums in update.addends for entry in sorted(sums.items())):
            if array.dtype not in (np.float32, np.float64):
                return f"its parameter {name!r} is {array.dtype}"
            if array.shape != self.shapes[name]:
                return f"its parameter {name!r} has the shape {list(array.shape)}, not {list(self.shapes[name])}"
        return None

    def _fault_of_numbers(self, update: WeightedUpdate, peak: float) -> str | None:
        if math.isfinite(peak):
            return None
        for name, array in (entry for sums in update.addends for entry in sorted(sums.items())):
            if not math.isfinite(peak_of({name: array})):
                return f"its parameter {name!r} holds a value that is not finite"
        return None

    def _fault_of_weight(self, update: Summand, contributors: Sequence[ClientOutcome]) -> str | None:
        for outcome in contributors:
            if outcome.num_examples < 1 and self.bounds is not None:
                return f"{outcome.client_id} claims to have no examples"
            known = (self.num_examples or {}).get(outcome.client_id)
            if known is not None and outcome.num_examples > known:
                return f"{outcome.client_id} claims {outcome.num_examples} examples, and is registered with {known}"
        weight = float(sum(self.weight_of(outcome, update.round_index) for outcome in contributors))
        if update.total_weight != weight or not weight > 0:
            return f"its weight is {update.total_weight:g}, and that of its {len(contributors)} clients is {weight:g}"
        return None

    def weight_of(self, outcome: ClientOutcome, round_index: int) -> int:
        """The weight of a client's update to a round."""
        if not self.by_examples:
            return 1
        return min(outcome.num_examples, self.max_weights.get(round_index, outcome.num_examples))

    def _fault_of_norm(self, update: WeightedUpdate, scale: float, peak: float) -> str | None:
        weight = update.total_weight
        unbounded = self.max_update_norm is None and self.bounds is None
        if unbounded and scale * peak < _NO_OVERFLOW:
            return None
        with np.errstate(over="ignore"):
            norm = scale * l2_norm(update.total())
        allowed = math.inf if self.max_update_norm is None else self.max_update_norm * weight
        # The norm of a finite update may overflow: not even no bound admits that.
        if not math.isfinite(norm) or norm > allowed * (1 + ROUNDING):
            return f"its norm is {norm / weight:.6g}; at most {allowed / weight:g} is allowed"
        if self.bounds is None or not isinstance(update, ClientUpdate):
            # A sum comes from a client host, which has checked every update in it.
            return None
        relative = self.bounds.relative_norm(update, norm)
        if relative <= 1:
            return None
        return f"its norm is {relative:.6g} times the largest that its local steps and their noise allow"
