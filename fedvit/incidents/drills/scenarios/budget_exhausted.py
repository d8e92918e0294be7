"""The privacy budget ends in the middle of a run: training rests by itself, and a new period lets it go on."""

from __future__ import annotations

from fedvit.errors import DrillError
from fedvit.incidents.drills.alerts import Alert
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import Drill, Stage
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.round_cost import round_event, round_noise_multiplier

SECTION = "4. Privacy Budget Exhausted"
ROUNDS = 20
ENOUGH = 0.1
"""What is left when the alert fires."""


def play(course: Course) -> None:
    """Grant a budget for so many rounds, and let them be trained."""
    site = course.site
    settings = site.read_settings()
    a_round = round_event(settings, round_noise_multiplier(settings))
    # Half a round more, so that no rounding makes it one less.
    epsilon = epsilon_pld({a_round: ROUNDS}, settings.privacy.target_delta) * (1 + 1 / (4 * ROUNDS))
    told = site.post(
        "/api/privacy/reset-budget",
        "admin",
        new_epsilon=epsilon,
        justification="A drill: a budget for a few rounds, which they will exhaust.",
    )
    if epsilon <= ENOUGH:
        raise DrillError(f"A budget of {epsilon:.4f} is too small before anything is spent.")
    course.inject(f"a budget of epsilon {epsilon:.4f}, which is {ROUNDS} rounds")
    course.detect()
    ended = site.training(lambda now: now["status"] == "budget_exhausted", "the budget ends the run")
    course.say(f"seen: {ended['message']}")
    spent = course.follow(SECTION, r"/api/privacy/budget\" \| jq$").json()
    course.check("not more was spent than granted", lambda: spent["epsilon_spent"] <= epsilon)
    course.follow(SECTION, r"history\?hours=24")
    course.follow(SECTION, r"PrivacyAccountant")
    course.follow(SECTION, r"/api/training/stop")
    course.follow(SECTION, r"Approved by the privacy officer", admin_token=site.tokens["admin"])
    found = site.get("/api/privacy/budget")
    course.check("a new period", lambda: (found["period"], found["target_epsilon"]) == (told["period"] + 1, 1.0))
    course.follow(SECTION, r"/api/training/start")
    site.training(lambda now: now["status"] == "running" and now["rounds_done"] >= 1, "rounds are committed again")
    course.clear()


DRILL = Drill(
    "budget-exhausted",
    f"a budget for {ROUNDS} rounds is spent",
    (Stage("", Alert("PrivacyBudgetExhausted"), play),),
)
