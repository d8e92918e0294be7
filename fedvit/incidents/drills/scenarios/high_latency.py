"""Busy processes slow the edges down; the runbook switches to the lighter variant, then the processes end."""

from __future__ import annotations

import time
from contextlib import ExitStack

from fedvit.incidents.drills.drill import Drill, ExpectedAlert, Stage, StageRun
from fedvit.incidents.drills.processes import BusyProcesses, inference_requests, pinned, supervisor, with_words
from fedvit.incidents.drills.system import EDGES, DrillSystem, query

SECTION = "5. High Inference Latency"
ALERT = ExpectedAlert("EdgeHighInferenceLatency", {"job": "fed-edge"})
CORE = 0
THREADS = 4
FIRST, STEP, MOST = 4, 2, 40
ADJUST_S = 8.0
TARGET_P95_MS = 130.0
"""Slow enough for the alert, and fast enough for the edge to be scraped."""
WINDOW_S = 12
P95 = (
    "max(histogram_quantile(0.95, sum by (instance, le) (rate("
    f'fed_vit_autorl_inference_duration_seconds_bucket{{job="fed-edge"}}[{WINDOW_S}s]))))'
)


def play(run: StageRun) -> None:
    """Load the edges' core, optimise and switch the variant, and end the load."""
    system = run.system
    edges = _edges(system)
    heavy = system.post("/api/model/switch", variant="standard")
    system.wait_until_served(heavy["version"], "standard")
    busy = BusyProcesses(CORE)
    with ExitStack() as stack:
        stack.callback(busy.end)
        stack.enter_context(pinned(edges, CORE))
        stack.enter_context(inference_requests(EDGES, THREADS))
        run.inject(f"{FIRST} and more busy processes beside the edges, which serve the variant standard")
        busy.start(FIRST)
        run.detect(meanwhile=_LoadControl(busy))
        slow = run.check("the slower edge is measured", _p95_ms)
        run.say(f"seen: p95 {slow:.0f} ms beside {len(busy)} busy processes")
        run.follow(SECTION, r"histogram_quantile\(0\.95,fed_vit")
        run.follow(SECTION, r"^for device in")
        run.follow(SECTION, r"\.complexity")
        _lighten(run)
        lighter = _measured_anew(run, "it is measured with the lighter variant")
        # The runbook cannot say which programs these are; the owner of the device ends them.
        busy.end()
        run.clear()
        run.notes.append(
            f"p95 {slow:.0f} ms with standard, {lighter:.0f} ms with edge_optimized beside the same busy processes, "
            f"{_measured_anew(run, 'it is measured alone'):.0f} ms without them"
        )
    system.post("/api/model/switch", variant="standard")
    system.post("/api/training/start")


def _lighten(run: StageRun) -> None:
    system = run.system
    # A release during the optimisation would make it fail, as the runbook says.
    system.post("/api/training/stop")
    system.wait_for_rest()
    operation = system.operation(run.follow(SECTION, r"/api/edge/optimize"))
    run.say(f"seen: target met: {operation['result']['target_met']}")
    switched = run.follow(SECTION, r"/api/model/switch").json()
    system.wait_until_served(switched["version"], "edge_optimized")


def _edges(system: DrillSystem) -> list[int]:
    pids = [pid for n in (1, 2) for pid in with_words(supervisor(system.home), "--device-id", f"edge-{n}")]
    # An edge that an earlier drill restarted is no descendant of the supervisor.
    return pids + [int(file.read_text()) for file in (system.home / "run").glob("edge-*.pid")]


class _LoadControl:
    """Adjusts the number of busy processes until the edges are slow but can still be scraped: machines differ."""

    def __init__(self, busy: BusyProcesses) -> None:
        self._busy, self._last_s = busy, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last_s < ADJUST_S:
            return
        self._last_s = time.monotonic()
        p95_ms = _p95_ms()
        if p95_ms is None and len(self._busy) > FIRST:
            self._busy.end(STEP)
        elif p95_ms is not None and p95_ms < TARGET_P95_MS and len(self._busy) < MOST:
            self._busy.start(STEP)


def _measured_anew(run: StageRun, what: str) -> float:
    """The p95 in milliseconds over a window that begins now."""
    since_s = time.monotonic()
    p95_ms: float = run.check(what, lambda: time.monotonic() - since_s > WINDOW_S and _p95_ms())
    return p95_ms


def _p95_ms() -> float | None:
    """The p95 of the slower edge in the last seconds; None if neither was scraped or had a request."""
    vector = query(P95)
    return 1000 * float(vector[0]["value"][1]) if vector else None


DRILL = Drill(
    "high-latency",
    "the edges' core is crowded while the heavier variant serves",
    (Stage("", ALERT, play),),
)
