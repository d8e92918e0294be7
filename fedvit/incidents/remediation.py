"""Automatic remediation of alerts: always proposed, taken if the settings allow it, and never taken twice."""

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
    """A claimed remediation and its API call."""

    claimed: Remediation
    call: Call

    @property
    def path(self) -> str:
        """The path of the call, with the client's id."""
        return self.call.path.format(client_id=quote(self.claimed.target or "", safe=""))

    @property
    def key(self) -> str:
        """The idempotency key: equal for equal firings, so that a repeated call has no second effect."""
        claimed = self.claimed
        return f"{claimed.fingerprint}:{claimed.starts_at.isoformat()}:{claimed.action}"


@dataclass(frozen=True, slots=True)
class Proposal:
    """One step of the runbook for one incident.

    ``automatic`` says whether the system may take it without a person; ``taken`` is its remediation, if there is one.
    """

    step: Step
    section: str
    target: str | None
    automatic: Literal["allowed", "not_allowed", "never"]
    taken: Remediation | None

    @property
    def command(self) -> str:
        """The command line, with the client's id if it is known."""
        return self.step.command if self.target is None else self.step.command.replace(DEVICE, self.target)


def orders(store: Store, settings: Settings, incident_id: str, at: datetime) -> list[Order]:
    """Claim the remediations that are allowed now for the firing alerts of an incident.

    A later or concurrent call does not return a claimed remediation again.
    """
    claimed_orders: list[Order] = []
    exhausted: set[RemediationAction] = set()
    for logged in store.incidents.alerts(incident_id):
        for step in play_of(logged.alert.alertname).steps if logged.alert.ends_at is None else ():
            action, call = step.action, step.call
            if action is None or call is None or action not in settings.remediation.allow or action in exhausted:
                continue
            claimed = _claim(store, settings, logged, action, call, at)
            if claimed is not None and claimed.outcome is RemediationOutcome.BEGUN:
                claimed_orders.append(Order(claimed, call))
            elif claimed is not None and claimed.detail.startswith(_FOR_ALL):
                # The limit applies to the action, so to all other alerts, too.
                exhausted.add(action)
    return claimed_orders


def proposals(
    config: RemediationConfig, alertname: str, alerts: Sequence[FiredAlert], taken: Sequence[Remediation]
) -> list[Proposal]:
    """Every step of the runbook for these alerts; a step about a client appears once for each client."""
    play, known = play_of(alertname), {(one.action, one.target): one for one in taken}
    rows = []
    for step in play.steps:
        for target in _targets(step, alerts):
            action = step.action
            automatic: Literal["allowed", "not_allowed", "never"] = "never"
            if action is not None:
                automatic = "allowed" if action in config.allow else "not_allowed"
            done = known.get((action, target)) if action is not None else None
            rows.append(Proposal(step, play.section, target, automatic, done))
    return rows


def why_withheld(
    config: RemediationConfig, action: RemediationAction, target: str | None, at: datetime, state: RemediationState
) -> str | None:
    """The reason why an action may not be taken now, or None."""
    if action is RemediationAction.REMOVE_CLIENT and target is None:
        return "the alert names no client"
    if action is RemediationAction.REMOVE_CLIENT and not state.target_active:
        return f"{target} is no active client"
    last = max((one.at for one in state.attempted if one.action is action), default=None)
    if last is not None and at < last + timedelta(seconds=config.cooldown_s):
        return f"{_COOLDOWN}{action} was taken less than {config.cooldown_s:g} s before"
    if sum(one.at > at - HOUR for one in state.attempted) >= config.max_actions_per_hour:
        return f"{_CAP}{config.max_actions_per_hour} actions were taken within the hour"
    out, of = 0, state.active
    if action is RemediationAction.REMOVE_CLIENT:
        # All earlier removals count, so that time does not lift the limit.
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
    needless, lower = None, (call.body or {}).get("min_clients")
    if action is RemediationAction.FEWER_CLIENTS and lower is not None:
        # A small fleet may already use the runbook's number or less; a higher one would stop its training.
        present = round_settings(store, settings).min_clients
        needless = None if present > lower else f"min_clients is {present}, not above {lower}"
    remediation = Remediation(logged.incident_id, alert.fingerprint, alert.starts_at, action, target, at)
    with store.transaction() as transaction:
        state = transaction.remediations.state(target)
        reason = needless or why_withheld(settings.remediation, action, target, at, state)
        return transaction.remediations.claim(remediation, reason)


def _targets(step: Step, alerts: Sequence[FiredAlert]) -> list[str | None]:
    if step.call is None or not step.call.about_a_client:
        return [None]
    return list(dict.fromkeys(client_of(alert.labels) for alert in alerts)) or [None]
