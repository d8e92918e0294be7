"""Gathers the answers of a round: how many are waited for, and what becomes of those who are slow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

from fedvit.aggregation.validation import UpdateValidator
from fedvit.config import Settings
from fedvit.ports import FleetPort
from fedvit.rounds.buffer import Admission, RoundBuffer, judged
from fedvit.rounds.machine import TrainRound
from fedvit.rounds.protection import Protection
from fedvit.rounds.steering import aggregation_settings
from fedvit.rounds.update_admission import UpdateAdmission
from fedvit.store.store import Store
from fedvit.types import TrainTask, Weights
from fedvit.updates import DecodedUpdate


class Collector:
    """Starts a round's cohort and takes answers, late ones as well, until the round may be folded.

    A synchronous round waits for all that are in flight, or where more were drawn than it wants for as many as it
    wants. An asynchronous one leaves the slower ones in flight; their answers reach a later round. Either way one that
    is silent for too long ends, and so does one that is past its deadline: a synchronous round gives up who has not
    answered, an asynchronous one goes on without them where it has enough updates to commit.

    A message may bring more single updates than an asynchronous buffer has room for. The rest begins the next buffer;
    until then its clients are in flight.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        fleet: FleetPort,
        protection: Protection,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._fleet = fleet
        self._protection = protection
        self._clock = clock
        self._waiting: list[DecodedUpdate] = []

    def in_flight(self) -> frozenset[str]:
        """The clients that were handed a task and are in no round yet."""
        return self._fleet.in_flight().union(o.client_id for answer in self._waiting for o in answer.outcomes)

    def give_up(self, reason: str) -> None:
        """Forget whoever is in flight."""
        self._fleet.give_up(reason)
        self._waiting = []

    def collect(
        self, order: TrainRound, task: TrainTask, base: Weights, handed: Weights, *, timeout_s: float
    ) -> RoundBuffer:
        """What the round is made of.

        Args:
            base: the trainable weights, which say what an update looks like.
            handed: what goes to the clients: the weights, and what the rule hands out beside them.
        """
        in_flight = self.in_flight()
        # After a failed attempt at this very round some of the cohort may be at it still.
        fresh = replace(order.cohort, client_ids=tuple(c for c in order.cohort.client_ids if c not in in_flight))
        taking_part = len(fresh.client_ids) + len(in_flight)
        deadline_s, ended = self._deadline_s(), f"no answer in {timeout_s:g} s"
        messages = self._fleet.train(task, handed, fresh, timeout_s=timeout_s)
        # The task is handed out by the first step, so that clients train while the door is made ready.
        first = next(messages, None)
        keeper, answers = self._keeper(task, base, [*fresh.client_ids, *in_flight]), list(self._waiting)
        keeper.expect(answers)
        for message in chain((first,), messages):
            answers += keeper.admit(message) if message else []
            if self._suffice(answers, order, task, taking_part):
                ended = "the round has as many updates as it wants"
                break
            if self._clock() >= deadline_s:
                ended = f"no answer within the round's {self._settings.training.round_deadline_s:g} s"
                break
        if not self._leaves_in_flight(answers, order, task):
            for given_up in self._fleet.give_up(ended):
                answers += keeper.admit(given_up)
        answers, self._waiting = self._split(answers, order, task, taking_part)
        return replace(self._judged(answers, order, task), rejected_answers=keeper.rejected_answers)

    def _keeper(self, task: TrainTask, base: Weights, client_ids: Sequence[str]) -> UpdateAdmission:
        sizes = self._store.clients.num_examples(client_ids)
        validator = UpdateValidator.of(self._settings, self._protection.rule, base, sizes)
        return UpdateAdmission(validator, self._store, task.run_id, task.round_index)

    def _deadline_s(self) -> float:
        """When the round that begins now is over; never where nobody may be late."""
        patience_s = self._settings.training.round_deadline_s
        return math.inf if patience_s is None or self._protection.sampled else self._clock() + patience_s

    def _leaves_in_flight(self, answers: list[DecodedUpdate], order: TrainRound, task: TrainTask) -> bool:
        return self._asynchronous() and self._suffice(answers, order, task, 0)

    def _asynchronous(self) -> bool:
        # Read every time: who turns to asynchronous rounds while one hangs wants that one to end.
        return aggregation_settings(self._store).mode == "asynchronous"

    def _needed(self, order: TrainRound, taking_part: int) -> int | None:
        """How many updates the round commits with; None: those of all that take part."""
        settings, cohort = aggregation_settings(self._store), self._settings.training.cohort
        if settings.mode == "synchronous" and cohort.over_selection and cohort.size is not None:
            # The last round too: whoever is slower than this was given up in every round before.
            return max(cohort.size, order.min_clients)
        return None if order.wait_for_all else settings.enough(taking_part, order.min_clients)

    def _suffice(self, answers: list[DecodedUpdate], order: TrainRound, task: TrainTask, taking_part: int) -> bool:
        needed = self._needed(order, taking_part)
        return needed is not None and self._judged(answers, order, task).accepted >= needed

    def _split(
        self, answers: list[DecodedUpdate], order: TrainRound, task: TrainTask, taking_part: int
    ) -> tuple[list[DecodedUpdate], list[DecodedUpdate]]:
        """What goes into the buffer, and what has no room in it."""
        needed = self._needed(order, taking_part)
        if self._protection.rule.needs != "single_updates" or needed is None or not self._asynchronous():
            return answers, []
        taken, left = list[DecodedUpdate](), list[DecodedUpdate]()
        room = needed
        for answer, verdict in zip(answers, self._judged(answers, order, task).answers, strict=True):
            counts = any(outcome.error is None for outcome in verdict.outcomes)
            (taken if room or not counts else left).append(answer)
            room -= counts and room > 0
        return taken, left

    def _judged(self, answers: list[DecodedUpdate], order: TrainRound, task: TrainTask) -> RoundBuffer:
        settings = aggregation_settings(self._store)
        admission = Admission(
            order.cohort.round_index,
            settings.mode,
            0 if self._protection.rule.needs_one_base else settings.staleness_tolerance,
            frozenset(self._store.clients.quarantined()),
            lambda update: self._protection.fault_of(update, task.run_id),
            self._settings.training.staleness,
        )
        return judged(answers, admission)
