"""The privacy budget is spent in the middle of a run; training stops, and a new budget period lets it continue."""

from __future__ import annotations

from fedvit.errors import DrillError
from fedvit.incidents.drills.drill import Drill, ExpectedAlert, Stage, StageRun
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.round_cost import round_event, round_noise_multiplier

SECTION = "4. Privacy Budget Exhausted"
ROUNDS = 20
REMAINING = 0.1
"""The remaining epsilon at which the alert fires."""


def play(run: StageRun) -> None:
    """Grant a budget for ``ROUNDS`` rounds, wait until it is spent, and follow the runbook."""
    system = run.system
    settings = system.read_settings()
    event = round_event(settings, round_noise_multiplier(settings))
    # Half a round more, so that no rounding makes it one less.
    epsilon = epsilon_pld({event: ROUNDS}, settings.privacy.target_delta) * (1 + 1 / (4 * ROUNDS))
    budget = system.post(
        "/api/privacy/reset-budget",
        "admin",
        new_epsilon=epsilon,
        justification="A drill: a budget for a few rounds, which they will exhaust.",
    )
    if epsilon <= REMAINING:
        raise DrillError(f"A budget of {epsilon:.4f} is too small before anything is spent.")
    run.inject(f"a budget of epsilon {epsilon:.4f}, which is {ROUNDS} rounds")
    run.detect()
    ended = system.wait_for_training(lambda now: now["status"] == "budget_exhausted", "the budget ends the run")
    run.say(f"seen: {ended['message']}")
    spent = run.follow(SECTION, r"/api/privacy/budget\" \| jq$").json()
    run.check("not more was spent than granted", lambda: spent["epsilon_spent"] <= epsilon)
    run.follow(SECTION, r"history\?hours=24")
    run.follow(SECTION, r"PrivacyAccountant")
    run.follow(SECTION, r"/api/training/stop")
    run.follow(SECTION, r"Approved by the privacy officer", admin_token=system.tokens["admin"])
    new = system.get("/api/privacy/budget")
    run.check("a new period", lambda: (new["period"], new["target_epsilon"]) == (budget["period"] + 1, 1.0))
    run.follow(SECTION, r"/api/training/start")
    system.wait_for_training(
        lambda now: now["status"] == "running" and now["rounds_done"] >= 1, "rounds are committed again"
    )
    run.clear()


DRILL = Drill(
    "budget-exhausted",
    f"a budget for {ROUNDS} rounds is spent",
    (Stage("", ExpectedAlert("PrivacyBudgetExhausted"), play),),
)
