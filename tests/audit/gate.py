"""The mutation gate: with each fault built in, `fedvit privacy audit` must fail; without, it must pass.

``python -m tests.audit.gate`` writes docs/reference/privacy-audit.md; with names, it tries only those mutants and
writes nothing. As many audits run at once as there are processors.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fedvit
from tests.audit.mutant import Mutant
from tests.audit.mutants import MUTANTS, NOT_YET

PACKAGE = Path(fedvit.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "privacy-audit.md"
COMMAND = "make audit-mutants"
_TIMEOUT_S = 400
_AT_ONCE = os.cpu_count() or 1
# The scratch copy must be what is audited, whatever else is installed.
_RUN = (
    "import pathlib, sys, fedvit; assert pathlib.Path(fedvit.__file__).is_relative_to(pathlib.Path.cwd()), fedvit;"
    "from fedvit.cli.main import main; main()"
)
# How a patch fails that makes no sense; a fault of the mutant, and no finding of the audit.
_NONSENSE = ("SyntaxError", "NameError", "ImportError", "ModuleNotFoundError", "AttributeError", "UnboundLocalError")

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check made of a package. ``seen`` is the first thing that it did not pass, or empty."""

    seen: str
    seconds: float


def try_mutant(mutant: Mutant) -> Outcome:
    """Build the fault into a scratch copy, and audit that.

    Raises:
        ValueError: the text that it replaces is not there, or more than once, or the result makes no sense.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = _copied(Path(folder))
        path = scratch / "fedvit" / mutant.file
        path.write_text(mutated(mutant, path.read_text()))
        return _audited(scratch, mutant.check)


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the fault; see :func:`try_mutant`."""
    for old, new in mutant.edits:
        if text.count(old) != 1:
            raise ValueError(f"{mutant.name}: {old!r} is {text.count(old)} times in {mutant.file}; once was expected")
        text = text.replace(old, new)
    return text


def try_original(check: str) -> Outcome:
    """The same check of an unchanged copy."""
    with tempfile.TemporaryDirectory() as folder:
        return _audited(_copied(Path(folder)), check)


def _copied(folder: Path) -> Path:
    scratch = folder.resolve()
    shutil.copytree(PACKAGE, scratch / "fedvit", ignore=shutil.ignore_patterns("__pycache__"))
    return scratch


def _audited(scratch: Path, check: str) -> Outcome:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FEDVIT_")}
    environ |= {"PYTHONPATH": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["privacy", "audit", "--quick", "--json", "--fail-fast", "--only", check]
    options += ["--set", "privacy.noise_multiplier=1.0"]
    started_s = time.monotonic()
    # With a signal, Python prints where each thread is.
    command = [sys.executable, "-X", "faulthandler", "-c", _RUN, *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=scratch, env=environ, stdout=pipe, stderr=pipe, text=True) as audit:
        try:
            stdout, stderr = audit.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            audit.send_signal(signal.SIGABRT)
            raise ValueError(f"{check!r} did not end in {_TIMEOUT_S} s: {audit.communicate()[1][-5000:]}") from None
    seconds = time.monotonic() - started_s
    if audit.returncode not in (0, 1) or not stdout:
        raise ValueError(f"the audit could not run: {stderr[-500:]}")
    report = json.loads(stdout)
    failed = [finding for finding in report["findings"] if not finding["passed"]]
    if bool(failed) != (audit.returncode == 1):
        raise ValueError(f"status {audit.returncode} with {len(failed)} findings against it")
    result = f"{failed[0]['subject']}: {failed[0]['detail']}" if failed else ""
    if any(f"{kind}:" in result for kind in _NONSENSE):
        raise ValueError(f"the mutant makes no sense: {result}")
    return Outcome(result, seconds)


def _table(rows: list[tuple[Mutant, Outcome]]) -> list[str]:
    lines = ["| mutant | file | killed by | seen | s |", "|---|---|---|---|---:|"]
    for mutant, outcome in rows:
        result = outcome.seen.replace("|", "/")[:160] if outcome.seen else "**survived**"
        lines.append(f"| {mutant.name} | {mutant.file} | {mutant.check} | {result} | {outcome.seconds:.0f} |")
    return lines + [f"| {name} | – | not tried: {why} | | |" for name, why in NOT_YET.items()]


def _report() -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fedvit.cli.main",
            "privacy",
            "audit",
            "--json",
            "--set",
            "privacy.noise_multiplier=1.0",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _audit_table(report: dict[str, Any]) -> list[str]:
    lines = ["| check | of | | claimed epsilon | at least | seen | s |", "|---|---|---|---:|---:|---|---:|"]
    for finding in report["findings"]:
        epsilons = [f"{e:.3f}" if e is not None else "" for e in (finding["claimed_epsilon"], finding["lower_bound"])]
        verdict = "pass" if finding["passed"] else "**FAIL**"
        cells = [
            finding["check"],
            finding["subject"],
            verdict,
            *epsilons,
            finding["detail"],
            f"{finding['seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(audit: list[str], mutants: list[str]) -> str:
    """docs/reference/privacy-audit.md."""
    result = f"{COMMAND}`, {datetime.now(UTC).date().isoformat()}"
    head = [
        "# Privacy audit",
        "",
        f"Generated by `{result}; do not edit. The claims and the checks are described in"
        " [the threat model](../threat-model.md#what-is-audited).",
        "",
        "## What `fedvit privacy audit` found",
        "",
        "`fedvit privacy audit --set privacy.noise_multiplier=1.0`, else the default settings.",
        "",
    ]
    middle = [
        "",
        "## Mutants",
        "",
        "Each row is a fault in a scratch copy of the package, on which `fedvit privacy audit` must fail.",
        "",
    ]
    return "\n".join([*head, *audit, *middle, *mutants, ""])


def _side_by_side(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> Iterator[tuple[_Task, _Result]]:
    """Each task with its result, in order; the first error ends it."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from zip(tasks, pool.map(work, tasks), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def main(names: list[str]) -> int:
    """Try mutants, print the table, and write the page if all were tried and killed.

    Raises:
        ValueError: there is no mutant of a name, or one does not apply or makes no sense.
    """
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        raise ValueError(f"there is no mutant {sorted(unknown)[0]!r}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    for mutant in chosen:
        # All of them, before minutes are spent on the first ones.
        mutated(mutant, (PACKAGE / mutant.file).read_text())
    for check, original in _side_by_side(try_original, sorted({mutant.check for mutant in chosen})):
        if original.seen:
            print(f"The unchanged package does not pass {check!r}: {original.seen}", file=sys.stderr)
            return 1
    rows = []
    with ThreadPoolExecutor(1) as beside:
        # It takes as long as many mutants.
        report = None if names else beside.submit(_report)
        for mutant, outcome in _side_by_side(try_mutant, chosen):
            rows.append((mutant, outcome))
            print(_table(rows[-1:])[2], flush=True)
    survived = [mutant.name for mutant, outcome in rows if not outcome.seen]
    print(f"{len(rows) - len(survived)} of {len(rows)} mutants killed; survived: {survived or 'none'}")
    for name, why in NOT_YET.items():
        print(f"not tried: {name}: {why}")
    if report is not None and not report.result()["passed"]:
        print("the whole audit does not pass; the page is not written", file=sys.stderr)
        return 1
    if report is not None and not survived:
        PAGE.write_text(page(_audit_table(report.result()), _table(rows)))
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
