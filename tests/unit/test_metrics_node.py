"""The metrics of a node over its processes: nothing counted twice or lost, and only the release that serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.aggregator import RayMirror
from fedvit.metrics import node
from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE, predictions_by_class, render

DURATION = "fed_vit_autorl_inference_duration_seconds"

# A process that does what it is told on standard input, line by line, and answers each.
WORKER = """
import os, sys
from prometheus_client import REGISTRY, CollectorRegistry
from fedvit.metrics.exposition import counter, gauge
from fedvit.metrics.releases import ReleaseMetrics
release = ReleaseMetrics(CollectorRegistry(), count_answers=True)
def observe(sequence, seconds, times=1):
    for _ in range(times):
        release.answered(sequence, seconds, 1)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Worker:
    """One process of the node."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, MULTIPROCESS_VARIABLE: str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def do(self, *lines: str) -> Worker:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for line in lines:
            self._process.stdin.write(line + "\n")
            assert self._process.stdout.readline() == "done\n"
        return self

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def working(folder: Path, count: int = 1) -> Iterator[list[Worker]]:
    workers = [Worker(folder) for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def samples(folder: Path) -> dict[tuple[str, str], float]:
    """Values by name and label values in the order of the labels' names."""
    families = text_string_to_metric_families(render(folder)[0].decode())
    return {(s.name, ",".join(v for _, v in sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def quantile(folder: Path, q: float) -> dict[str, float]:
    """histogram_quantile over the raw counter, by version: the upper bound of the bucket that the rank falls in."""
    values: dict[str, dict[float, float]] = {}
    for (name, labels), value in samples(folder).items():
        if name == f"{DURATION}_bucket":
            bound, version = labels.split(",")
            values.setdefault(version, {})[float(bound)] = value
    return {
        version: min(bound for bound, count in buckets.items() if count >= q * buckets[float("inf")])
        for version, buckets in values.items()
        if buckets[float("inf")]
    }


def test_counters_and_newest_gauges_survive_however_many_processes(tmp_path: Path) -> None:
    for number in range(6):
        with working(tmp_path) as (worker,):
            worker.do('counter("training_rounds_total").inc()', f'gauge("training_loss").set({10 - number})')
        values = samples(tmp_path)
        assert values["fed_vit_autorl_training_rounds_total", ""] == number + 1
        assert values["fed_vit_autorl_training_loss", ""] == 10 - number
    # Of each type one file, whatever has ended.
    assert {path.name for path in tmp_path.glob("*.db")} == {"counter_ended.db", "gauge_mostrecent_ended.db"}


def test_what_waits_is_the_sum_over_those_that_live(tmp_path: Path) -> None:
    with working(tmp_path, 2) as (one, other):
        for worker in (one, other):
            worker.do('gauge("queue_depth").labels("images").set(3)')
        assert samples(tmp_path)["fed_vit_autorl_queue_depth", "images"] == 6
        one.kill()
        assert samples(tmp_path)["fed_vit_autorl_queue_depth", "images"] == 3


@pytest.mark.parametrize("left", ["all", "no draft", "no files"])
def test_a_fold_that_was_interrupted_is_seen_through_and_counts_once(tmp_path: Path, left: str) -> None:
    for _ in range(2):
        with working(tmp_path) as (worker,):
            worker.do('counter("training_rounds_total").inc(5)')
    # What a process leaves that is killed between its journal and the end: at its beginning, middle or end.
    ended = sorted(path.name for path in tmp_path.glob("counter_*.db"))
    copies = {name: (tmp_path / name).read_bytes() for name in ended}
    render(tmp_path)
    archive = tmp_path / "counter_ended.db"
    if left == "all":
        archive.rename(tmp_path / "counter_ended.draft")
    if left != "no files":
        for name, content in copies.items():
            (tmp_path / name).write_bytes(content)
    expected = {"archive": "counter_ended.db", "draft": "counter_ended.draft", "ended": ended}
    (tmp_path / node.JOURNAL).write_text(json.dumps(expected))
    assert samples(tmp_path)["fed_vit_autorl_training_rounds_total", ""] == 10
    assert not (tmp_path / node.JOURNAL).exists()


def test_after_a_switch_the_raw_quantile_is_about_what_serves_now(tmp_path: Path) -> None:
    """The runbook's literal query, on a server: two replicas, the same version in another variant, and back."""
    with working(tmp_path, 2) as replicas:
        for replica in replicas:
            replica.do('release.serve("v1.1.10", 1)', "observe(1, 0.4, 1000)")
        assert quantile(tmp_path, 0.95) == {"v1.1.10": 0.5}
        for replica in replicas:
            replica.do('release.serve("v1.1.10", 2)', "observe(1, 0.4)", "observe(2, 0.004, 10)")
        assert quantile(tmp_path, 0.95) == {"v1.1.10": 0.005}
        for replica in replicas:
            replica.do('release.serve("v1.1.10", 3)', "observe(3, 0.04)")
        assert quantile(tmp_path, 0.95) == {"v1.1.10": 0.05}
        assert samples(tmp_path)[f"{DURATION}_count", "v1.1.10"] == 2


def test_a_replica_that_died_counts_for_its_release_and_goes_with_it(tmp_path: Path) -> None:
    with working(tmp_path, 2) as (gone, there):
        for replica in (gone, there):
            replica.do('release.serve("v1", 1)', "observe(1, 0.01, 5)")
        gone.kill()
        assert samples(tmp_path)[f"{DURATION}_count", "v1"] == 10
        assert predictions_by_class("v1", tmp_path) == {1: 10}
        there.do('release.serve("v2", 2)', "observe(2, 0.01)")
        values = samples(tmp_path)
        assert values[f"{DURATION}_count", "v2"] == 1
        assert [key for key in values if "v1" in key[1].split(",")] == []
        assert predictions_by_class("v1", tmp_path) == {}


def test_while_no_replica_lives_nothing_is_forgotten(tmp_path: Path) -> None:
    with working(tmp_path) as (worker,):
        worker.do('release.serve("v1", 1)', "observe(1, 0.01, 5)")
    assert samples(tmp_path)[f"{DURATION}_count", "v1"] == 5
    with working(tmp_path) as (worker,):
        worker.do('release.serve("v1", 1)', "observe(1, 0.01)")
        assert samples(tmp_path)[f"{DURATION}_count", "v1"] == 6


def test_ray_is_told_the_same_figures_but_those_that_end(tmp_path: Path) -> None:
    expected: dict[tuple[str, str], float] = {}

    class Recorder:
        def __init__(self, name: str, _: str, labels: tuple[str, ...]) -> None:
            self._name, self._labels = name, labels

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert set(self._labels) == set(tags or {})
            expected[self._name, ",".join(v for _, v in sorted((tags or {}).items()))] = value

    with working(tmp_path) as (worker,):
        worker.do('gauge("training_loss").set(0.5)', 'counter("heartbeats_total").labels("ok").inc(3)')
        worker.do('release.serve("v1", 1)', "observe(1, 0.01)")
        mirror = RayMirror(tmp_path, Recorder)
        for loss in (0.5, 0.25):
            worker.do(f'gauge("training_loss").set({loss})')
            mirror.copy()
            assert expected["fed_vit_autorl_training_loss", ""] == loss
    exported = samples(tmp_path)
    assert expected["fed_vit_autorl_heartbeats_total", "ok"] == 3
    assert expected.items() <= exported.items()
    assert not any("v1" in labels for _, labels in expected)


def test_what_others_write_into_the_folder_is_not_ours(tmp_path: Path) -> None:
    with working(tmp_path) as (worker,):
        worker.do("from prometheus_client import Counter", 'Counter("ray_things", "Things of Ray.").inc()')
        worker.do('counter("training_rounds_total").inc()')
        assert {name for name, _ in samples(tmp_path)} == {"fed_vit_autorl_training_rounds_total"}


def test_a_release_has_all_its_buckets_before_its_first_image(tmp_path: Path) -> None:
    with working(tmp_path) as (worker,):
        worker.do('release.serve("v1", 1)')
        values = samples(tmp_path)
        assert values[f"{DURATION}_bucket", "+Inf,v1"] == 0
        assert values[f"{DURATION}_bucket", "0.1,v1"] == 0
