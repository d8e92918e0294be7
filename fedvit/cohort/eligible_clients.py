"""Eligible clients of a round, read from the store a few at a time: a fleet of millions is never read as a whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fedvit.cohort.selection import draw_cohort
from fedvit.config import CohortConfig
from fedvit.errors import BudgetExhaustedError
from fedvit.ports import AccountantPort, Charge
from fedvit.store.store import Store
from fedvit.types import Cohort


@dataclass(frozen=True, slots=True)
class RestedClients:
    """Clients that rested since their last participation; ``not_capped`` counts those with a participation left."""

    client_ids: frozenset[str]
    not_capped: int


class EligibleClients:
    """The clients that may be drawn for one round. Implements :class:`fedvit.cohort.selection.ClientPool`.

    A client is eligible if it is active and has data, has a participation left in the run, rested long enough since its
    last one, and has the budget for one more.

    Args:
        charges: what the participation of these clients costs; None where one charge stands for the whole population.
        heard_since: a remote client that was silent for longer is not eligible.
    """

    def __init__(
        self,
        store: Store,
        accountant: AccountantPort,
        config: CohortConfig,
        run_id: str,
        round_index: int,
        *,
        charges: Callable[[Sequence[str]], Sequence[Charge]] | None,
        heard_since: datetime,
    ) -> None:
        self._store, self._accountant, self._config = store, accountant, config
        self._run_id, self._round_index = run_id, round_index
        self._charges, self._heard_since = charges, heard_since
        self._size = store.clients.population()
        self._ignore_budget = False
        self._eligible = self._not_capped = self._affordable = self._over_budget = 0

    def size(self) -> int:
        """How many clients are registered."""
        return self._size

    def eligible_at(self, positions: Sequence[int]) -> Mapping[int, str]:
        """See :class:`fedvit.cohort.selection.ClientPool`."""
        validated_only = self._config.client_selection == "validated_only"
        clients = self._store.clients.eligible_at(
            positions, validated_only=validated_only, heard_since=self._heard_since
        )
        rested = self._rested(list(clients.values()))
        within = self._within_budget(rested.client_ids)
        self._eligible += len(clients)
        self._not_capped += rested.not_capped
        self._affordable += len(within)
        self._over_budget += len(rested.client_ids) - len(within)
        admitted = rested.client_ids if self._ignore_budget else within
        return {position: client_id for position, client_id in clients.items() if client_id in admitted}

    def ignore_budget(self) -> EligibleClients:
        """From now on, budgets play no part."""
        self._ignore_budget = True
        return self

    def draw(self, secret: bytes, in_flight: Collection[str] = ()) -> Cohort:
        """The cohort. Where no budget admits the round, it is one that the charge will refuse with the reason.

        Raises:
            BudgetExhaustedError: no client may take part in this run any more.
        """
        cohort = self._draw(secret, in_flight)
        if self._eligible and not self._not_capped:
            most = self._config.max_participations or self._round_index
            raise BudgetExhaustedError(
                f"Each of {self._eligible} clients has taken part in {most} rounds of {self._run_id}; the cap is "
                f"{most}.",
                cure="Training rests; another run, with its own charges, may use them again.",
            )
        if cohort.client_ids or self._affordable or not self._over_budget:
            return cohort
        return self.ignore_budget()._draw(secret, in_flight)

    def _draw(self, secret: bytes, in_flight: Collection[str]) -> Cohort:
        run_id, round_index = self._run_id, self._round_index
        return draw_cohort(
            self._config, self, run_id=run_id, round_index=round_index, secret=secret, in_flight=in_flight
        )

    def _within_budget(self, client_ids: Collection[str]) -> Collection[str]:
        if self._charges is None or not client_ids:
            return client_ids
        return self._accountant.within_budget(self._charges(list(client_ids)))

    def _rested(self, client_ids: Sequence[str]) -> RestedClients:
        cap, apart = self._config.max_participations, self._config.min_separation
        if cap is None and apart == 1:
            return RestedClients(frozenset(client_ids), len(client_ids))
        engagements = self._store.rounds.engagements(self._run_id, self._round_index, client_ids)
        # How often each took part, and in which round last.
        history = {client_id: engagements.get(client_id, (0, 0)) for client_id in client_ids}
        left = [client_id for client_id in client_ids if history[client_id][0] < (cap or self._round_index)]
        rested = (c for c in left if history[c][1] == 0 or self._round_index - history[c][1] >= apart)
        return RestedClients(frozenset(rested), len(left))
