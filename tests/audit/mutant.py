"""A fault that is built into a copy of the package, and the names of the checks that must find one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """``edits`` replace the first text by the second one, in ``file``, where it must be exactly once."""

    name: str
    file: str
    check: str
    edits: tuple[tuple[str, str], ...]


RECORDS, CLIENTS, LATE, RANKS = "neighbouring records", "neighbouring clients", "late updates", "ranks"
NOISE, CHARGED_NOISE, KEYS, SAMPLING = "fresh noise", "noise as charged", "key derivation", "Poisson sampling"
CHARGING, PARTICIPATIONS, FINETUNING = "charging", "participations", "fine-tuning"
DISTRIBUTED_NOISE, SECURE_AGGREGATION = "distributed noise", "secure aggregation"
HISTOGRAMS, STEP, ROUND = "histograms", "released step", "released round"
RELEASED_SUM = "released secure sum"
