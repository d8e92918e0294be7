"""Who may be drawn for a round, asked of the store a few at a time: a fleet of millions is never read as a whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from fedvit.cohort.selection import draw_cohort
from fedvit.config import CohortConfig
from fedvit.errors import BudgetExhaustedError
from fedvit.ports import AccountantPort
from fedvit.rounds.protection import Protection
from fedvit.store.store import Store
from fedvit.types import Cohort, TrainTask


class EligibleClients:
    """Implements :class:`fedvit.cohort.selection.EligiblePool` for the round of ``task``.

    A client may be drawn that is eligible, has a participation left in the run, rested long enough since its last one,
    and has the budget for one more. A remote one has to have been heard since ``heard_since``.
    """

    def __init__(
        self,
        store: Store,
        protection: Protection,
        accountant: AccountantPort,
        task: TrainTask,
        config: CohortConfig,
        heard_since: datetime | None = None,
    ) -> None:
        self._store, self._protection, self._accountant = store, protection, accountant
        self._task, self._config, self._heard_since = task, config, heard_since
        self._validated_only = config.client_selection == "validated_only"
        self._size = store.clients.population()
        self._forgiving = False
        self._eligible = self._not_worn_out = self._affordable = self._too_dear = 0

    def size(self) -> int:
        """How many clients are registered."""
        return self._size

    def admitted(self, positions: Sequence[int]) -> Mapping[int, str]:
        """See :class:`fedvit.cohort.selection.EligiblePool`."""
        found = self._store.clients.eligible_at(
            positions, validated_only=self._validated_only, heard_since=self._heard_since
        )
        rest = self._protection.may_be_drawn(self._task.run_id, self._task.round_index, list(found.values()))
        within = self._within_budget(rest.rested)
        self._eligible += len(found)
        self._not_worn_out += rest.not_worn_out
        self._affordable += len(within)
        self._too_dear += len(rest.rested) - len(within)
        admitted = rest.rested if self._forgiving else within
        return {position: client_id for position, client_id in found.items() if client_id in admitted}

    def forgiving(self) -> EligibleClients:
        """The same, whatever anybody's budget admits."""
        self._forgiving = True
        return self

    def draw(self, secret: bytes, in_flight: Collection[str] = ()) -> Cohort:
        """The cohort.

        Where nobody's budget admits the round, it is one that the charge will refuse, so that the charge says why.

        Raises:
            BudgetExhaustedError: none of them may take part in this run any more.
        """
        drawn = self._draw(secret, in_flight)
        if self._eligible and not self._not_worn_out:
            most = self._config.max_participations or self._task.round_index
            raise BudgetExhaustedError(
                f"Each of {self._eligible} clients has taken part in {most} rounds of {self._task.run_id}; the cap is "
                f"{most}.",
                cure="Training rests; another run, with its own charges, may use them again.",
            )
        if drawn.client_ids or self._affordable or not self._too_dear:
            return drawn
        return self.forgiving()._draw(secret, in_flight)

    def _draw(self, secret: bytes, in_flight: Collection[str]) -> Cohort:
        task = self._task
        return draw_cohort(
            self._config, self, run_id=task.run_id, round_index=task.round_index, secret=secret, in_flight=in_flight
        )

    def _within_budget(self, client_ids: Collection[str]) -> Collection[str]:
        # Of a secret sample, one charge stands for everybody.
        if self._protection.sampled or not client_ids:
            return client_ids
        return self._accountant.within_budget(self._protection.charges(self._task, list(client_ids)))
