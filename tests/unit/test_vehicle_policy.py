"""The owner's policy file: signing, verification, its commands, and the ledger that keeps to it."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from edge_runtime.__main__ import app
from edge_runtime.training.outputs import Output, OutputLedger
from edge_runtime.training.policy import AllowedModel, Purpose, VehiclePolicy, sign_policy, verify_policy
from fedvit.clients.client_state import ClientState
from fedvit.errors import BudgetExhaustedError, ConflictError, DataError, IntegrityError
from fedvit.privacy.events import PoissonGaussian
from fedvit.privacy.round_cost import charge_of
from fedvit.store.store import Store
from fedvit.testing.doubles import ManualClock
from fedvit.wire.signatures import sign_document

KEY = Ed25519PrivateKey.generate()
OWNERS = [KEY.public_key()]
POLICY = VehiclePolicy(
    models=(AllowedModel(name="hybrid_lite0", frozen_digests=("a" * 64,)),),
    purposes=(Purpose.UPDATE,),
    min_noise_multiplier=1.5,
    max_epsilon_per_day=0.5,
)


def test_a_signed_policy_is_read_back() -> None:
    assert verify_policy(sign_policy(POLICY, KEY), OWNERS) == POLICY


def altered(**changes: Any) -> str:
    envelope = json.loads(sign_policy(POLICY, KEY))
    return json.dumps({**envelope, "signed": envelope["signed"] | changes})


def resigned(**changes: Any) -> str:
    return sign_document(json.loads(sign_policy(POLICY, KEY))["signed"] | changes, KEY)


@pytest.mark.parametrize(
    "text",
    [
        sign_policy(POLICY, Ed25519PrivateKey.generate()),
        altered(max_epsilon=100.0),
        altered(_type="fedvit-release"),
        resigned(_type="fedvit-release"),
        resigned(format=2),
        resigned(max_epsilon=-1.0),
        resigned(min_noise_multiplier=0.01),
        resigned(purposes=["everything"]),
        resigned(run_me="now"),
        "{}",
        "",
        "[" * 100_000,
    ],
)
def test_what_the_owner_did_not_sign_is_no_policy(text: str) -> None:
    with pytest.raises(IntegrityError):
        verify_policy(text, OWNERS)


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_the_commands_sign_and_verify(tmp_path: Path) -> None:
    (tmp_path / "draft.yaml").write_text("max_epsilon: 3\nmodels: [{name: vit_tiny_patch16_224}]\n")
    signed, keys = str(tmp_path / "policy.json"), str(tmp_path / "owner")
    key = call("policy", "sign", signed, "--draft", str(tmp_path / "draft.yaml"), "--key-folder", keys).stdout.strip()
    shown = json.loads(call("policy", "verify", signed, "--owner-key", key).stdout)
    assert (shown["max_epsilon"], shown["models"][0]["name"]) == (3.0, "vit_tiny_patch16_224")
    # The same key the next time.
    again = call("policy", "sign", str(tmp_path / "other.json"), "--key-folder", keys)
    assert again.stdout.strip() == key
    other = call("policy", "sign", str(tmp_path / "other.json"), "--key-folder", str(tmp_path / "stranger"))
    assert call("policy", "verify", signed, "--owner-key", other.stdout.strip()).exit_code == 1
    assert call("policy", "verify", str(tmp_path / "absent"), "--owner-key", key).exit_code == 2
    (tmp_path / "draft.yaml").write_text("max_epsilon: much\n")
    refused = call("policy", "sign", signed, "--draft", str(tmp_path / "draft.yaml"), "--key-folder", keys)
    assert refused.exit_code == 2
    assert "max_epsilon" in refused.output


@pytest.mark.parametrize("options", [["--policy", "x"], ["--owner-key", "x"], ["--policy", "x", "--owner-key", "x"]])
def test_a_vehicle_does_not_begin_without_a_whole_policy(tmp_path: Path, options: list[str]) -> None:
    words = ["train", "--source", "http://127.0.0.1:9", "--data", str(tmp_path), "--device-id", "truck-7"]
    result = call(*words, "--home", str(tmp_path / "home"), "--target-epsilon", "8", *options)
    assert result.exit_code == 2
    assert not (tmp_path / "home").exists()


# --- the ledger of outputs -------------------------------------------------------------------------------------------


def output(digest: str, *, round_index: int = 1, purpose: Purpose = Purpose.UPDATE, noise: float = 4.0) -> Output:
    event = PoissonGaussian(noise, 0.5)
    identity: dict[str, Any] = {"run_id": "run-0001", "round_index": round_index, "unit_id": "truck-7"}
    charge = charge_of(event, **identity, output_id=digest[0] * 64, unit="record")
    return Output(purpose, charge, digest * 64)


def opened(
    home: Path, policy: VehiclePolicy | None = None, clock: ManualClock | None = None
) -> tuple[Store, OutputLedger]:
    clock = clock or ManualClock()
    store = Store.open(home, clock=clock)
    return store, OutputLedger(store, policy or VehiclePolicy(), clock)


def test_a_second_output_is_refused_and_recorded_after_any_number_of_restarts(tmp_path: Path) -> None:
    for attempt in range(3):
        store, outputs = opened(tmp_path)
        with store:
            outputs.charge(output("a"))
            with pytest.raises(ConflictError):
                outputs.charge(output("b"))
            with pytest.raises(ConflictError):
                outputs.check(Purpose.UPDATE, "run-0001", 1, "b" * 64)
            outputs.check(Purpose.UPDATE, "run-0001", 1, "a" * 64)
            outputs.check(Purpose.HISTOGRAM, "run-0001", 1, "b" * 64)
            record = store.metadata.get("vehicle_output/update/run-0001/1")
            assert record is not None
            assert record["refused"]["count"] == 2 * (attempt + 1)
            assert [entry.charge.output_id for entry in store.ledger.entries()] == ["a" * 64]


def test_the_purposes_of_a_round_have_an_output_each(tmp_path: Path) -> None:
    store, outputs = opened(tmp_path)
    with store:
        outputs.charge(output("a"))
        outputs.charge(output("b", purpose=Purpose.HISTOGRAM))
        outputs.charge(output("c", round_index=2))
        assert len(store.ledger.entries()) == 3


def test_other_bytes_are_not_released_for_an_output(tmp_path: Path) -> None:
    store, outputs = opened(tmp_path)
    with store:
        outputs.charge(output("a"))
        outputs.release(output("a"), b"one")
        outputs.release(output("a"), b"one")
        for wanted, content in ((output("a"), b"two"), (output("b"), b"one"), (output("c", round_index=2), b"one")):
            with pytest.raises(IntegrityError):
                outputs.release(wanted, content)


def test_a_refused_charge_leaves_no_record(tmp_path: Path) -> None:
    store, outputs = opened(tmp_path, VehiclePolicy(max_epsilon=0.01))
    with store:
        with pytest.raises(BudgetExhaustedError):
            outputs.charge(output("a"))
        assert store.metadata.get("vehicle_output/update/run-0001/1") is None
        assert store.ledger.entries() == []


def test_epsilon_of_a_day_is_that_of_the_last_24_hours(tmp_path: Path) -> None:
    clock = ManualClock()
    store, outputs = opened(tmp_path, VehiclePolicy(max_epsilon_per_day=1.0), clock)
    with store:
        # An output costs about 0.5, and the budget of a day is 1.
        charged = next(n for n in range(100) if not fits(outputs, output("a", round_index=n + 1)))
        assert charged > 1
        # A repetition is charged to no day.
        outputs.charge(output("a"))
        clock.advance(24 * 3600 - 60)
        with pytest.raises(BudgetExhaustedError):
            outputs.charge(output("a", round_index=charged + 1))
        clock.advance(61)
        outputs.charge(output("a", round_index=charged + 1))


def fits(outputs: OutputLedger, wanted: Output) -> bool:
    try:
        outputs.charge(wanted)
    except BudgetExhaustedError:
        return False
    return True


def race(home: Path, digest: str, start: Any, results: Any) -> None:
    store, outputs = opened(home)
    with store:
        start.wait()
        try:
            outputs.charge(output(digest))
            results.put(digest)
        except ConflictError:
            results.put("")


def test_of_two_processes_one_gets_its_output(tmp_path: Path) -> None:
    opened(tmp_path)[0].close()
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=race, args=(tmp_path, digest, start, results)) for digest in "ab"]
    for process in processes:
        process.start()
    got = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert got[0] == ""
    store, _ = opened(tmp_path)
    with store:
        assert [entry.charge.output_id for entry in store.ledger.entries()] == [got[1] * 64]


@pytest.mark.parametrize(
    ("run_id", "round_index", "client_id"),
    [
        ("../x", 1, "truck"),
        ("a/b", 1, "truck"),
        ("", 1, "truck"),
        ("r\n", 1, "truck"),
        ("r", -1, "truck"),
        ("r", 10**8, "truck"),
        ("r", 1, ".."),
        ("r", 1, "/etc"),
    ],
)
def test_names_that_are_no_names_make_no_paths(tmp_path: Path, run_id: str, round_index: int, client_id: str) -> None:
    state = ClientState(tmp_path / "home", "dropped")
    with pytest.raises(DataError):
        state.save(run_id, round_index, client_id, {})
    with pytest.raises(DataError):
        state.load(run_id, round_index, client_id)
    assert list(tmp_path.iterdir()) == []
