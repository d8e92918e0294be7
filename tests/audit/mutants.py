"""The mutants of the gate: small changes of text, each a fault, and the check that must see it."""

from __future__ import annotations

from tests.audit.mechanism_mutants import MECHANISM_MUTANTS
from tests.audit.secure_mutants import SECURE_MUTANTS
from tests.audit.training_mutants import TRAINING_MUTANTS

MUTANTS = TRAINING_MUTANTS + MECHANISM_MUTANTS + SECURE_MUTANTS
NOT_YET: dict[str, str] = {}
QUICK = ("a cohort drawn from a public key",)
"""A sample that takes seconds, for every test run."""
