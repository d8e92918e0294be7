"""Attacks by registering: a device that claims more examples than it has, registers again and again, or floods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from httpx import Response

from fedvit.access.tokens import create_token
from fedvit.errors import ConflictError, DataError
from fedvit.privacy.round_cost import check_units
from fedvit.store.records import RegistrationQuota
from fedvit.store.store import Store
from fedvit.testing.doubles import seeded_fleet
from fedvit.types import MAX_EXAMPLES, Client, ClientKind, utc_now
from tests.attack.table import AttackTable
from tests.scoped_api import ScopedApi

SUBJECT = "enrolment"
TRUCK = "truck-7"


class Depot(ScopedApi):
    """A control API that demands tokens, and a truck with a token that is bound to it."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, mode="tokens", requests_per_s=1e6, burst=10**6)
        self._token = create_token(self.store, TRUCK, ["device"], now=utc_now(), client_id=TRUCK).text

    def register(self, num_examples: int, **body: Any) -> Response:
        """As the truck itself."""
        body = {"device_id": TRUCK, "num_examples": num_examples, "capabilities": {"training": {}}} | body
        headers = {"Authorization": f"Bearer {self._token}"}
        return self.client.post("/api/clients/register", json=body, headers=headers)

    def validate(self, **body: Any) -> None:
        answer = self.ask("POST", f"/api/clients/{TRUCK}/validate", "operator", json={"validated": True, **body})
        assert answer.status_code == 200, answer.text

    def is_eligible(self) -> bool:
        self.store.clients.set_last_seen({TRUCK: utc_now()})
        return TRUCK in self.store.clients.eligible_at(range(10), heard_since=utc_now().replace(year=2000)).values()

    def condition(self) -> str:
        conditions = self.ask("GET", f"/api/clients/{TRUCK}", "operator").json()["conditions"]
        return next(str(item["reason"]) for item in conditions if item["type"] == "Admitted")


@pytest.fixture
def depot(tmp_path: Path) -> Iterator[Depot]:
    with Depot(tmp_path) as depot:
        yield depot


def test_a_device_takes_part_when_an_operator_has_admitted_it(depot: Depot) -> None:
    assert depot.register(39).status_code == 201
    assert (depot.is_eligible(), depot.condition()) == (False, "AwaitsOperator")
    depot.validate()
    assert (depot.is_eligible(), depot.condition()) == (True, "Admitted")
    # What an operator registers is admitted at once.
    other = {"device_id": "truck-8", "num_examples": 50}
    assert depot.ask("POST", "/api/clients/register", "operator", json=other).json()["admitted_examples"] == 50


def test_a_count_inflated_ten_times_takes_no_part(depot: Depot, attack_table: AttackTable) -> None:
    depot.register(39)
    depot.validate()
    assert depot.register(390).status_code == 201
    assert (depot.is_eligible(), depot.condition()) == (False, "TooManyExamples")
    units = depot.store.clients.count_units()
    assert units[1] == sum(client.num_examples for client in seeded_fleet(2))
    # An honest vehicle with new images: an operator leaves room for them.
    depot.validate(num_examples=400)
    assert depot.is_eligible()
    bound = "it takes no part until an operator admits the number"
    attack_table.add(SUBJECT, "an example count inflated ten times", achieved="not drawn", bound=bound)


@pytest.mark.parametrize("count", [200_000, MAX_EXAMPLES])
def test_a_claim_does_not_stop_training(depot: Depot, count: int, attack_table: AttackTable) -> None:
    """``target_delta`` must be below one over the records, and the claims of devices do not count as records."""
    before = depot.store.clients.count_units()
    assert depot.register(count).status_code == 201
    assert depot.store.clients.count_units() == before
    check_units(depot.settings, *depot.store.clients.count_units())
    achieved = f"{depot.store.clients.count_units()[1]} records counted, as before"
    attack_table.add(SUBJECT, f"a claim of {count} examples", achieved=achieved, bound="starts are not refused")


def test_the_largest_claims_of_a_large_fleet_overflow_nothing(tmp_path: Path, attack_table: AttackTable) -> None:
    with Store.open(tmp_path) as store:
        fleet = [Client(f"truck-{i}", ClientKind.REMOTE, MAX_EXAMPLES) for i in range(1100)]
        store.clients.register(fleet)
        assert store.clients.count_units() == (1100, 1100 * MAX_EXAMPLES)
        for count in (MAX_EXAMPLES + 1, 2**53 - 1, -1):
            with pytest.raises(DataError):
                store.clients.register([replace(fleet[0], num_examples=count)])
    attack_table.add(SUBJECT, "1,100 clients of the largest size", achieved="an exact sum", bound="no error")


def test_claims_beyond_the_contract_are_refused(depot: Depot) -> None:
    for count in (MAX_EXAMPLES + 1, 2**53 - 1, 2**63, -1):
        assert depot.register(count).status_code == 422
    assert depot.register(39, capabilities={"training": {"text": "x" * 5000}}).status_code == 422
    assert depot.ask("GET", f"/api/clients/{TRUCK}", "operator").status_code == 404


def test_registering_again_does_not_make_the_state_grow(depot: Depot, full: bool, attack_table: AttackTable) -> None:
    depot.register(39)
    depot.validate()
    audited, calls = len(depot.store.audit.entries(limit=1000)), 2000 if full else 100
    assert {depot.register(39).status_code for _ in range(calls)} == {201}
    assert len(depot.store.audit.entries(limit=1000)) == audited
    quota = depot.settings.fleet.registrations_per_day
    statuses = [depot.register(38 + i % 2).status_code for i in range(calls)]
    assert set(statuses[:quota]) == {201}
    assert set(statuses[quota:]) <= {201, 429}
    grown = len(depot.store.audit.entries(limit=1000)) - audited
    assert grown <= quota
    # The truck itself is not locked out: it can register as it is registered, and an operator can change it.
    assert depot.register(depot.store.clients.get(TRUCK).num_examples).status_code == 201
    body = {"device_id": TRUCK, "num_examples": 45}
    assert depot.ask("POST", "/api/clients/register", "operator", json=body).status_code == 201
    achieved = f"{grown} lines in the audit trail after {calls} changed registrations"
    attack_table.add(SUBJECT, "registering again and again", achieved=achieved, bound=f"{quota} lines a day")


def test_devices_cannot_register_a_fleet_without_end(tmp_path: Path, attack_table: AttackTable) -> None:
    quota = RegistrationQuota(max_clients=5, changes_per_day=1)
    with Store.open(tmp_path) as store:
        store.clients.register(seeded_fleet(3))
        for i in range(5):
            store.clients.enrol(Client(f"truck-{i}", ClientKind.REMOTE, 10), admitted=False, quota=quota)
        with pytest.raises(ConflictError):
            store.clients.enrol(Client("truck-5", ClientKind.REMOTE, 10), admitted=False, quota=quota)
        store.clients.enrol(Client("truck-5", ClientKind.REMOTE, 10), admitted=True)
    attack_table.add(SUBJECT, "registering new ids", achieved="5 of 5 admitted ids", bound="fleet.max_clients")


def test_a_token_registers_its_own_client_only(depot: Depot, attack_table: AttackTable) -> None:
    assert depot.register(39, device_id="truck-8").status_code == 403
    attack_table.add(SUBJECT, "registering another vehicle's id", achieved="403", bound="refused")
