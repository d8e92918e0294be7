"""Several processes, and processes that die: each write is there whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path

from fedvit.ports import Charge
from fedvit.store.store import Store
from fedvit.types import Cohort

PROCESSES, ROUNDS, UNITS = 4, 12, 5

APPEND_FOR_EVER = """
import itertools, sys
from pathlib import Path
from fedvit.ports import Charge
from fedvit.store.store import Store

store, first = Store.open(Path(sys.argv[1])), int(sys.argv[2])
for i in itertools.count(first):
    store.ledger.append([Charge("run-0001", i, unit, f"{i}", 1.5, 0.5, 1) for unit in "abc"])
    print(i, flush=True)
"""

DIE_IN_COMMIT = """
import os, signal, sys
from pathlib import Path
from fedvit.store import rounds
from fedvit.store.records import RoundCommit
from fedvit.store.store import Store

insert_version = rounds.insert_version

def insert_and_die(*arguments):
    insert_version(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

rounds.insert_version = insert_and_die
commit = RoundCommit("1" * 64, "2" * 64, 0.5, 1.0, 0.5, {}, {}, (), 1.0)
Store.open(Path(sys.argv[1])).rounds.commit("run-0001", 1, commit)
"""


def append_overlapping(home: Path, process: int, barrier: Barrier) -> None:
    """Open (all at once, the folder is new), then charge rounds that the neighbours charge as well."""
    barrier.wait(timeout=60)
    with Store.open(home) as store:
        for step in range(ROUNDS):
            round_index = (step + 3 * process) % ROUNDS
            units = [f"u{(process + i) % (UNITS + 2)}" for i in range(UNITS)]
            store.ledger.append([Charge("run-0001", round_index, unit, "r", 1.5, 0.5, 1) for unit in units])


def test_four_processes_write_each_charge_exactly_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    workers = [context.Process(target=append_overlapping, args=(tmp_path, i, barrier)) for i in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * PROCESSES
    with Store.open(tmp_path) as store:
        times = Counter((entry.charge.round_index, entry.charge.unit_id) for entry in store.ledger.entries())
        assert store.ledger.verify() == len(times)
    assert set(times) == {(i, f"u{unit}") for i in range(ROUNDS) for unit in range(UNITS + 2)}
    assert set(times.values()) == {1}


def test_what_a_killed_process_reported_is_there_and_nothing_by_halves(tmp_path: Path) -> None:
    reported = 0
    for kill_after in (1, 2, 5, 9, 14):
        command = [sys.executable, "-c", APPEND_FOR_EVER, str(tmp_path), str(reported + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(kill_after)]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        assert process.returncode == -signal.SIGKILL
        reported = max(int(line) for line in lines if line.endswith("\n"))
        with Store.open(tmp_path) as store:
            units = Counter(entry.charge.round_index for entry in store.ledger.entries())
            assert store.ledger.verify() == units.total()
        assert set(units.values()) == {3}
        assert sorted(units) == list(range(1, max(units) + 1))
        # At most the one append under way when the signal came was written without being reported.
        assert max(units) in (reported, reported + 1)


def test_a_process_killed_inside_a_commit_leaves_the_round_open(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.runs.create(rounds_total=2, noise_multiplier=1.0, config={}, config_digest="", data_digest="")
        opened = store.rounds.open("run-0001", 1, Cohort(1, ("a",)))
        died = subprocess.run([sys.executable, "-c", DIE_IN_COMMIT, str(tmp_path)], check=False, env=os.environ.copy())
        assert died.returncode == -signal.SIGKILL
        assert store.rounds.open("run-0001", 1, Cohort(1, ("b",))) == opened
        assert store.runs.get("run-0001").rounds_done == 0
        assert store.versions.all() == []
