"""Attacks by other identities, on listening sockets and on files of secrets."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmarks.process_tree import descendants
from command import SMALL, Fedvit, environment
from listening import SECOND_ADDRESS, Listener, is_loopback, listeners, listeners_of, namespace, no_namespace
from scoped_api import DEVICE, ScopedApi, filled, operations, takes_json
from trained_home import backed_up, trained

from fedvit.access.identity import Scope
from fedvit.errors import StateError
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.private_files import open_own_folder
from fedvit.settings import load_settings
from fedvit.store.records import Token
from fedvit.store.store import Store
from fedvit.types import utc_now
from serve_apps.startup.serving import follower_token
from tests.attack.table import AttackTable

VICTIM = "vehicle-0001"
WAIT_S = 180.0
RELEASES = {("GET", "/api/model/release"), ("GET", "/api/model/blobs/{digest}")}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[ScopedApi]:
    with ScopedApi(tmp_path / "home", mode="tokens", requests_per_s=1e6, burst=10**6) as site:
        yield site


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_vehicles_token_acts_for_no_other_vehicle(site: ScopedApi, attack_table: AttackTable) -> None:
    site.ask("POST", "/api/clients/register", "device", json={"device_id": DEVICE, "num_examples": 3})
    before = site.store.clients.all()
    statuses = {}
    for method, path, facts in operations(site.api):
        if "{client_id}" in path or path == "/api/clients/register":
            url = path.replace("{client_id}", VICTIM).replace("{round_index}", "1").replace("{run_id}", "run-0001")
            # A body that the route admits, so that nothing but the identity can be refused.
            malformed = site.ask(method, url, "operator", content=b"{...}") if takes_json(facts) else None
            body = {} if malformed is None else malformed.json()["example"]
            body |= {"device_id": VICTIM} if path.endswith("/register") else {}
            statuses[method, path] = site.ask(method, url, "device", json=body).status_code
    opened = [route for route, status in statuses.items() if status != 403]
    assert (len(statuses) > 8, opened) == (True, [])
    assert site.store.clients.all() == before
    attack_table.add(
        "identity",
        "a vehicle's token on every route of another vehicle",
        achieved=f"{len(opened)} of {len(statuses)} routes",
        bound="0 routes",
    )


def test_the_followers_token_reads_releases_and_nothing_else(site: ScopedApi, attack_table: AttackTable) -> None:
    routes = [(method, path) for method, path, facts in operations(site.api) if facts["x-scope"]]
    allowed = {
        (method, path) for method, path in routes if site.ask(method, filled(path), "releases").status_code != 403
    }
    assert allowed == RELEASES
    settings = load_settings(environ={}, overrides={"home": site.settings.home, "access": {"mode": "tokens"}})
    with follower_token(settings) as path:
        assert path is not None
        headers = {"Authorization": f"Bearer {path.read_text()}"}
        for method, target in (("POST", "/api/clients/register"), ("POST", f"/api/clients/{VICTIM}/heartbeat")):
            assert site.ask(method, target, headers=headers, json={"device_id": "truck-9"}).status_code == 403
    assert [client.client_id for client in site.store.clients.all()] == ["vehicle-0000", VICTIM]
    attack_table.add(
        "identity",
        "the token that replicas and edges follow releases with, on every route",
        achieved=f"{len(allowed)} of {len(routes)} routes: the release and its artifacts",
        bound="the 2 routes of releases",
    )


def test_a_shared_device_token_of_an_earlier_version_opens_nothing(site: ScopedApi, attack_table: AttackTable) -> None:
    secret = "s" * 43
    digest = hashlib.sha256(secret.encode()).hexdigest()
    site.store.tokens.add(Token("0" * 12, "edges", digest, (Scope.DEVICE.value,), utc_now()))
    headers = {"Authorization": f"Bearer fvt_{'0' * 12}_{secret}"}
    routes = [(method, path) for method, path, facts in operations(site.api) if facts["x-scope"]]
    opened = 0
    for method, path in routes:
        answer = site.ask(method, filled(path), headers=headers)
        opened += answer.status_code not in (401, 429)
        site.clock.advance(1000)
    assert opened == 0
    attack_table.add(
        "identity", "a device token without a client", achieved=f"{opened} of {len(routes)} routes", bound="0 routes"
    )


# --- listening sockets -----------------------------------------------------------------------------------------------

START_RAY = """
import sys
from pathlib import Path
from actors.connection import connect
from fedvit.settings import load_settings

