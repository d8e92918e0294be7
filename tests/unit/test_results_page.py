"""The page of results is generated from the runs that are checked in."""

from __future__ import annotations

import statistics

from tests.benchmarks.gtsrb_accuracy import PAGE, ROWS, SEEDS, page, stored


def test_the_page_is_what_the_runs_say() -> None:
    assert PAGE.read_text() == page(stored())


def test_every_row_has_been_run_with_every_seed() -> None:
    runs = {(run.table, run.name, run.target_epsilon, run.seed) for run in stored()}
    wanted = {(r.table, r.name, epsilon, seed) for r in ROWS for epsilon in r.rates for seed in range(SEEDS)}
    assert wanted <= runs
    assert all(run.epsilon is None or run.epsilon <= run.target_epsilon for run in stored() if run.target_epsilon)


def test_a_mean_is_shown_with_the_least_and_the_largest() -> None:
    one = [run for run in stored() if run.name == ROWS[0].name and run.target_epsilon == 8.0]
    figures = [run.accuracy for run in one if run.table == ROWS[0].table]
    assert f"{statistics.mean(figures):.3f} ({min(figures):.3f} to {max(figures):.3f})" in PAGE.read_text()


def test_no_run_counts_twice() -> None:
    runs = [(run.table, run.name, run.target_epsilon, run.seed) for run in stored()]
    assert len(set(runs)) == len(runs)
