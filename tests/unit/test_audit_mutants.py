"""The mutation gate in short; `make audit-mutants` has all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedvit.tools.audit.suite import CHECKS
from tests.audit.gate import PACKAGE, PAGE, main, mutated, try_mutant
from tests.audit.mutant import Mutant
from tests.audit.mutants import MUTANTS, NOT_YET, QUICK

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies_and_is_python(mutant: Mutant) -> None:
    text = (PACKAGE / mutant.file).read_text()
    changed = mutated(mutant, text)
    assert changed != text
    compile(changed, mutant.file, "exec")
    assert mutant.check in CHECKS


def test_a_mutant_whose_text_is_gone_is_an_error() -> None:
    mutant = replace(MUTANTS[0], edits=(("no such text", ""),))
    with pytest.raises(ValueError, match=r"'no such text' is 0 times in dp/dpsgd\.py"):
        try_mutant(mutant)


def test_an_unknown_mutant_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such fault"):
        main(["no such fault"])


def test_a_mutant_that_makes_no_sense_is_an_error_and_not_killed() -> None:
    mutant = replace(
        BY_NAME["a ledger lost on restart"],
        edits=(("self._lifetime = _Spends(self._settings.privacy.privacy_unit, after=0)", "self._lifetime = nobody"),),
    )
    with pytest.raises(ValueError, match="NameError"):
        try_mutant(mutant)


@pytest.mark.parametrize("name", QUICK)
def test_the_audit_kills_it(name: str) -> None:
    outcome = try_mutant(BY_NAME[name])
    assert outcome.seen
    assert "broke off" not in outcome.seen


def test_the_page_lists_every_mutant() -> None:
    page = PAGE.read_text()
    assert [mutant.name for mutant in MUTANTS if f"| {mutant.name} |" not in page] == []
    assert [name for name in NOT_YET if f"| {name} |" not in page] == []
    assert "**survived**" not in page
    assert "**FAIL**" not in page
