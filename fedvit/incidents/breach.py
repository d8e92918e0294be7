"""Response to a privacy breach: containment, evidence, and a report of what was and was not done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from fedvit.api.choices import ImmediateAction
from fedvit.config import Settings
from fedvit.errors import ConflictError, FedvitError, PlacementError
from fedvit.incidents.forensics import NOT_TOLD_APART, bundle_path, write_bundle
from fedvit.ports import AggregatorPort
from fedvit.registry.contributions import last_release_without, versions_of_secure_sums
from fedvit.store.store import Store
from fedvit.types import LedgerFreeze, RunStatus

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")
# Shares of the time limit; the rest is for the bundle.
_STOP_SHARE, _ROLLBACK_SHARE = 1 / 6, 1 / 3

FORENSIC_BUNDLE = "forensic_bundle"


@dataclass(frozen=True, slots=True)
class Breach:
    """A reported breach. ``affected_clients`` need not be registered; ``incident_id`` is any text."""

    incident_id: str
    breach_type: str
    affected_clients: tuple[str, ...]
    reported_by: str
    at: datetime
    roll_back: bool = False
    description: str | None = None


@dataclass(frozen=True, slots=True)
class ActionTaken:
    """An action, whether it was done, and its result or error."""

    action: str
    done: bool
    detail: str


@dataclass(frozen=True, slots=True)
class BreachReport:
    """The result of a response. ``rolled_back_to`` is the version whose content is served again."""

    actions: tuple[ActionTaken, ...]
    quarantined: tuple[str, ...]
    unknown_clients: tuple[str, ...]
    revoked_tokens: tuple[str, ...]
    rolled_back_to: str | None
    ledger_frozen: bool
    forensic_bundle: Path
    forensic_sha256: str | None


class BreachResponse:
    """The response to one breach. Repeating it is harmless and writes another bundle.

    Args:
        breach: the reported breach.
        store: the store of the running system.
        settings: the settings of the running system.
        aggregator: called for each use; it may be down.
        limit_s: seconds until the report is due; an action that takes longer continues and is reported as not done.
    """

    def __init__(
        self,
        breach: Breach,
        *,
        store: Store,
        settings: Settings,
        aggregator: Callable[[], AggregatorPort],
        limit_s: float,
    ) -> None:
        self._breach = breach
        self._store = store
        self._settings = settings
        self._aggregator = aggregator
        self._limit_s = limit_s
        self._due_s = time.monotonic() + limit_s
        self._actions: list[ActionTaken] = []
        self._quarantined: list[str] = []
        self._revoked: list[str] = []
        self._rolled_back_to: str | None = None
        self._bundle = bundle_path(store.home, breach.incident_id, breach.at)
        self._bundle_sha256: str | None = None

    def run(self) -> BreachReport:
        """Take every action in this order; a failure is reported and does not prevent the next action.

        Freeze the ledger (nothing can be charged, so nothing can be released); stop training; quarantine the clients;
        revoke the tokens bound to them; if requested, roll back to the last release that they did not contribute to;
        write the forensic bundle.
        """
        frozen = self._take(ImmediateAction.FREEZE_LEDGER, self._freeze)
        self._take(ImmediateAction.STOP_TRAINING, self._stop)
        isolated = self._take(ImmediateAction.ISOLATE_DATA, self._isolate)
        self._take(ImmediateAction.REVOKE_CREDENTIALS, self._revoke)
        if self._breach.roll_back:
            self._take(ImmediateAction.ROLLBACK_MODEL, self._roll_back)
        self._take(FORENSIC_BUNDLE, self._collect)
        unknown = set(self._breach.affected_clients).difference(self._quarantined) if isolated else set()
        return BreachReport(
            actions=tuple(self._actions),
            quarantined=tuple(self._quarantined),
            unknown_clients=tuple(sorted(unknown)),
            revoked_tokens=tuple(self._revoked),
            rolled_back_to=self._rolled_back_to,
            ledger_frozen=frozen,
            forensic_bundle=self._bundle,
            forensic_sha256=self._bundle_sha256,
        )

    def _take(self, action: str, work: Callable[[], str]) -> bool:
        try:
            taken = ActionTaken(action, True, work())
        except Exception as error:  # Any error: the next action must be taken.
            _LOG.exception("incident %s: %s", self._breach.incident_id, action)
            message = str(error) if isinstance(error, FedvitError) else f"{type(error).__name__}: {error}"
            taken = ActionTaken(action, False, message)
        self._actions.append(taken)
        return taken.done

    def _freeze(self) -> str:
        breach = self._breach
        reason = breach.breach_type + (f": {breach.description}" if breach.description else "")
        first = self._store.ledger.freeze(LedgerFreeze(breach.incident_id, reason, breach.reported_by, breach.at))
        detail = "Nothing can be charged and no trained version released until POST /api/emergency/stand-down."
        if first.incident_id == breach.incident_id:
            return detail
        return f"{detail} Incident {first.incident_id} froze it before; both must be stood down."

    def _stop(self) -> str:
        progress = self._in_time(_STOP_SHARE, lambda: self._aggregator().stop_training())
        if progress.status is not RunStatus.RUNNING:
            return "Training rests."
        return (
            "Training ends after the round under way. That round is discarded if one of the clients takes part in it, "
            "and nothing of it is released."
        )

    def _isolate(self) -> str:
        breach = self._breach
        reason = f"incident {breach.incident_id}: {breach.breach_type}"
        self._quarantined = self._store.clients.quarantine(breach.affected_clients, reason, breach.at)
        return (
            f"{len(self._quarantined)} clients are in quarantine: they get no task, and with "
            "their tokens revoked no release. Only POST /api/clients/{client_id}/reinstate lifts it."
        )

    def _revoke(self) -> str:
        affected = set(self._breach.affected_clients)
        for token in self._store.tokens.all():
            if token.client_id in affected:
                self._store.tokens.revoke(token.token_id, self._breach.at)
                self._revoked.append(token.token_id)
        return f"{len(self._revoked)} tokens are bound to them and revoked. Tokens bound to no client stay good."

    def _roll_back(self) -> str:
        """Avoid the clients that are quarantined for other incidents, too: their contributions must not return."""
        avoided = {*self._breach.affected_clients, *self._store.clients.quarantined()}
        current = self._store.releases.current()
        if current is None:
            raise ConflictError("Nothing is released, so nothing was rolled back.")
        clean = last_release_without(self._store, avoided)
        if clean is None:
            raise ConflictError(
                f"There is no release without them: they contributed to every one, and {current.version} still serves."
            )
        if clean.version == current.version:
            self._rolled_back_to = self._store.versions.get(current.version).lineage.get("rollback_of")
            return f"{current.version} serves, and none of them contributed to it."
        reason = f"incident {self._breach.incident_id}"
        version = self._in_time(
            _ROLLBACK_SHARE, lambda: self._aggregator().rollback(clean.version, force=True, reason=reason)
        )
        self._rolled_back_to = clean.version
        return (
            f"The content of {clean.version} serves again, as {version}. Training would go on from the old run's "
            "weights: after the incident, POST /api/model/retrain begins another run."
        )

    def _collect(self) -> str:
        incident = asdict(self._breach) | {"actions": [asdict(taken) for taken in self._actions]}
        self._bundle_sha256 = self._in_time(
            1.0, lambda: write_bundle(self._store, self._settings, self._bundle, incident)
        )
        detail = f"Audit trail, ledger, lineage, clients, tokens and settings are in {self._bundle}."
        secure = len(versions_of_secure_sums(self._store))
        return f"{detail} {secure} versions were {NOT_TOLD_APART}" if secure else detail

    def _in_time(self, share: float, call: Callable[[], _Result]) -> _Result:
        """The result of ``call``, within a share of the time limit.

        Raises:
            PlacementError: it takes longer; the call continues.
        """
        limit_s = min(share * self._limit_s, self._due_s - time.monotonic())
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="incident")
        future = pool.submit(call)
        pool.shutdown(wait=False)
        try:
            return future.result(limit_s)
        except TimeoutError:
            raise PlacementError(
                f"Not done within {limit_s:.1f} s; it may still be.",
                cure="Report the incident again: that is harmless.",
            ) from None
