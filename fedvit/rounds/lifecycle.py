"""Run lifecycle: the checks of a new run, its beginning, and where an interrupted run continues."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from fedvit.aggregation.registry import check_memory, check_mode
from fedvit.errors import ConfigError, ConflictError, ModelError
from fedvit.exact_sums import peak_of
from fedvit.privacy.round_cost import check_units, round_noise_multiplier
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.cohorts import CohortSelector
from fedvit.rounds.context import RoundBase, RoundContext, train_task
from fedvit.rounds.remote import FROZEN_DIGEST
from fedvit.rounds.steering import (
    RunRequest,
    aggregation_settings,
    changed_settings,
    place_run_request,
    round_settings,
    run_identity,
    run_request,
)
from fedvit.store.versions import RULE_STATE
from fedvit.types import Run, RunStatus, Weights
from fedvit.wire.tensors import decode_rule_state, encode_weights

_ROUNDS = "training.rounds"


class RunLifecycle:
    """Opens runs and reads where they stand; ``cohorts`` selects their clients."""

    def __init__(self, context: RoundContext) -> None:
        self._settings, self._store, self._accountant = context.settings, context.store, context.accountant
        self._model, self._protection, self.cohorts = context.model, context.protection, CohortSelector(context)

    def check_fleet(self) -> None:
        """Check that the settings still promise something to a fleet of this size: vehicles may have joined.

        Raises:
            ConflictError: ``target_delta`` is larger than 1/n.
        """
        try:
            check_units(self._settings, *self._store.clients.count_units())
        except ConfigError as error:
            # A conflict for the caller, who did not write the settings: the fleet as it is now does not fit them.
            raise ConflictError(error.message, cure=error.cure) from error

    def check_new_run(self, request: RunRequest) -> None:
        """Check that the requested run could train at least one round.

        Raises:
            ConflictError: too few clients may take part, the rule does not go with asynchronous rounds, or the fleet is
                not of a size for what the settings promise; see :meth:`open_run`.
            BudgetExhaustedError: some client's budget does not admit one round more.
            UpdateRejectedError: the version to start from was trained as another model.
        """
        config = self.cohorts.config(request.client_selection)
        count = self.cohorts.count(config)
        needed = max(1, round_settings(self._store, self._settings).min_clients)
        if count < needed:
            raise ConflictError(
                f"{count} clients may take part ({config.client_selection}); at least {needed} are needed.",
                cure="Validate or register clients, or lower min_clients: POST /api/training/config.",
            )
        self.start_weights(request)
        check_mode(self._protection.rule, aggregation_settings(self._store).mode, self._settings)
        self.check_fleet()
        try:
            self._protection.run_facts(count)
        except ConfigError as error:
            raise ConflictError(error.message, cure=error.cure) from error
        # A round of a run that does not exist yet; its charges are never written.
        task = train_task(
            self._settings,
            "next-run",
            1,
            base_digest="",
            data_digest="",
            noise_multiplier=self._noise_multiplier,
            l2_clip_norm=self._settings.privacy.l2_clip_norm,
            context_digest="",
        )
        self._accountant.check(self._protection.charges(task, self.cohorts.affordable(task, config, needed)))

    def begin(self, request: RunRequest) -> Run:
        """Put a request in force and open its run. Repeatable."""
        self.start_weights(request)
        place_run_request(self._store, request)
        return self.open_run()

    def open_run(self) -> Run:
        """The run with these settings and this request, or a new one; an unfinished one with others is superseded.

        A run of which nothing has changed but that it has more rounds (``training.rounds``) goes on, also after its
        end. The reason of a run says where it begins or goes on, if that is not where the last one ended.

        Raises:
            ConfigError: the fleet is too small for ``target_delta``, for the rule, or for its cohorts to rest between
                rounds; or the updates of a round do not fit into memory.
            ConflictError: no client may take part, or rounds are asynchronous and the rule does not go with that.
        """
        request = run_request(self._store)
        identity, digest = run_identity(self._settings, request)
        latest = self._store.runs.latest()
        check_units(self._settings, *self._store.clients.count_units())
        check_mode(self._protection.rule, aggregation_settings(self._store).mode, self._settings)
        if latest is not None and latest.config_digest == digest:
            return self.with_present_facts(latest)
        if latest is not None and self._continues(latest, identity):
            note = f"It goes on after round {latest.rounds_done}: training.rounds was {latest.rounds_total}."
            extended = self._store.runs.extend(
                latest.run_id, self._settings.training.rounds, {**latest.config, **identity}, digest, note
            )
            return self.with_present_facts(extended)
        count = self.cohorts.count(self.cohorts.config())
        if not count:
            raise ConflictError(
                "No client may take part: none that is active, and is heard where it is remote, has data.",
                cure="Register or validate clients, or start the trainers of remote ones; then start again.",
            )
        facts = self._protection.run_facts(count)
        self._check_memory(request, count)
        begins = None
        if latest is not None:
            changed = changed_settings(latest.config, identity)
            requested = request is not None and latest.config.get("order") != identity.get("order")
            reason = request.reason if request and requested else f"The settings changed: {changed}."
            if latest.status.resumable:
                self._store.runs.set_status(latest.run_id, RunStatus.SUPERSEDED, reason)
            start = request.base_version if request and request.base_version else "the initial weights"
            begins = f"It begins at {start}, not where {latest.run_id} ended. {reason}"
        fleet = self._store.metadata.fleet()
        return self._store.runs.create(
            rounds_total=self._settings.training.rounds,
            noise_multiplier=self._noise_multiplier,
            config=identity | facts,
            config_digest=digest,
            data_digest=fleet.data_digest if fleet else "",
            reason=begins,
        )

    def _check_memory(self, request: RunRequest | None, eligible: int) -> None:
        cohort, rule = self._settings.training.cohort, self._protection.rule
        drawn = eligible if cohort.selection == "all" or cohort.draw_size is None else min(cohort.draw_size, eligible)
        parameters = sum(array.size for array in self.start_weights(request).values())
        check_memory(rule, drawn, parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def with_present_facts(self, run: Run) -> Run:
        """The run, with the facts that follow from the clients that may take part now.

        They may be others than at its beginning: the constant that sums are divided by has to follow them. The number
        of clients is public, whichever of them a round draws.
        """
        count = self.cohorts.count(self.cohorts.config()) if run.status.resumable else 0
        try:
            facts = self._protection.run_facts(count) if count else {}
        except ConfigError:  # Too few clients for a round: its draw says so.
            return run
        if all(run.config.get(name) == value for name, value in facts.items()):
            return run
        return self._store.runs.set_config(run.run_id, {**run.config, **facts})

    def _continues(self, run: Run, identity: Mapping[str, Any]) -> bool:
        """Whether nothing but the number of rounds has changed, and there are more of them."""
        same = changed_settings(run.config, identity) == _ROUNDS
        return same and run.status is not RunStatus.SUPERSEDED and run.rounds_total < self._settings.training.rounds

    def round_base(self, run: Run) -> RoundBase:
        """What the run's next round starts from: the last committed round, or the weights that a run starts from."""
        version, rule = self._store.versions.latest(run.run_id), self._protection.rule
        if version is None:
            weights = self.start_weights(run_request(self._store))
            return RoundBase.of(rule, weights, self._store.blobs.put(encode_weights(weights)), {})
        stored = version.lineage.get(RULE_STATE)
        state = decode_rule_state(self._store.blobs.get(stored)) if stored else {}
        weights = stored_weights(self._store, version.weights_digest)
        return RoundBase.of(rule, weights, version.weights_digest, state)

    def store_frozen_weights(self) -> str:
        """Store the weights that never travel, and return their SHA-256."""
        digest = self._store.blobs.put(encode_weights(self._model.frozen_weights()))
        self._store.metadata.set(FROZEN_DIGEST, digest)
        return digest

    def weights_before(self, run: Run, round_index: int) -> Weights:
        """The weights that an earlier round of this run started from."""
        if round_index == 1:
            return self.start_weights(run_request(self._store))
        version = self._store.rounds.get(run.run_id, round_index - 1).version
        return stored_weights(self._store, self._store.versions.get(str(version)).weights_digest)

    def start_weights(self, request: RunRequest | None) -> Weights:
        """The weights that a run starts from.

        Raises:
            UpdateRejectedError: the version to start from was trained as another model.
            ModelError: the model's initial weights hold a number that is not finite.
        """
        initial = self._model.initial_weights()
        for name, array in initial.items():
            if not np.isfinite(peak_of({name: array})):
                raise ModelError(
                    f"The initial weight {name!r} holds a number that is not finite.",
                    cure="Use another checkpoint, or check initial_weights of the workload.",
                )
        if request is None or request.base_version is None:
            return initial
        shapes = {name: array.shape for name, array in initial.items()}
        return stored_weights(self._store, self._store.versions.get(request.base_version).weights_digest, shapes)

    def unreleased_version(self, run: Run) -> str | None:
        """The last committed version, unless it was released or refused."""
        version = self._store.versions.latest(run.run_id)
        if version is None or version.released or version.refusal is not None:
            return None
        return version.version

    @cached_property
    def _noise_multiplier(self) -> float:
        return round_noise_multiplier(self._settings)
