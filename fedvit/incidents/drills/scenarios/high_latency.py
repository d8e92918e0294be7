"""Other programs crowd the edges' core while the heavier variant serves: the lighter one serves, then they go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedvit.incidents.drills.alerts import Alert, query
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import Drill, Stage
from fedvit.incidents.drills.neighbours import Neighbours, pinned, visitors
from fedvit.incidents.drills.processes import supervisor, with_words
from fedvit.incidents.drills.site import EDGES, Site

SECTION = "5. High Inference Latency"
ALERT = Alert("EdgeHighInferenceLatency", {"job": "fed-edge"})
CORE = 0
THREADS = 4
FIRST, STEP, MOST = 4, 2, 40
LOOK_S = 8.0
ENOUGH_MS = 130.0
"""Slow enough for the alert, and not so slow that the edge has no time to be scraped."""
WINDOW_S = 12
P95 = (
    "max(histogram_quantile(0.95, sum by (instance, le) (rate("
    f'fed_vit_autorl_inference_duration_seconds_bucket{{job="fed-edge"}}[{WINDOW_S}s]))))'
)


def play(course: Course) -> None:
    """Crowd the edges' core, optimise and switch, and see the neighbours off."""
    site = course.site
    edges = _edges(site)
    heavy = site.post("/api/model/switch", variant="standard")
    site.everybody_serves(heavy["version"], "standard")
    with _crowded(edges) as neighbours:
        course.inject(f"{FIRST} and more busy processes beside the edges, which serve the variant standard")
        neighbours.add(FIRST)
        course.detect(meanwhile=_Crowd(neighbours))
        slow = course.check("the slower edge is measured", _p95_ms)
        course.say(f"seen: p95 {slow:.0f} ms beside {len(neighbours)} busy processes")
        course.follow(SECTION, r"histogram_quantile\(0\.95,fed_vit")
        course.follow(SECTION, r"^for device in")
        course.follow(SECTION, r"\.complexity")
        _lighten(course)
        lighter = _measured_anew(course, "it is measured with the lighter variant")
        # What the runbook cannot say: whose programs they are. Whoever owns the device ends them.
        neighbours.end()
        course.clear()
        course.notes.append(
            f"p95 {slow:.0f} ms with standard, {lighter:.0f} ms with edge_optimized beside the same neighbours, "
            f"{_measured_anew(course, 'it is measured alone'):.0f} ms without them"
        )
    site.post("/api/model/switch", variant="standard")
    site.post("/api/training/start")


def _lighten(course: Course) -> None:
    site = course.site
    # A release in between would make the optimisation fail, as the runbook says.
    site.post("/api/training/stop")
    site.training(lambda now: now["phase"] in ("resting", "idle"), "training rests")
    operation = site.operation(course.follow(SECTION, r"/api/edge/optimize"))
    course.say(f"seen: target met: {operation['result']['target_met']}")
    told = course.follow(SECTION, r"/api/model/switch").json()
    site.everybody_serves(told["version"], "edge_optimized")


def _edges(site: Site) -> list[int]:
    pids = [pid for n in (1, 2) for pid in with_words(supervisor(site.home), "--device-id", f"edge-{n}")]
    # One that a former drill started again is nobody's child any more.
    return pids + [int(file.read_text()) for file in (site.home / "run").glob("edge-*.pid")]


@contextmanager
def _crowded(edges: list[int]) -> Iterator[Neighbours]:
    neighbours = Neighbours(CORE)
    try:
        with pinned(edges, CORE), visitors(EDGES, THREADS):
            yield neighbours
    finally:
        neighbours.end()


class _Crowd:
    """Keeps as many as make the edges slow and leave them the time to be scraped: machines differ."""

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours, self._last_s = neighbours, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last_s < LOOK_S:
            return
        self._last_s = time.monotonic()
        p95_ms = _p95_ms()
        if p95_ms is None and len(self._neighbours) > FIRST:
            self._neighbours.end(STEP)
        elif p95_ms is not None and p95_ms < ENOUGH_MS and len(self._neighbours) < MOST:
            self._neighbours.add(STEP)


def _measured_anew(course: Course, what: str) -> float:
    """What the edges take now, once nothing older is in the window."""
    since_s = time.monotonic()
    found: float = course.check(what, lambda: time.monotonic() - since_s > WINDOW_S and _p95_ms())
    return found


def _p95_ms() -> float | None:
    """Of the slower edge in the last seconds; None where neither was scraped, or asked anything."""
    found = query(P95)
    return 1000 * float(found[0]["value"][1]) if found else None


DRILL = Drill(
    "high-latency",
    "the edges' core is crowded while the heavier variant serves",
    (Stage("", ALERT, play),),
)
