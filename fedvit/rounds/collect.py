"""Collection of a round's updates: when the round is complete, and what becomes of the slow clients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain

from fedvit.aggregation.client_share import NO_LIMIT, ShareLimit
from fedvit.aggregation.head import Head
from fedvit.aggregation.rule import BROADCAST
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.update_statistics import UpdateStatisticsMonitor
from fedvit.rounds.context import RoundContext
from fedvit.rounds.machine import TrainRound
from fedvit.rounds.steering import AggregationSettings, aggregation_settings
from fedvit.rounds.update_admission import AdmissionPolicy, RoundUpdates, UpdateAdmission, ValidAnswer
from fedvit.secagg.noise import Plan
from fedvit.types import TrainTask, Weights
from fedvit.updates import ClientUpdate

_REMEMBERED_ROUNDS = 1000


class Collector:
    """Starts a round's cohort and takes answers, late ones as well, until the round may be folded.

    A synchronous round waits for all clients in flight; with over-selection, for as many as it wants. An asynchronous
    round leaves the slower clients in flight, and a later round takes their answers. Either ends after a long silence
    or at its deadline: a synchronous round then gives up the clients that did not answer, an asynchronous one leaves
    them in flight if it has enough updates to commit.

    A message may bring more single updates than an asynchronous buffer has room for. The rest begins the next buffer;
    until then its clients are in flight.
    """

    def __init__(self, context: RoundContext) -> None:
        self._settings, self._store, self._fleet = context.settings, context.store, context.fleet
        self._protection, self._clock = context.protection, context.clock
        head, initial = context.model.head, context.model.initial_weights()
        self._monitor = UpdateStatisticsMonitor(head, None if head is None else initial[head])
        self._carried_over: list[ValidAnswer] = []
        # By round: the sum of a proxy that answers late has the limit of its own round.
        self._max_weights: dict[int, int] = {}

    def in_flight(self) -> frozenset[str]:
        """The clients that have a task and are in no round yet."""
        carried_over = (o.client_id for answer in self._carried_over for o in answer.update.outcomes)
        return self._fleet.in_flight().union(carried_over)

    def give_up(self, reason: str) -> None:
        """Stop waiting for all clients in flight."""
        self._fleet.give_up(reason)
        self._carried_over = []

    def collect(
        self,
        effect: TrainRound,
        task: TrainTask,
        base: Weights,
        sent: Weights,
        head: Head | None,
        *,
        timeout_s: float,
        ring: Plan | None = None,
    ) -> RoundUpdates:
        """The updates of the round.

        Args:
            base: the trainable weights, which define the names and shapes of an update.
            sent: what goes to the clients: the weights and the rule's broadcast state.
            head: what limits single updates of the head, if anything does.
            ring: the plan of integer contributions, where noise is distributed.
        """
        in_flight = self.in_flight()
        # After a failed attempt at this very round, some of the cohort may still work on it.
        not_asked = tuple(c for c in effect.cohort.client_ids if c not in in_flight)
        client_ids = [*not_asked, *in_flight]
        sizes = self._store.clients.num_examples(client_ids)
        share = self._share_limit(effect, sizes)
        asked = {client_id: sizes[client_id] for client_id in not_asked if client_id in sizes}
        cohort = replace(effect.cohort, client_ids=not_asked, max_weight=share.max_weight, num_examples=asked)
        ended, limit_s = f"no answer in {timeout_s:g} s", self._settings.training.round_deadline_s
        # In monotonic time; infinite where no client may be late.
        deadline_s = math.inf if limit_s is None or self._protection.sampled else self._clock.monotonic() + limit_s
        messages = self._fleet.train(task, sent, cohort, timeout_s=timeout_s)
        # The first step sends the task out, so that clients train while the validation is prepared.
        first = next(messages, None)
        admission = self._admission(effect, task, base, sent, sizes, share, head, ring)
        for message in chain((first,), messages):
            if message is not None:
                admission.admit(message)
            admission.apply(self._policy(effect, len(client_ids)))
            if admission.complete:
                ended = "the round has as many updates as it wants"
                break
            if self._clock.monotonic() >= deadline_s:
                ended = f"no answer within the round's {limit_s:g} s"
                break
        policy = self._policy(effect, len(client_ids))
        admission.apply(policy)
        if policy.mode == "synchronous" or effect.wait_for_all or admission.accepted < effect.min_clients:
            for given_up in self._fleet.give_up(ended):
                admission.admit(given_up)
        limited = policy.mode == "asynchronous" and self._protection.rule.needs == "single_updates"
        updates, self._carried_over = admission.close(policy.enough if limited else None)
        return updates

    def _share_limit(self, effect: TrainRound, sizes: Mapping[str, int]) -> ShareLimit:
        """The limit on the influence of one client, by the numbers of examples that the clients are admitted with."""
        if self._settings.privacy.privacy_unit == "client":
            return NO_LIMIT  # every update is clipped, and the divisor is a constant
        if self._settings.privacy.noise_place == "distributed":
            return NO_LIMIT  # a client weighs its own contribution, before anybody sees it
        updates = min(self._policy(effect, len(sizes)).enough or len(sizes), len(sizes))
        share = ShareLimit.of(self._settings.training.validation.max_client_share, list(sizes.values()), updates)
        round_index = effect.cohort.round_index
        remembered = range(round_index - _REMEMBERED_ROUNDS, round_index)
        self._max_weights = {r: weight for r, weight in self._max_weights.items() if r in remembered}
        if share.max_weight is not None:
            self._max_weights[round_index] = share.max_weight
        return share

    def _admission(
        self,
        effect: TrainRound,
        task: TrainTask,
        base: Weights,
        sent: Weights,
        sizes: Mapping[str, int],
        share: ShareLimit,
        head: Head | None,
        ring: Plan | None,
    ) -> UpdateAdmission:
        validator = UpdateValidator.of(
            self._settings,
            self._protection.rule,
            base,
            sizes,
            task=task,
            broadcast={name: array for name, array in sent.items() if name.startswith(BROADCAST)},
            max_weights=self._max_weights,
            ring=ring,
        )
        bounds = validator.bounds

        def observe(update: ClientUpdate) -> ClientUpdate:
            if bounds is None:
                return update
            seen = self._monitor.observe(bounds, base, update)
            return seen if head is None else head.clipped(bounds, seen)

        return UpdateAdmission(
            task.round_index,
            self._policy(effect, len(sizes)),
            validator,
            lambda started: self._store.rounds.awaited(task.run_id, started, task.round_index),
            fault_of=lambda update: self._protection.fault_of(update, task.run_id),
            observe=observe,
            carried_over=self._carried_over,
            staleness=self._settings.training.staleness,
            share=share,
        )

    def _policy(self, effect: TrainRound, taking_part: int) -> AdmissionPolicy:
        """Read at every message: an operator may change the mode, or quarantine a client, while the round waits."""
        settings = aggregation_settings(self._store)
        return AdmissionPolicy(
            settings.mode,
            0 if self._protection.rule.needs_one_base else settings.staleness_tolerance,
            frozenset(self._store.clients.quarantined()),
            self._enough(settings, effect, taking_part),
        )

    def _enough(self, settings: AggregationSettings, effect: TrainRound, taking_part: int) -> int | None:
        """How many updates the round commits with; None: those of all that take part."""
        cohort = self._settings.training.cohort
        if settings.mode == "synchronous" and cohort.over_selection and cohort.size is not None:
            # The last round too: clients slower than this were given up in every round before.
            return max(cohort.size, effect.min_clients)
        return None if effect.wait_for_all else settings.enough(taking_part, effect.min_clients)
