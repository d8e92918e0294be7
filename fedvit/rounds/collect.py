"""Gathers the answers of a round: how many are waited for, and what becomes of those who are slow."""

from __future__ import annotations

from dataclasses import replace

from fedvit.ports import FleetPort
from fedvit.rounds.buffer import Admission, RoundBuffer, judged
from fedvit.rounds.machine import TrainRound
from fedvit.rounds.protection import Protection
from fedvit.rounds.steering import aggregation_settings
from fedvit.store.store import Store
from fedvit.types import PartialUpdate, TrainTask, Weights


class Collector:
    """Starts a round's cohort and takes answers, late ones as well, until the round may be folded.

    A synchronous round waits for all that are in flight. An asynchronous one leaves the slower ones in flight; their
    answers reach a later round. Either way one that is silent for too long ends: a synchronous round gives the silent
    up, an asynchronous one goes on without them where it has enough updates to commit.
    """

    def __init__(self, store: Store, fleet: FleetPort, protection: Protection) -> None:
        self._store = store
        self._fleet = fleet
        self._protection = protection

    def collect(self, order: TrainRound, task: TrainTask, weights: Weights, *, timeout_s: float) -> RoundBuffer:
        """What the round is made of."""
        in_flight = self._fleet.in_flight()
        # After a failed attempt at this very round some of the cohort may be at it still.
        fresh = replace(order.cohort, client_ids=tuple(c for c in order.cohort.client_ids if c not in in_flight))
        taking_part = len(fresh.client_ids) + len(in_flight)
        answers: list[PartialUpdate] = []
        for answer in self._fleet.train(task, weights, fresh, timeout_s=timeout_s):
            answers += [answer] if answer else []
            if self._suffice(answers, order, task, taking_part):
                break
        else:
            if not self._suffice(answers, order, task, 0):
                answers += self._fleet.give_up(f"no answer in {timeout_s:g} s")
        return self._judged(answers, order, task)

    def _suffice(self, answers: list[PartialUpdate], order: TrainRound, task: TrainTask, taking_part: int) -> bool:
        # Read every time: who turns to asynchronous rounds while one hangs wants that one to end.
        needed = aggregation_settings(self._store).enough(taking_part, order.min_clients)
        if order.wait_for_all or needed is None:
            return False
        return self._judged(answers, order, task).accepted >= needed

    def _judged(self, answers: list[PartialUpdate], order: TrainRound, task: TrainTask) -> RoundBuffer:
        settings = aggregation_settings(self._store)
        admission = Admission(
            order.cohort.round_index,
            settings.mode,
            settings.staleness_tolerance,
            frozenset(self._store.quarantined_clients()),
            lambda answer: self._protection.judge(answer, task.run_id),
        )
        return judged(answers, admission)
