"""Hostile requests, by hand: each is refused, or harmless by design, and none has any effect.

Real bytes to a real server, with either of uvicorn's parsers: a client library would mend half of these requests.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import uvicorn
from control_system import TARGET, System
from hostile_requests import ATTACKS, GOOD, PICKLED, REGISTER, Attack, request
from scoped_api import scoped_token
from sqlalchemy import create_engine, select

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.store.store import Store
from fedvit.store.tables import Base
from fedvit.testing.doubles import FakeFleet, PointModel
from fedvit.types import utc_now

WAIT_S = 20.0
REFUSED = frozenset(range(400, 500))


class Target:
    """A trained system behind a real server, the tokens that attackers hold, and a digest of all that matters."""

    def __init__(self, home: Path, parser: str) -> None:
        access = {"mode": "tokens", "requests_per_s": 1e6, "burst": 10**6, "max_failed_attempts": 10**6}
        self.system = System(home / "home", PointModel(TARGET), FakeFleet(TARGET), {}, 8.0, access)
        self.texts, self.authorization = self._tokens(home)
        self.system.http.headers["Authorization"] = f"Bearer {self.texts['admin']}"
        self.system.trained()
        first = self.system.http.post(
            REGISTER, json={"device_id": "truck-1"}, headers={"Idempotency-Key": "used-before"}
        )
        assert first.status_code == 201
        self._server = uvicorn.Server(
            uvicorn.Config(self.system.api, port=0, http=parser, log_level="critical", lifespan="off")
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self._address = listener.getsockname()
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        self._engine = create_engine(f"sqlite:///{self.system.store.home / 'state.db'}")

    def _tokens(self, home: Path) -> tuple[dict[str, str], dict[str, bytes]]:
        store, now = self.system.store, utc_now()
        texts = {scope.value: scoped_token(store, scope) for scope in Scope}
        past = now - timedelta(days=2)
        texts["expired"] = create_token(store, "old", ["admin"], now=past, lifetime=timedelta(days=1)).text
        revoked = create_token(store, "lost", ["admin"], now=now)
        store.tokens.revoke(revoked.token.token_id, now)
        texts["revoked"] = revoked.text
        with Store.open(home / "elsewhere") as other:
            texts["foreign"] = create_token(other, "admin", ["admin"], now=now).text
        admin = texts["admin"]
        texts["changed"] = admin[:-1] + ("A" if admin[-1] != "A" else "B")
        texts["crossed"] = "_".join((*admin.split("_", 2)[:2], texts["viewer"].split("_", 2)[2]))
        texts["unsigned"] = "eyJhbGciOiJub25lIn0.eyJzY29wZSI6ImFkbWluIiwic3ViIjoicm9vdCJ9."
        texts["endless"] = "fvt_" + "a" * 100_000
        lines = {whom: f"Authorization: Bearer {text}\r\n".encode() for whom, text in texts.items()}
        lines["binary"] = b"Authorization: Bearer \xff\xfe\x80\r\n"
        lines["basic"] = b"Authorization: Basic " + base64.b64encode(b"admin:admin") + b"\r\n"
        lines["twice"] = lines["admin"] * 2
        return texts, lines

    def send(self, attack: Attack) -> bytes:
        """All that the server answers until it hangs up."""
        token = self.authorization[attack.as_whom] if attack.as_whom else b""
        content = attack.content.replace(b"<token>", token).replace(b"<text>", self.texts["admin"].encode())
        answer = b""
        with socket.create_connection(self._address, timeout=WAIT_S) as connection:
            try:
                connection.sendall(content)
                if attack.broken_off:
                    connection.shutdown(socket.SHUT_WR)
                while received := connection.recv(65536):
                    answer += received
            except (BrokenPipeError, ConnectionResetError):
                pass
        return answer

    def digest(self) -> str:
        """Every row of every table but those that record who asked, and every blob."""
        result = hashlib.sha256()
        with self._engine.connect() as connection:
            for table in Base.metadata.sorted_tables:
                columns = [column for column in table.columns if column.name != "last_used_at"]
                if table.name not in ("audit", "idempotency"):
                    rows = connection.execute(select(*columns).order_by(*table.primary_key.columns)).all()
                    result.update(repr((table.name, [row for row in rows if row[0] != "audit_head"])).encode())
        for path in sorted((self.system.store.home / "blobs").rglob("*")):
            result.update(repr((path.name, path.read_bytes() if path.is_file() else None)).encode())
        return result.hexdigest()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        self._engine.dispose()
        self.system.close()


@pytest.fixture(scope="module", params=["h11", "httptools"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    built = Target(tmp_path_factory.mktemp(request.param), request.param)
    yield built
    built.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_hostile_request_is_refused_and_has_no_effect(target: Target, attack: Attack) -> None:
    before = target.digest()
    answer = target.send(attack)
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", answer, re.MULTILINE)]
    allowed = REFUSED | ({200, 201} if attack.harmless else set())
    assert set(statuses) <= allowed, answer[:2000]
    assert statuses or attack.may_hang_up
    assert b"x-injected" not in answer.split(b"\r\n\r\n")[0].lower()
    assert b"evil.example" not in answer
    assert b"Traceback" not in answer
    assert target.digest() == before
    assert not PICKLED.exists()


def test_there_are_enough_of_them_and_none_twice() -> None:
    assert len({attack.content + str(attack.as_whom).encode() for attack in ATTACKS}) == len(ATTACKS) >= 50


def test_the_good_request_would_have_had_an_effect(target: Target) -> None:
    """Else nothing above was proven."""
    before = target.digest()
    answer = target.send(Attack("good", request("POST", REGISTER, GOOD)))
    assert answer.startswith(b"HTTP/1.1 201 ")
    assert target.digest() != before
