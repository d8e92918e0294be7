"""Every route against its own OpenAPI document: all checks of schemathesis, links followed, no network.

``make fuzz`` takes 200 examples an operation (``FUZZ_EXAMPLES``); ``make test`` a few.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from control_system import TARGET, System
from schemathesis.engine import events, from_schema

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.testing.doubles import FakeFleet, PointModel
from fedvit.types import utc_now

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "5"))
UNLIMITED = {"requests_per_s": 1e6, "burst": 10**6, "max_failed_attempts": 10**6}
# A precondition that fails is an answer to a well-formed request.
ACCEPTED = ["2xx", "401", "403", "404", "409", "412", "429"]
# No schema can say what a justification is.
JUSTIFIED = ["/api/privacy/reset-budget"]
# Deleting ends an operation, or takes a client out of the active list; the record of both remains, as documented.
KEPT_RECORDS = ["/api/operations/{operation_id}", "/api/clients/{client_id}"]


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    built = System(tmp_path / "home", PointModel(TARGET), FakeFleet(TARGET), {}, 50.0, {"mode": "tokens", **UNLIMITED})
    yield built
    built.close()


def configuration(token: str) -> schemathesis.Config:
    return schemathesis.Config.from_dict(
        {
            "headers": {"Authorization": f"Bearer {token}"},
            "generation": {"max-examples": EXAMPLES, "database": "none"},
            "continue-on-failure": True,
            "checks": {"positive_data_acceptance": {"expected-statuses": ACCEPTED}},
            "operations": [
                {
                    "include-path": KEPT_RECORDS,
                    "include-method": "GET",
                    "checks": {"use_after_free": {"enabled": False}},
                },
                {
                    "include-path": JUSTIFIED,
                    "checks": {"positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "422"]}},
                },
            ],
        }
    )


@dataclass
class Findings:
    """What a campaign saw."""

    examples: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)

    def take(self, event: Any) -> None:
        """Note what an event of the engine tells."""
        match event:
            case events.ScenarioFinished():
                for case_id, node in event.recorder.cases.items():
                    self.examples[node.value.operation.label] += 1
                    self.phases[event.phase.value] += 1
                    self._take_checks(event.recorder, case_id)
            case events.NonFatalError() | events.FatalError():
                error = getattr(event, "value", None) or getattr(event, "exception", None)
                self.faults["error", str(getattr(event, "label", ""))] = repr(error)

    def _take_checks(self, recorder: Any, case_id: str) -> None:
        for check in recorder.checks.get(case_id, ()):
            self.checks[check.name] += 1
            if check.failure_info is not None:
                label = recorder.cases[case_id].value.operation.label
                failure = check.failure_info.failure
                self.faults.setdefault(
                    (check.name, label),
                    f"{failure.title}: {failure.message}\n{check.failure_info.code_sample}\n"
                    f"answered: {_answered(recorder, case_id)}",
                )


def _answered(recorder: Any, case_id: str) -> str:
    result = recorder.find_response(case_id=case_id)
    return f"{result.status_code} {result.text[:1000]}" if result else "nothing"


def test_every_route_keeps_to_its_document(system: System) -> None:
    everything = [Scope.ADMIN, Scope.EMERGENCY, Scope.RELEASES]
    token = create_token(system.store, "fuzzer", everything, now=utc_now()).text
    system.http.headers["Authorization"] = f"Bearer {token}"
    system.trained()
    headers = {"Authorization": f"Bearer {token}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", system.api, config=configuration(token), headers=headers)
    findings = Findings()
    for event in from_schema(schema).execute():
        findings.take(event)
    print(
        f"{len(findings.examples)} operations, {findings.examples.total()} examples {dict(findings.phases)}, "
        f"fewest {min(findings.examples.values())}, {findings.checks.total()} checks of {len(findings.checks)} kinds"
    )
    assert not findings.faults, "\n\n".join(f"{where}: {what}" for where, what in findings.faults.items())
    documented = [(path, verb) for path, verbs in system.api.openapi()["paths"].items() for verb in verbs]
    assert len(findings.examples) == len(documented)
    assert findings.phases["stateful"] > 0
    assert {"ignored_auth", "use_after_free", "not_a_server_error"} <= set(findings.checks)
    assert system.store.audit.verify() > 0
    system.store.ledger.verify()
