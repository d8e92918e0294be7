"""A quarter of the clients learns wrong labels and turns its updates round; without them the loss is back at once."""

from __future__ import annotations

from typing import Any

from fedvit.errors import DrillError
from fedvit.incidents.drills.alerts import Alert
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import Drill, Stage
from fedvit.store.store import Store
from fedvit.tools.simulation.rehearsal import begin_lying, faulty_clients

SECTION = "2. High Training Loss"
THRESHOLD = 2.0
"""Of the alert."""
WITHIN_ROUNDS = 2
# It learns for real: little noise, and the demo's step.
SETTINGS = {
    "FEDVIT_PRIVACY__NOISE_MULTIPLIER": "2",
    "FEDVIT_PRIVACY__TARGET_EPSILON": "200",
    "FEDVIT_TRAINING__LEARNING_RATE": "2",
    "FEDVIT_TRAINING__ROUNDS": "400",
    "FEDVIT_DRILL__FAULTS": "[{share: 0.25, kinds: [label_flip, sign_flip, scale], factor: 10}]",
}


def play(course: Course) -> None:
    """Let them lie, find them, and train without them."""
    site = course.site
    poisoned = list(faulty_clients(site.read_settings()))
    course.inject(f"{', '.join(poisoned)} poison the model")
    begin_lying(site.home)
    course.detect(within_s=400)
    loss = course.follow(SECTION, r"query=fed_vit_autorl_training_loss").json()["data"]["result"][0]["value"][1]
    named = course.check("data-quality names the poisoned clients", lambda: _named(course, poisoned))
    course.follow(SECTION, r"data-drift")
    course.follow(SECTION, r"clients/status")
    outcome = course.follow(SECTION, r"validated_only")
    run_id = site.operation(outcome)["result"]["run_id"]
    losses = course.check(f"{WITHIN_ROUNDS} rounds of {run_id}", lambda: _losses(course, run_id, poisoned))
    if min(losses) >= THRESHOLD:
        raise DrillError(f"The loss is {losses} after {WITHIN_ROUNDS} rounds without the poisoned clients.")
    told = ", ".join(f"{loss:.2f}" for loss in losses)
    course.notes.append(f"data-quality named {', '.join(named)}; loss {float(loss):.2f}, then {told} without them")
    course.clear()


def _named(course: Course, poisoned: list[str]) -> list[str] | None:
    """Those that data-quality doubts, once these are all of the poisoned ones and none is validated any more."""
    found: dict[str, Any] = course.site.get("/api/clients/data-quality")
    doubted = [
        client["client_id"]
        for client in found["clients"]
        if client["score"] is not None and client["score"] < found["threshold"] and not client["validated"]
    ]
    return sorted(doubted) if set(poisoned) <= set(doubted) else None


def _losses(course: Course, run_id: str, poisoned: list[str]) -> list[float] | None:
    """The loss after each of the run's first rounds, in none of which a poisoned client took part."""
    with Store.open(course.site.home) as store:
        rounds = [record for record in store.rounds.of_run(run_id) if record.committed][:WITHIN_ROUNDS]
    if joined := sorted({client for record in rounds for client in record.cohort}.intersection(poisoned)):
        raise DrillError(f"{', '.join(joined)} took part in {run_id}, which was to draw validated clients only.")
    losses = [record.loss for record in rounds if record.loss is not None]
    return losses if len(losses) == WITHIN_ROUNDS else None


DRILL = Drill(
    "high-loss",
    "poisoned clients with corrupted labels",
    (Stage("", Alert("HighTrainingLoss"), play),),
    settings=SETTINGS,
    rehearsal=True,
)
