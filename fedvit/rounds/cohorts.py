"""Cohorts of a run: the eligible clients under the settings and the run request in force, and the secret draw."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from fedvit.cohort.selection import EligibleClients
from fedvit.config import CohortConfig
from fedvit.privacy.randomness import derive_secret, load_or_create_root_secret
from fedvit.rounds.context import RoundContext
from fedvit.rounds.steering import run_request
from fedvit.types import Cohort, TrainTask


class CohortSelector:
    """Selects clients for rounds. A remote client that was silent for longer than the heartbeat timeout is left out."""

    def __init__(self, context: RoundContext) -> None:
        self._context, self._store = context, context.store
        self._identified = context.settings.privacy.noise_place == "distributed"
        self._secret = derive_secret(load_or_create_root_secret(context.store.home), "cohort")

    def config(self, client_selection: str | None = None) -> CohortConfig:
        """The cohort settings with this selection, or with that of the run request in force."""
        request = run_request(self._store)
        selection = client_selection or (request.client_selection if request else None)
        config = self._context.settings.training.cohort
        return config if selection is None else config.model_copy(update={"client_selection": selection})

    def count(self, config: CohortConfig, at_most: int | None = None) -> int:
        """How many clients may be drawn; counting ends at ``at_most``."""
        return self._store.clients.count_eligible(
            validated_only=config.client_selection == "validated_only",
            heard_since=self._heard_since(),
            identified=self._identified,
            at_most=at_most,
        )

    def draw(self, task: TrainTask, config: CohortConfig, in_flight: Collection[str] = ()) -> Cohort:
        """The cohort of the task's round.

        Raises:
            BudgetExhaustedError: no client may take part in this run any more.
        """
        return self._eligible(task, config).draw(self._secret, in_flight)

    def affordable(self, task: TrainTask, config: CohortConfig, needed: int) -> tuple[str, ...]:
        """``needed`` clients whose budget admits the round; where there are too few, some whose charge says why."""
        few = config.model_copy(update={"selection": "uniform", "size": needed, "sampling_prob": None})
        eligible = self._eligible(task, few)
        client_ids = eligible.draw(self._secret).client_ids
        return client_ids if len(client_ids) >= needed else eligible.ignore_budget().draw(self._secret).client_ids

    def _eligible(self, task: TrainTask, config: CohortConfig) -> EligibleClients:
        protection, accountant = self._context.protection, self._context.accountant
        charges = None if protection.sampled else lambda ids: protection.charges(task, ids)
        heard_since = self._heard_since()
        return EligibleClients(
            self._store,
            accountant,
            config,
            task.run_id,
            task.round_index,
            charges=charges,
            heard_since=heard_since,
            identified=self._identified,
        )

    def _heard_since(self) -> datetime:
        return self._context.clock.now() - timedelta(seconds=self._context.settings.fleet.heartbeat_timeout_s)
