"""A quarter of the clients trains on wrong labels and inverts its updates; the loss recovers without them."""

from __future__ import annotations

from typing import Any

from fedvit.errors import DrillError
from fedvit.incidents.drills.drill import Drill, ExpectedAlert, Stage, StageRun
from fedvit.store.store import Store
from fedvit.tools.simulation.rehearsal import activate_faults, faulty_clients

SECTION = "2. High Training Loss"
THRESHOLD = 2.0
"""The loss above which the alert fires."""
WITHIN_ROUNDS = 2
# Little noise and the demo's learning rate, so that the model learns.
SETTINGS = {
    "FEDVIT_PRIVACY__NOISE_MULTIPLIER": "2",
    "FEDVIT_PRIVACY__TARGET_EPSILON": "200",
    "FEDVIT_TRAINING__LEARNING_RATE": "2",
    "FEDVIT_TRAINING__ROUNDS": "400",
    "FEDVIT_DRILL__FAULTS": "[{share: 0.25, kinds: [label_flip, sign_flip, scale], factor: 10}]",
}


def play(run: StageRun) -> None:
    """Activate the faulty clients, identify them, and train without them."""
    system = run.system
    poisoned = list(faulty_clients(system.read_settings()))
    run.inject(f"{', '.join(poisoned)} poison the model")
    activate_faults(system.home)
    run.detect(within_s=400)
    loss = run.follow(SECTION, r"query=fed_vit_autorl_training_loss").json()["data"]["result"][0]["value"][1]
    named = run.check("data-quality names the poisoned clients", lambda: _named(run, poisoned))
    run.follow(SECTION, r"data-drift")
    run.follow(SECTION, r"clients/status")
    outcome = run.follow(SECTION, r"validated_only")
    run_id = system.operation(outcome)["result"]["run_id"]
    losses = run.check(f"{WITHIN_ROUNDS} rounds of {run_id}", lambda: _losses(run, run_id, poisoned))
    if min(losses) >= THRESHOLD:
        raise DrillError(f"The loss is {losses} after {WITHIN_ROUNDS} rounds without the poisoned clients.")
    later = ", ".join(f"{loss:.2f}" for loss in losses)
    run.notes.append(f"data-quality named {', '.join(named)}; loss {float(loss):.2f}, then {later} without them")
    run.clear()


def _named(run: StageRun, poisoned: list[str]) -> list[str] | None:
    """The clients below the quality threshold, after they include all poisoned ones and none is validated."""
    quality: dict[str, Any] = run.system.get("/api/clients/data-quality")
    below = [
        client["client_id"]
        for client in quality["clients"]
        if client["score"] is not None and client["score"] < quality["threshold"] and not client["validated"]
    ]
    return sorted(below) if set(poisoned) <= set(below) else None


def _losses(run: StageRun, run_id: str, poisoned: list[str]) -> list[float] | None:
    """The loss after each of the run's first rounds; none may contain a poisoned client."""
    with Store.open(run.system.home) as store:
        rounds = [record for record in store.rounds.of_run(run_id) if record.committed][:WITHIN_ROUNDS]
    if joined := sorted({client for record in rounds for client in record.cohort}.intersection(poisoned)):
        raise DrillError(f"{', '.join(joined)} took part in {run_id}, which was to draw validated clients only.")
    losses = [record.loss for record in rounds if record.loss is not None]
    return losses if len(losses) == WITHIN_ROUNDS else None


DRILL = Drill(
    "high-loss",
    "poisoned clients with corrupted labels",
    (Stage("", ExpectedAlert("HighTrainingLoss"), play),),
    settings=SETTINGS,
    rehearsal=True,
)
