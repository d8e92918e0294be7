"""Audit facts of a request: bounded, JSON, and without secrets; and a quota for the callers that do not operate."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request

from fedvit.access.identity import Identity
from fedvit.access.limits import TokenBuckets
from fedvit.clock import SYSTEM_CLOCK
from fedvit.ports import ClockPort
from fedvit.store.records import AuditFacts
from fedvit.store.store import Store
from serve_apps.control.http.access import AuditNote
from serve_apps.logs import redact

MAX_TEXT = 500
MAX_ITEMS = 50
MAX_DEPTH = 8
MAX_BYTES = 8_192
_SECRET_NAME = re.compile(r"secret|token|passw|authori[sz]ation|credential|private|api_?key", re.IGNORECASE)
_HIDDEN = "[redacted]"
LINES_AT_ONCE = 30
LINES_PER_S = 1 / 60
MAX_MERGED = 1_000
_OTHERS = "several actors"


@dataclass(slots=True)
class _Merged:
    """Calls of one actor that have no line of their own; ``last`` is the newest."""

    last: AuditFacts
    statuses: Counter[str] = field(default_factory=Counter)


class AuditQuota:
    """Writes the audit trail, and bounds what devices, alert senders and viewers can add to it.

    Such an actor has :data:`LINES_AT_ONCE` lines at once, and :data:`LINES_PER_S` in the long run. Further calls are
    counted and merged into one line, which is written when the actor has a line again, and at the end. Every call of an
    operator has a line of its own.
    """

    def __init__(self, store: Store, clock: ClockPort = SYSTEM_CLOCK) -> None:
        self._store = store
        self._buckets = TokenBuckets(LINES_PER_S, LINES_AT_ONCE, clock.monotonic)
        self._lock = threading.Lock()
        self._merged: dict[str, _Merged] = {}

    def append(self, facts: AuditFacts, identity: Identity) -> None:
        """Write a line, or count the call.

        Raises:
            IntegrityError: the end of the trail is not where it was left.
        """
        if identity.operates or self._buckets.take(facts.actor) == 0:
            self._store.audit.append(facts)
        else:
            self._merge(facts, Counter([f"{facts.action} {facts.status}"]))

    def flush(self, *, last: bool = False) -> None:
        """Write the merged lines that are due; all of them where this is the ``last`` call."""
        with self._lock:
            actors = list(self._merged)
        for actor in actors:
            if last or self._buckets.take(actor) == 0:
                with self._lock:
                    merged = self._merged.pop(actor)
                counted = {"merged": merged.statuses.total(), "calls": dict(merged.statuses.most_common(MAX_ITEMS))}
                try:
                    self._store.audit.append(replace(merged.last, params=counted, before=None, after=None))
                except Exception:
                    self._merge(merged.last, merged.statuses)
                    raise

    def _merge(self, last: AuditFacts, statuses: Counter[str]) -> None:
        with self._lock:
            # Beyond so many actors, which no honest fleet has, it is no longer known who it was.
            known = last.actor in self._merged or len(self._merged) < MAX_MERGED
            actor = last.actor if known else _OTHERS
            merged = self._merged.setdefault(actor, _Merged(last))
            merged.last = replace(last, actor=actor)
            merged.statuses += statuses


def facts_of(
    request: Request, action: str, identity: Identity, source: str, body: Any, note: AuditNote, status: int
) -> AuditFacts:
    """One line of the trail for one mutating call that was answered with ``status``."""
    params = {"path": dict(request.path_params), "query": dict(request.query_params), "body": body}
    return AuditFacts(
        actor=identity.actor,
        scopes=tuple(sorted(identity.scopes)) if identity.authenticated else (),
        source=source,
        request_id=request.state.request_id,
        action=action,
        params=bounded({name: value for name, value in params.items() if value}),
        before=bounded(note.before),
        after=bounded(note.after),
        status=status,
    )


def bounded(value: Any) -> Any:
    """The value as JSON of at most :data:`MAX_BYTES`, with secrets blotted out and what is too long cut."""
    small = _bounded(value, MAX_DEPTH)
    size = len(json.dumps(small))
    return small if size <= MAX_BYTES else {"omitted": f"{size} bytes"}


def _bounded(value: Any, depth: int) -> Any:
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return _bounded_object(value, depth) if depth else "…"
        case list() | tuple() | set() | frozenset():
            return [_bounded(item, depth - 1) for item in list(value)[:MAX_ITEMS]] if depth else "…"
    # Lone surrogates are legal in JSON and in no database.
    text = redact(str(value)).encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def _bounded_object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    return {
        _bounded(str(name)[:MAX_TEXT], 1): _HIDDEN if _SECRET_NAME.search(str(name)) else _bounded(item, depth - 1)
        for name, item in list(value.items())[:MAX_ITEMS]
    }
