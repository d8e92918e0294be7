"""What is done about an alert without a person: proposed always, taken where the settings allow it, and never twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from urllib.parse import quote

from fedvit.api.incidents import RemediationOutcome
from fedvit.config import RemediationConfig, Settings
from fedvit.incidents.playbook import DEVICE, Call, Step, client_of, play_of
from fedvit.rounds.steering import round_settings
from fedvit.store.records import FiredAlert, LoggedAlert, Remediation, RemediationState
from fedvit.store.store import Store
from fedvit.types import RemediationAction

HOUR = timedelta(hours=1)
_COOLDOWN, _CAP = "cooldown: ", "cap: "
_FOR_ALL = (_COOLDOWN, _CAP)


@dataclass(frozen=True, slots=True)
class Order:
    """A remediation that was taken on, and the call that it consists of."""

    claimed: Remediation
    call: Call

    @property
    def path(self) -> str:
        """The path, with the client in its place."""
        return self.call.path.format(client_id=quote(self.claimed.target or "", safe=""))

    @property
    def key(self) -> str:
        """The same for the same firing, so that not even a second call would act twice."""
        claimed = self.claimed
        return f"{claimed.fingerprint}:{claimed.starts_at.isoformat()}:{claimed.action}"


@dataclass(frozen=True, slots=True)
class Proposal:
    """One step of the runbook for one incident.

    ``automatic`` says whether the system may take it by itself, or ever might; ``taken`` what became of that.
    """

    step: Step
    section: str
    target: str | None
    automatic: Literal["allowed", "not_allowed", "never"]
    taken: Remediation | None

    @property
    def command(self) -> str:
        """What an operator types, with the client in its place where one is known."""
        return self.step.command if self.target is None else self.step.command.replace(DEVICE, self.target)


def orders(store: Store, settings: Settings, incident_id: str, at: datetime) -> list[Order]:
    """Take on what may be done now about the alerts of an incident that still fire.

    Each is claimed before it is done: whoever asks again, or at the same time, gets nothing.
    """
    found: list[Order] = []
    exhausted: set[RemediationAction] = set()
    for logged in store.incidents.alerts(incident_id):
        for step in play_of(logged.alert.alertname).steps if logged.alert.ends_at is None else ():
            action, call = step.action, step.call
            if action is None or call is None or action not in settings.remediation.allow or action in exhausted:
                continue
            claimed = _claim(store, settings, logged, action, call, at)
            if claimed is not None and claimed.outcome is RemediationOutcome.BEGUN:
                found.append(Order(claimed, call))
            elif claimed is not None and claimed.detail.startswith(_FOR_ALL):
                # What holds for this alert holds for a thousand others of the same message.
                exhausted.add(action)
    return found


def proposals(
    config: RemediationConfig, alertname: str, alerts: Sequence[FiredAlert], taken: Sequence[Remediation]
) -> list[Proposal]:
    """Every step that the runbook knows for these alerts; one about a client appears once a client."""
    play, known = play_of(alertname), {(one.action, one.target): one for one in taken}
    found = []
    for step in play.steps:
        for target in _targets(step, alerts):
            action = step.action
            automatic: Literal["allowed", "not_allowed", "never"] = "never"
            if action is not None:
                automatic = "allowed" if action in config.allow else "not_allowed"
            done = known.get((action, target)) if action is not None else None
            found.append(Proposal(step, play.section, target, automatic, done))
    return found


def why_withheld(
    config: RemediationConfig, action: RemediationAction, target: str | None, at: datetime, state: RemediationState
) -> str | None:
    """Why an action may not be taken now, or None."""
    if action is RemediationAction.REMOVE_CLIENT and target is None:
        return "the alert names no client"
    if action is RemediationAction.REMOVE_CLIENT and not state.target_active:
        return f"{target} is no active client"
    last = max((one.at for one in state.attempted if one.action is action), default=None)
    if last is not None and at < last + timedelta(seconds=config.cooldown_s):
        return f"{_COOLDOWN}{action} was taken less than {config.cooldown_s:g} s before"
    if sum(one.at > at - HOUR for one in state.attempted) >= config.max_actions_per_hour:
        return f"{_CAP}{config.max_actions_per_hour} actions were taken within the hour"
    return _too_many_left_out(config, action, state)


def _too_many_left_out(config: RemediationConfig, action: RemediationAction, state: RemediationState) -> str | None:
    out, of = 0, state.active
    if action is RemediationAction.REMOVE_CLIENT:
        # Those before it count, however long ago: else it would only take longer.
        out, of = state.removed + 1, state.fleet
    if action is RemediationAction.RESTART_VALIDATED_ONLY:
        out = state.unvalidated
    if out > config.max_client_share * of:
        return f"{_CAP}it would leave out {out} of {of} clients, more than a share of {config.max_client_share:g}"
    return None


def _claim(
    store: Store, settings: Settings, logged: LoggedAlert, action: RemediationAction, call: Call, at: datetime
) -> Remediation | None:
    alert = logged.alert
    target = client_of(alert.labels) if call.about_a_client else None
    needless = _why_needless(store, settings, action, call)
    remediation = Remediation(logged.incident_id, alert.fingerprint, alert.starts_at, action, target, at)
    with store.transaction() as transaction:
        state = transaction.remediations.state(target)
        reason = needless or why_withheld(settings.remediation, action, target, at, state)
        return transaction.remediations.claim(remediation, reason)


def _why_needless(store: Store, settings: Settings, action: RemediationAction, call: Call) -> str | None:
    """A small fleet asks for fewer clients than the runbook's number, which would then stop its training."""
    wanted = (call.body or {}).get("min_clients")
    if action is not RemediationAction.FEWER_CLIENTS or wanted is None:
        return None
    present = round_settings(store, settings).min_clients
    return None if present > wanted else f"min_clients is {present}, not above {wanted}"


def _targets(step: Step, alerts: Sequence[FiredAlert]) -> list[str | None]:
    if step.call is None or not step.call.about_a_client:
        return [None]
    return list(dict.fromkeys(client_of(alert.labels) for alert in alerts)) or [None]
