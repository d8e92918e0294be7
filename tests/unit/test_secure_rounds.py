"""Masked rounds of twenty virtual clients and three vehicles: cut-off vehicles, restarts, attempts, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from secure_world import POLICY, VEHICLES, VIRTUAL, SecureWorld

from edge_runtime.training.policy import VehiclePolicy
from fedvit.errors import ConflictError
from fedvit.secure_session import PHASES
from fedvit.store.store import Store
from fedvit.types import RunStatus

torch.set_num_threads(1)
ALL = VIRTUAL + len(VEHICLES)
FIRST, SECOND, THIRD = VEHICLES


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., SecureWorld]]:
    worlds: list[SecureWorld] = []

    def build(**more: Any) -> SecureWorld:
        worlds.append(SecureWorld(tmp_path, **more))
        return worlds[-1]

    yield build
    for world in worlds:
        world.close()


def phase_of(world: SecureWorld, name: str) -> tuple[int, str] | None:
    """The round and phase that the server asks this vehicle for."""
    secure = world.client.clients.task(name).secure
    return None if secure is None or secure.asked is None else (secure.asked.task.round_index, secure.phase)


def contributors(world: SecureWorld, round_index: int) -> list[str]:
    return list(world.store.versions.get(f"v1.1.{round_index}").lineage["clients"])


def charged(home: Path) -> list[tuple[int, str, str]]:
    with Store.open(home) as store:
        return [(e.charge.round_index, e.charge.unit_id, e.charge.output_id) for e in store.ledger.entries()]


def dropouts() -> dict[str, float]:
    name = "fed_vit_autorl_secure_dropouts_total"
    return {phase: REGISTRY.get_sample_value(name, {"phase": phase}) or 0.0 for phase in PHASES}


def test_a_vehicle_cut_off_in_each_phase_and_one_killed_after_its_upload(make: Callable[..., SecureWorld]) -> None:
    world = make(rounds=len(PHASES) + 1)
    cut: set[int] = set()
    killed: list[int] = []

    def act() -> None:
        for name in (FIRST, SECOND):
            asked = phase_of(world, name)
            world.poll(name)
            if name == SECOND and asked == (len(PHASES) + 1, "mask"):
                world.restart(SECOND)
                killed.append(asked[0])
        asked = phase_of(world, THIRD)
        if asked is not None and asked[0] <= len(PHASES) and asked[1] == PHASES[asked[0] - 1]:
            cut.add(asked[0])
        if asked is None or asked[0] not in cut:
            world.poll(THIRD)

    world.act, before = act, dropouts()
    run = world.loop().run()
    assert (run.status, run.reason) == (RunStatus.COMPLETED, None)
    assert cut == {1, 2, 3, 4, 5}
    assert dropouts() == {phase: before[phase] + 1 for phase in PHASES}
    assert killed == [6]
    # Cut off before its vector had arrived, the vehicle is not in the sum; afterwards it is.
    counts = [len(contributors(world, index)) for index in range(1, 7)]
    assert counts == [ALL - 1] * 3 + [ALL] * 3
    # One charge for each client and round, and the vehicles' own ledgers hold those of what they computed.
    server = charged(world.settings.home)
    assert Counter((index, unit) for index, unit, _ in server) == Counter(
        {(index, client.client_id): 1 for index in range(1, 7) for client in world.store.clients.all()}
    )
    for name, rounds in ((FIRST, range(1, 7)), (SECOND, range(1, 7)), (THIRD, range(4, 7))):
        own = charged(world.home_of(name))
        assert [index for index, _, _ in own] == list(rounds)
        assert set(own) <= set(server)
    # No message and no key outlives its session.
    assert list(world.settings.home.glob("remote/*/*.secagg")) == []
    for name in (FIRST, SECOND):
        world.poll(name)
        assert list((world.home_of(name) / "secagg").iterdir()) == []


def test_a_session_that_fails_is_repeated_as_another_attempt_with_another_charge(
    make: Callable[..., SecureWorld],
) -> None:
    world = make(min_survivors=ALL)
    attempts: set[int] = set()

    def act() -> None:
        world.poll(FIRST)
        world.poll(SECOND)
        secure = world.client.clients.task(THIRD).secure
        if secure is not None and secure.asked is not None:
            attempts.add(secure.asked.task.attempt)
            if (secure.phase == "advertise" and len(attempts) < 3) or len(attempts) == 3:
                world.poll(THIRD)

    world.act = act
    run = world.loop().run()
    # Two attempts end without the third vehicle's shares; the third one has everybody.
    assert (run.status, run.reason) == (RunStatus.COMPLETED, None)
    assert attempts == {0, 1, 2}
    server = charged(world.settings.home)
    assert len(set(server)) == len(server) == 3 * ALL
    assert len(charged(world.home_of(FIRST))) == 1


def test_what_a_policy_does_not_allow_is_refused_before_any_key_is_sent(make: Callable[..., SecureWorld]) -> None:
    policies = {
        FIRST: POLICY.model_copy(update={"min_honest_survivors": ALL}),
        SECOND: POLICY.model_copy(update={"participants": {SECOND: "ab" * 32}}),
        THIRD: VehiclePolicy(),
    }
    world = make(policies=policies)
    assert world.loop().run().status is RunStatus.COMPLETED
    assert len(contributors(world, 1)) == VIRTUAL
    reasons = " ".join(str(result.reason) for result in world.results)
    assert [result.status for result in world.results] == ["refused"] * 2
    assert "honest survivors" in reasons
    assert "vehicle-00" in reasons
    assert charged(world.home_of(FIRST)) == charged(world.home_of(SECOND)) == []
    # The third one announces no key for secure aggregation, so it is not drawn.
    assert THIRD not in {unit for _, unit, _ in charged(world.settings.home)}


def test_first_answers_count_and_a_changed_identity_key_is_refused(make: Callable[..., SecureWorld]) -> None:
    world = make(rounds=2)
    tried: Counter[str] = Counter()
    renewed: list[str] = []

    def act() -> None:
        asked = world.client.clients.task(FIRST).secure
        if asked is not None and asked.asked is not None and asked.asked.task.round_index == 2 and not renewed:
            (world.home_of(SECOND) / "keys" / "identity.key").unlink()
            world.restart(SECOND)
            renewed.append(SECOND)
        world.poll_all()
        if asked is not None and not tried[asked.phase]:
            tried[asked.phase] += 1
            answer_again(world, asked.session, asked.phase)

    world.act = act
    assert world.loop().run().status is RunStatus.COMPLETED
    assert set(tried) == set(PHASES)
    assert len(contributors(world, 1)) == ALL
    # The server knows the old key, and the vehicle has another one.
    assert SECOND not in contributors(world, 2)
    assert [result.status for result in world.results if result.round_index == 2].count("refused") == 1


def answer_again(world: SecureWorld, session: str, phase: Any) -> None:
    """Answer a phase again: the same bytes are taken, and nothing else is, for any phase or session."""
    put = world.client.clients.answer
    stored = world.settings.home / "remote" / FIRST / f"{session}.{phase}.secagg"
    content = stored.read_bytes()
    assert put(FIRST, session, phase, content).status == "received"
    with pytest.raises(ConflictError):
        put(FIRST, session, phase, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConflictError):
        put(FIRST, "ab" * 32, phase, content)
    for later in PHASES[PHASES.index(phase) + 1 :]:
        with pytest.raises(ConflictError):
            put(FIRST, session, later, content)  # type: ignore[arg-type]
    assert stored.read_bytes() == content
