"""Steady requests at every place that serves, and what each was answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from fedvit.types import utc_now

PAUSE_S = 0.2
SETTLE_S = 120.0
Key = tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """One request: which step of the releases everybody had taken when it began, and what came of it."""

    target: str
    settled: int
    ended_at: datetime
    key: Key | None
    fault: str | None


class Load:
    """One caller a target, each asking again a moment after it was answered, until the end of the ``with`` block."""

    def __init__(self, targets: Mapping[str, str], image: bytes) -> None:
        self.answers: list[Answer] = []
        self.settled = 0
        self._latest: dict[str, Key | None] = dict.fromkeys(targets)
        self._image = image
        self._stop = threading.Event()
        self._answered = threading.Condition()
        self._threads = [threading.Thread(target=self._ask, args=item) for item in targets.items()]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def settle(self, key: Key, step: int) -> None:
        """Return once every target answers with this release."""
        with self._answered:
            done = self._answered.wait_for(lambda: all(k == key for k in self._latest.values()), SETTLE_S)
            assert done, f"not everybody serves {key}: {self._latest}"
            self.settled = step

    def hold(self, key: Key, answers: int) -> None:
        """Return when every target has answered so many times more, each time with this release."""
        first = len(self.answers)
        with self._answered:
            done = self._answered.wait_for(lambda: self._counts(first) >= answers, SETTLE_S)
        assert done
        assert {answer.key for answer in self.answers[first:]} == {key}

    def _counts(self, first: int) -> int:
        since = self.answers[first:]
        return min(sum(answer.target == target for answer in since) for target in self._latest)

    def _ask(self, target: str, base: str) -> None:
        with httpx.Client(base_url=base, timeout=60) as http:
            while not self._stop.wait(PAUSE_S):
                answer = self._one(http, target)
                with self._answered:
                    self.answers.append(answer)
                    self._latest[target] = answer.key
                    self._answered.notify_all()

    def _one(self, http: httpx.Client, target: str) -> Answer:
        settled = self.settled
        key, fault = None, None
        try:
            response = http.post("/infer", content=self._image)
            if response.status_code == 200:
                results: dict[str, Any] = response.json()
                key = (results["model_version"], results["variant"])
            else:
                fault = f"{response.status_code} {response.text[:200]}"
        except httpx.HTTPError as error:
            fault = repr(error)
        return Answer(target, settled, utc_now(), key, fault)


def await_true(condition: Callable[[], bool], what: str, *, every_s: float = 0.1, limit_s: float = SETTLE_S) -> None:
    """Return once a state of another process is reached; it tells nobody, so it is looked at again and again."""
    pause = threading.Event()
    for _ in range(int(limit_s / every_s)):
        if condition():
            return
        pause.wait(every_s)
    raise AssertionError(f"{what}: not within {limit_s:g} s")
