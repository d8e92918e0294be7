"""``fed_vit_autorl``, the names that the runbook calls: questions, each asked in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedvit
from fedvit.ports import Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.store.store import Store
from fedvit.testing.doubles import seeded_fleet

ROOT = Path(fedvit.__file__).parents[1]
CONNECT = "import fed_vit_autorl.db; fed_vit_autorl.db.test_connection()"
REMAINING = """
from fed_vit_autorl.privacy import PrivacyAccountant
accountant = PrivacyAccountant()
print(f'Remaining epsilon: {accountant.get_remaining_epsilon()}')
"""


def python(code: str, **environment: object) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where the package is importable as it is once installed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "fedvit" / "compat")])
    env = {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with Store.open(tmp_path / "home") as store:
        store.clients.register(seeded_fleet(3))
        store.ledger.append([Charge("run-0001", 1, "a", "1" * 64, 4.0, 1.0, 1)])
    return tmp_path / "home"


def test_the_connection_test_says_in_one_line_what_answered(home: Path) -> None:
    done = python(f"{CONNECT}; assert fed_vit_autorl.db.test_connection() is True", FEDVIT_HOME=home)
    assert done.returncode == 0, done.stderr
    (line, again) = done.stdout.splitlines()
    assert line == again == f"The state database at {home} answers: 3 clients, no training yet."


@pytest.mark.parametrize("code", [CONNECT, REMAINING])
def test_asking_makes_no_state_folder(tmp_path: Path, code: str) -> None:
    done = python(code, FEDVIT_HOME=tmp_path / "nothing")
    assert done.returncode == 1
    assert "StateError: There is no fedvit state at" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_database_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"no database" * 1000)
    done = python(CONNECT, FEDVIT_HOME=tmp_path)
    assert done.returncode == 1
    assert "StateError" in done.stderr
    assert (tmp_path / "state.db").read_bytes() == b"no database" * 1000


def test_the_accountant_is_told_what_remains_by_the_environments_own_settings(home: Path, tmp_path: Path) -> None:
    (tmp_path / "fedvit.yaml").write_text("privacy:\n  target_epsilon: 2.5\n")
    with Store.open(home) as store:
        spent = PrivacyAccountant(store).budget().epsilon_spent
    # Both answers in one process: the accountants' own imports are what takes long.
    then = f"import os; os.environ['FEDVIT_CONFIG'] = {str(tmp_path / 'fedvit.yaml')!r}"
    done = python(f"{REMAINING}{then}{REMAINING}", FEDVIT_HOME=home)
    assert done.returncode == 0, done.stderr
    results = [line.partition(": ") for line in done.stdout.splitlines()]
    assert [name for name, _, _ in results] == ["Remaining epsilon"] * 2
    assert [float(figure) for _, _, figure in results] == pytest.approx([8.0 - spent, 2.5 - spent])


def test_it_loads_neither_torch_nor_ray(home: Path) -> None:
    code = f"import sys{REMAINING}{CONNECT}; print(sorted({{'torch', 'ray', 'fastapi'}} & set(sys.modules)))"
    done = python(code, FEDVIT_HOME=home)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
