"""Mutated updates, histograms and mailbox messages: each is read, or rejected, in bounded memory and time.

FUZZ_UPDATES is the number of cases; `make fuzz-updates` asks for a million. FUZZ_SEED chooses others. The memory of
every tenth case is traced, because tracing takes longer than decoding.
"""

from __future__ import annotations

import math
import os
import time
import tracemalloc
from collections import Counter
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
from hostile_updates import (
    CLIENT,
    DEMO,
    EXAMPLES,
    KEY,
    MESSAGE_ID,
    ROUND,
    SMALL,
    SPEC,
    Case,
    Shapes,
    make_case,
    valid_updates,
)
from pydantic import ValidationError

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.validation import UpdateValidator
from fedvit.api.clients import HistogramBody
from fedvit.errors import DataError, IntegrityError, InvalidJsonError, UpdateRejectedError
from fedvit.settings import load_settings
from fedvit.types import ClientOutcome
from fedvit.updates import ClientFailures, EncodedUpdate
from fedvit.wire.histograms import HistogramSpec, checked_counts
from fedvit.wire.mailbox import MessageKind, UpdateNote, verify_message
from fedvit.wire.untrusted import JSON_FACTOR, parse_json
from fedvit.wire.updates import MOST_COPIES
from serve_apps.control.http.bodies import parse_json as parse_body

CASES = int(os.environ.get("FUZZ_UPDATES", "20000"))
SEED = int(os.environ.get("FUZZ_SEED", "15"))
TRACED_EVERY = 10
MAX_SECONDS = 0.05
REJECTIONS = (UpdateRejectedError, DataError, IntegrityError, InvalidJsonError, ValidationError)
_MAX_JSON_BYTES, _SPARE_BYTES = 2**16, 2**18


@cache
def validator(demo: bool) -> UpdateValidator:
    settings = load_settings(environ={}, overrides={"privacy": {"noise_multiplier": 4.0}})
    weights = {name: np.zeros(shape, np.float32) for name, shape in (DEMO if demo else SMALL).items()}
    return UpdateValidator.of(settings, rule_for(settings), weights, {CLIENT: EXAMPLES})


def read(case: Case) -> str:
    """Read a case as the server does; the word for what it is. The last checks are part of reading."""
    match case.kind:
        case "update":
            judge = validator(case.shapes is DEMO)
            update = judge.decoded(EncodedUpdate(ROUND, ClientOutcome(CLIENT, EXAMPLES), case.content))
            if isinstance(update, ClientFailures):
                return "failure"
            if fault := judge.fault_of(update):
                raise UpdateRejectedError(fault)
            return str(update.outcome.encoding)
        case "histogram":
            body = HistogramBody.model_validate(parse_body(case.content, 32, lambda: None))
            checked_counts(SPEC, body.counts)
        case "spec":
            try:
                value = parse_json(case.content, max_bytes=2**16)
            except ValueError as error:
                raise UpdateRejectedError(str(error)) from None
            HistogramSpec.from_json(value)
        case "message":
            message = verify_message(case.content, KEY, CLIENT, MESSAGE_ID)
            if message.kind is MessageKind.UPDATE:
                UpdateNote.of(message)
    return case.kind


def allowed_bytes(content: bytes, shapes: Shapes) -> int:
    """The copies of the model, and what the JSON may take: of an update, its header."""
    model = 8 * sum(map(math.prod, shapes.values()))
    return MOST_COPIES * model + JSON_FACTOR * min(len(content), _MAX_JSON_BYTES) + _SPARE_BYTES


class Figures:
    """What became of the cases, how long they took, and the largest share of the allowed memory."""

    def __init__(self) -> None:
        self.words: Counter[str] = Counter()
        self.seconds = np.zeros(CASES)
        self.memory = 0.0
        self.largest_bytes = 0
        # What is loaded at the first use is not the cost of a case.
        for number in range(min(CASES, 200)):
            with suppress(*REJECTIONS):
                read(make_case(SEED + 1, number))

    def take(self, number: int) -> None:
        case = make_case(SEED, number)
        traced = number % TRACED_EVERY == 0
        if traced:
            tracemalloc.start()
        began = time.thread_time()
        try:
            word = read(case)
        except REJECTIONS as error:
            word = type(error).__name__
        except Exception as error:
            raise AssertionError(f"case {number} of seed {SEED}, {case.kind} {case.content[:200]!r}") from error
        self.seconds[number] = time.thread_time() - began
        self.words[word] += 1
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.memory = max(self.memory, peak / allowed_bytes(case.content, case.shapes))
            self.largest_bytes = max(self.largest_bytes, peak)

    def untraced_seconds(self) -> np.ndarray:
        return self.seconds[np.arange(CASES) % TRACED_EVERY != 0]

    def __str__(self) -> str:
        p50, p999, most = np.percentile(self.untraced_seconds(), [50, 99.9, 100]) * 1000
        return (
            f"{CASES} cases of seed {SEED}: {dict(self.words.most_common())}; decoding p50 {p50:.3f} ms, p99.9 "
            f"{p999:.2f} ms, at most {most:.2f} ms; memory of every {TRACED_EVERY}th at most {self.largest_bytes} "
            f"bytes, {self.memory:.0%} of what is allowed to it"
        )


def test_the_cases_that_are_not_mutated_are_read() -> None:
    words = [
        read(Case("update", content, DEMO if demo else SMALL))
        for demo in (0, 1)
        for content in valid_updates(bool(demo))
    ]
    assert words == ["float32", "float16", "bfloat16", "int8", "top_k", "exact", "failure"] * 2


@pytest.mark.timeout(7200)
def test_mutated_bytes_are_rejected_or_read_in_bounded_memory_and_time() -> None:
    figures = Figures()
    for number in range(CASES):
        figures.take(number)
    print(f"\n{figures}")
    # The mutations go deep enough: every kind is accepted sometimes, and rejected mostly.
    accepted = {"float32", "int8", "top_k", "exact", "failure", "histogram", "spec", "message"}
    assert accepted <= figures.words.keys()
    assert figures.words[UpdateRejectedError.__name__] > CASES / 4
    assert figures.memory <= 1
    assert float(np.percentile(figures.untraced_seconds(), 99.9)) < MAX_SECONDS


def test_a_case_is_always_the_same() -> None:
    assert [make_case(SEED, number) for number in range(50)] == [make_case(SEED, number) for number in range(50)]
    assert make_case(SEED, 1) != make_case(SEED + 1, 1)