connect(load_settings(environ={}, overrides={"home": Path(sys.argv[1])}), {"RAY_USAGE_STATS_ENABLED": "0"})
import ray

ray.get(ray.remote(lambda: 1).remote())
session = Path(ray._private.worker._global_node.get_session_dir_path()).resolve()
print("ready", ray.get_runtime_context().gcs_address, session, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@contextmanager
def started_ray(home: Path) -> Iterator[tuple[int, str, Path]]:
    """A process that started Ray as fedvit does, the address of the control store, and the folder of the session."""
    process = subprocess.Popen(
        [sys.executable, "-c", START_RAY, str(home / "var")],
        env=environment() | {"HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        word, address, session = process.stdout.readline().split()
        assert word == "ready"
        yield process.pid, address, Path(session)
    finally:
        process.stdin.close()
        process.wait(WAIT_S)


@pytest.mark.ray
def test_ray_that_fedvit_starts_listens_on_loopback_and_demands_its_token(
    tmp_path: Path, attack_table: AttackTable
) -> None:
    import grpc

    with started_ray(tmp_path) as (pid, address, session):
        sockets = listeners_of(descendants(pid))
        assert len(sockets) >= 5
        exposed = {listener for listener in sockets if not is_loopback(listener[0])}
        assert exposed == set()
        refused = []
        for metadata in ([], [("authorization", "Bearer guess")]):
            with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/ray.rpc.InternalKVGcsService/InternalKVKeys")(b"", 20.0, metadata)
            refused.append(caught.value.code())
        assert refused == [grpc.StatusCode.UNAUTHENTICATED] * 2
        secrets = (tmp_path / ".ray", tmp_path / ".ray" / "auth_token")
        assert [stat.S_IMODE(path.stat().st_mode) for path in secrets] == [0o700, 0o600]
        files = [path for path in session.rglob("*") if not path.is_dir()]
        assert len(files) > 10
        # Ray opens the session and the folder above it to all users.
        assert opened_to_others(session.parents[1]) == []
    attack_table.add(
        "Ray", "connect from another host", achieved=f"{len(exposed)} of {len(sockets)} sockets", bound="0 sockets"
    )
    attack_table.add("Ray", "call the control store without the token", achieved="0 of 2 calls", bound="0 calls")
    attack_table.add(
        "Ray",
        "open, replace or remove Ray's sockets and logs as another user",
        achieved=f"0 of {len(files)} files",
        bound="0 files",
    )


@pytest.mark.ray
def test_nothing_of_fedvit_up_listens_outside_of_loopback(
    tmp_path: Path, full: bool, attack_table: AttackTable
) -> None:
    if not full:
        pytest.skip("fedvit up in a network namespace is part of the full form: make attack")
    if reason := no_namespace():
        pytest.skip(f"needs a network namespace: {reason}")
    fedvit = Fedvit(tmp_path / "var", {**SMALL, "ray.dashboard": "true"}, {"HOME": str(tmp_path)})
    with namespace() as holder:

        def call(*words: str, configured: bool = True) -> Any:
            command = ["nsenter", "--net", f"--target={holder}", *fedvit.command(*words, configured=configured)]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=400, env=environment() | fedvit.variables, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return json.loads(done.stdout)

        call("up", "--json")
        try:
            seen = set(listeners(holder))
            call("status", "--json", configured=False)
            seen |= set(listeners(holder))
            reached = [listener for listener in seen if connects(holder, listener)]
        finally:
            call("down", "--json", configured=False)
    exposed = [listener for listener in seen if not is_loopback(listener[0])]
    assert len(seen) > 15
    assert (exposed, reached) == ([], [])
    attack_table.add(
        "Ray",
        f"`ss -ltn` beside `fedvit up` in a namespace with a second interface, and a connection to {SECOND_ADDRESS} "
        "on each port",
        achieved=f"{len(exposed)} of {len(seen)} sockets outside of loopback, {len(reached)} connections",
        bound="0 sockets, 0 connections",
    )


@pytest.mark.ray
def test_ranks_listen_on_loopback_while_they_train(tmp_path: Path, full: bool, attack_table: AttackTable) -> None:
    if not full:
        pytest.skip("a fine-tuning job in a network namespace is part of the full form: make attack")
    if reason := no_namespace():
        pytest.skip(f"needs a network namespace: {reason}")
    settings = {
        "finetune.ranks": "2",
        "finetune.steps": "5",
        "finetune.cpus_per_rank": "0.5",
        "ray.dashboard": "false",
    }
    fedvit = Fedvit(tmp_path / "var", settings, {"HOME": str(tmp_path)})
    with namespace() as holder:
        command = ["nsenter", "--net", f"--target={holder}", *fedvit.command("finetune", "--json")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment() | fedvit.variables)
        seen: set[Listener] = set()
        while process.poll() is None:
            seen |= set(listeners(holder))
            time.sleep(0.1)
        output = process.communicate()[0]
    assert process.returncode == 0, output
    exposed = [listener for listener in seen if not is_loopback(listener[0])]
    assert (len(seen) > 8, exposed) == (True, [])
    attack_table.add(
        "Ray",
        "connect from another host to ranks while they train",
        achieved=f"{len(exposed)} of {len(seen)} sockets",
        bound="0 sockets",
    )


def connects(holder: int, listener: Listener) -> bool:
    """Whether a connection to the second address of the namespace is accepted at this port."""
    code = f"import socket; socket.create_connection(({SECOND_ADDRESS!r}, {listener[1]}), 5)"
    command = ["nsenter", "--net", f"--target={holder}", sys.executable, "-S", "-c", code]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- files of secrets ------------------------------------------------------------------------------------------------


def opened_to_others(folder: Path) -> list[str]:
    """What another user may open: paths with access for others below a folder that lets them in."""
    if stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0:
        return []
    return [str(path) for path in (folder, *folder.rglob("*")) if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_another_user_opens_no_file_of_secrets(tmp_path: Path, attack_table: AttackTable) -> None:
    before = os.umask(0)
    try:
        home = trained(tmp_path / "home")
        archive = backed_up(home, home / "backups")
        with follower_token(load_settings(environ={}, overrides={"home": home, "access": {"mode": "tokens"}})) as token:
            assert token is not None
            secrets = [home / "state.db", *(home / "keys").iterdir(), archive, token]
            with Store.open(home) as store:
                store.clients.all()
                secrets += home.glob("state.db-*")
                modes = {path: stat.S_IMODE(path.stat().st_mode) for path in secrets}
    finally:
        os.umask(before)
    assert len(modes) >= 8
    assert set(modes.values()) == {0o600}
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home, home / "keys", home / "backups")] == [0o700] * 3
    assert opened_to_others(home) == []
    attack_table.add(
        "files of secrets",
        "read as another user, with umask 0 at creation",
        achieved=f"0 of {len(modes)} files",
        bound="0 files",
    )


def test_files_that_were_left_open_are_closed_before_they_are_used(
    tmp_path: Path, attack_table: AttackTable, caplog: pytest.LogCaptureFixture
) -> None:
    home = trained(tmp_path / "home")
    backed_up(home)
    assert [record for record in caplog.records if record.name == "fedvit.private_files"] == []
    left_open = [home, home / "keys", home / "state.db", *(home / "keys").iterdir()]
    for path in left_open:
        path.chmod(0o755 if path.is_dir() else 0o644)
    with Store.open(home):
        backed_up(home)
    # The root key is used by training, and not by a backup.
    load_or_create_root_secret(home)
    assert [path for path in left_open if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
    assert len([record for record in caplog.records if record.name == "fedvit.private_files"]) == len(left_open)
    attack_table.add(
        "files of secrets",
        "read as another user what an earlier version left open",
        achieved=f"0 of {len(left_open)} files and folders, each repair logged",
        bound="0 files",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
def test_rays_folder_is_refused_where_another_user_took_its_name(tmp_path: Path) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.mkdir(0o700)
    os.chown(theirs, 65534, 65534)
    link.symlink_to(tmp_path)
    for folder in (theirs, link):
        with pytest.raises(StateError):
            open_own_folder(folder)
    open_own_folder(tmp_path / "ours")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
def test_a_state_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    home = trained(tmp_path / "home")
    os.chown(home, 65534, 65534)
    home.chmod(0o777)
    with pytest.raises(StateError):
        Store.open(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o777


def test_a_folder_that_all_users_share_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(StateError):
        Store.open(shared)
    assert list(shared.iterdir()) == []
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
