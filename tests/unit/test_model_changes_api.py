"""Changes of the served model over the API: rollback, switch, the release gate, optimization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from control_system import TARGET, WAIT_S, JsonObject, System, TinyModel
from fastapi.testclient import TestClient
from tiny_release import png

from edge_runtime.server import ServingOptions, ServingProcess
from fedvit.testing.doubles import PointModel
from fedvit.types import RunStatus, Variant

Make = Callable[..., System]


# --- roll back -------------------------------------------------------------------------------------------------------


def test_a_rollback_is_a_new_higher_version_with_the_old_bytes(make: Make, tmp_path: Path) -> None:
    system = make(max_accuracy_drop=0.5).trained()
    follower = system.follower(tmp_path / "cache")
    assert follower.poll().manifest.version == "v1.1.4"  # type: ignore[union-attr]
    old = system.store.versions.get("v1.1.2")
    answer = system.http.post("/api/model/rollback", json={"version": "v1.1.2", "reason": "worse at night"})
    assert answer.status_code == 200
    assert (answer.json()["version"], answer.json()["sequence"]) == ("v1.1.5", 3)
    current = system.get("/api/model/current")
    assert current["version"] == "v1.1.5"
    assert current["artifacts"] == dict(old.artifacts)
    assert current["derived_from"] == "v1.1.2"
    lineage = current["lineage"]
    assert (lineage["rollback_of"], lineage["replaces"], lineage["reason"]) == ("v1.1.2", "v1.1.4", "worse at night")
    assert system.store.versions.get("v1.1.5").weights_digest == old.weights_digest
    loaded = follower.poll()
    assert loaded is not None
    assert (loaded.manifest.version, loaded.manifest.sequence) == ("v1.1.5", 3)
    assert loaded.model_path.read_bytes() == system.store.blobs.get(old.artifacts["standard"])
    again = system.http.post("/api/model/rollback", json={"version": "v1.1.2"})
    assert again.json() == answer.json()
    # The round still shows the version that it trained.
    assert system.store.rounds.get("run-0001", 2).version == "v1.1.2"


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        ("v1.1.2", 409, "held-out accuracy of 0.7619"),
        ("v1.1.3", 409, "never released"),
        ("v1.1.4", 409, "what serves now"),
        ("v9.9.9", 404, "no model version"),
        ("", 422, "version"),
    ],
)
def test_a_rollback_that_harms_or_does_nothing_is_refused(make: Make, version: str, status: int, words: str) -> None:
    system = make().trained()
    answer = system.http.post("/api/model/rollback", json={"version": version})
    assert answer.status_code == status
    assert words in answer.json()["detail"]
    assert system.get("/api/model/current")["version"] == "v1.1.4"
    assert len(system.store.releases.all()) == 2


@pytest.mark.parametrize("version", ["v1.1.2", "v1.1.3"])
def test_force_takes_a_worse_or_an_unreleased_version(make: Make, version: str) -> None:
    system = make().trained()
    answer = system.http.post("/api/model/rollback", json={"version": version, "force": True})
    assert answer.status_code == 200
    current = system.get("/api/model/current")
    assert (current["version"], current["lineage"]["rollback_of"]) == ("v1.1.5", version)
    assert current["lineage"]["forced"] is True
    expected = system.model.export({"point": _point(system, version)}, Variant.STANDARD).content
    assert system.store.blobs.get(current["artifacts"]["standard"]) == expected


def test_a_rollback_of_damaged_content_is_refused(make: Make) -> None:
    system = make(max_accuracy_drop=1.0).trained()
    digest = system.store.versions.get("v1.1.2").artifacts["standard"]
    (system.store.home / "blobs" / "sha256" / digest[:2] / digest).write_bytes(b"damaged")
    assert system.http.post("/api/model/rollback", json={"version": "v1.1.2"}).status_code == 502
    assert system.get("/api/model/current")["version"] == "v1.1.4"


def test_training_after_a_rollback_goes_on_above_it(make: Make) -> None:
    system = make(max_accuracy_drop=1.0).trained()
    system.http.post("/api/model/rollback", json={"version": "v1.1.2"})
    system.done("/api/model/retrain", {"strategy": "full_retrain"})
    system.local.wait(WAIT_S)
    versions = [v["version"] for v in system.get("/api/model/versions")]
    assert versions[:2] == ["v1.2.4", "v1.2.3"]
    assert system.get("/api/model/current")["version"] == "v1.2.4"


def _point(system: System, version: str) -> Any:
    from fedvit.registry.publisher import stored_weights

    return stored_weights(system.store, system.store.versions.get(version).weights_digest)["point"]


# --- switch ----------------------------------------------------------------------------------------------------------


def test_a_switch_moves_followers_without_a_failed_request_and_leaves_the_pinned(make: Make, tmp_path: Path) -> None:
    system = make(TinyModel(TARGET)).trained()
    process = ServingProcess(system.follower(tmp_path / "edge"), ServingOptions(device_id="edge-1", source="test"))
    pinned = system.follower(tmp_path / "pinned", "standard")
    assert process.service.refresh()
    assert pinned.poll().manifest.variant == "standard"  # type: ignore[union-attr]
    edge = TestClient(process.app())
    before = edge.post("/infer", content=png())
    answer = system.http.post("/api/model/switch", json={"variant": "edge_optimized"})
    assert (answer.status_code, answer.json()["variant"]) == (200, "edge_optimized")
    assert system.get("/api/model/info")["variant"] == "edge_optimized"
    between = edge.post("/infer", content=png())
    assert process.service.refresh()
    after = edge.post("/infer", content=png())
    assert [a.status_code for a in (before, between, after)] == [200, 200, 200]
    assert [a.json()["variant"] for a in (before, between, after)] == ["standard", "standard", "edge_optimized"]
    loaded = pinned.poll()
    assert loaded is not None
    assert loaded.manifest.variant == "standard"
    assert (
        system.http.get("/api/model/release").text == system.http.get("/api/model/release?variant=edge_optimized").text
    )


def test_a_switch_to_damaged_content_is_refused(make: Make) -> None:
    system = make().trained()
    digest = system.store.versions.get("v1.1.4").artifacts["edge_optimized"]
    (system.store.home / "blobs" / "sha256" / digest[:2] / digest).write_bytes(b"damaged")
    assert system.http.post("/api/model/switch", json={"variant": "edge_optimized"}).status_code == 502
    assert system.get("/api/model/info")["variant"] == "standard"


def test_a_switch_lasts_over_later_releases_and_is_harmless_when_repeated(make: Make) -> None:
    system = make(max_accuracy_drop=1.0).trained()
    first = system.http.post("/api/model/switch", json={"variant": "edge_optimized"}).json()
    again = system.http.post("/api/model/switch", json={"variant": "edge_optimized"}).json()
    assert first == again
    system.done("/api/model/retrain", {"strategy": "fine_tune"})
    system.local.wait(WAIT_S)
    info = system.get("/api/model/info")
    assert (info["version"], info["variant"]) == ("v1.2.4", "edge_optimized")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"variant": "standard_int8"}, 409, "no variant 'standard_int8'"),
        ({"variant": "huge"}, 422, "variant"),
        ({"variant": "standard", "now": True}, 422, "now"),
        ({}, 422, "variant"),
    ],
)
def test_a_bad_switch_is_refused(make: Make, body: JsonObject, status: int, words: str) -> None:
    system = make().trained()
    answer = system.http.post("/api/model/switch", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert words in answer.json()["detail"]
    assert system.get("/api/model/info")["variant"] == "standard"


# --- the gate --------------------------------------------------------------------------------------------------------


def test_a_worse_version_is_refused_with_its_reason_and_the_old_one_keeps_serving(make: Make) -> None:
    system = make().trained()
    # A full retraining passes through round two, whose model is worse than the one that serves.
    ended = system.done("/api/model/retrain", {"strategy": "full_retrain"})
    assert ended["status"] == "succeeded"
    assert system.local.wait(WAIT_S).status is RunStatus.COMPLETED
    by_name = {v["version"]: v for v in system.get("/api/model/versions")}
    assert "held-out accuracy of 0.7619" in by_name["v1.2.2"]["refusal"]
    assert by_name["v1.2.2"]["released"] is False
    assert by_name["v1.2.4"]["refusal"] is None
    assert [r.version for r in system.store.releases.all()] == ["v1.1.2", "v1.1.4", "v1.2.4"]
    # A refused version is not offered again by the next start.
    assert system.http.post("/api/training/start").status_code == 202
    system.local.wait(WAIT_S)
    assert len(system.store.releases.all()) == 3


# --- optimise --------------------------------------------------------------------------------------------------------


def test_optimising_releases_the_most_accurate_variant_that_is_fast_enough(make: Make, tmp_path: Path) -> None:
    model = PointModel(TARGET)
    model.latency_ms = {Variant.STANDARD: 90, Variant.STANDARD_INT8: 60, Variant.EDGE_OPTIMIZED_FP32: 45}
    model.relative_accuracy = {Variant.EDGE_OPTIMIZED_FP32: 0.99, Variant.EDGE_OPTIMIZED: 0.98}
    system = make(model).trained()
    follower = system.follower(tmp_path / "cache")
    assert follower.poll().manifest.variant == "standard"  # type: ignore[union-attr]
    ended = system.done("/api/edge/optimize", {"strategy": "quantization", "target_latency": 50})
    result = ended["result"]
    assert (ended["status"], result["target_met"], result["switched"]) == ("succeeded", True, True)
    assert (result["version"], result["variant"]) == ("v1.1.5", "edge_optimized_fp32")
    assert [c["variant"] for c in result["candidates"]] == ["standard_int8", "edge_optimized_fp32", "edge_optimized"]
    assert [c["p95_ms"] for c in result["candidates"]] == [60, 45, 1]
    assert (result["serving"]["variant"], result["serving"]["p95_ms"]) == ("standard", 90)
    current = system.get("/api/model/current")
    assert (current["version"], current["lineage"]["optimized_from"]) == ("v1.1.5", "v1.1.4")
    assert set(current["artifacts"]) == {"standard", "edge_optimized", "edge_optimized_fp32"}
    assert system.get("/api/model/info")["variant"] == "edge_optimized_fp32"
    loaded = follower.poll()
    assert loaded is not None
    assert (loaded.manifest.variant, loaded.manifest.version) == ("edge_optimized_fp32", "v1.1.5")


def test_an_impossible_target_is_said_honestly_and_nothing_is_switched(make: Make) -> None:
    system = make().trained()
    ended = system.done("/api/edge/optimize", {"strategy": "quantization", "target_latency": 0.001})
    result = ended["result"]
    assert (ended["status"], result["target_met"], result["switched"]) == ("succeeded", False, False)
    assert result["reason"] == "No candidate meets the target latency."
    assert result["best"]["p95_ms"] == 1.0
    assert system.get("/api/model/current")["version"] == "v1.1.4"
    assert system.get("/api/model/info")["variant"] == "standard"


def test_a_candidate_that_fails_its_canary_or_the_gate_gives_way_to_the_next(make: Make) -> None:
    model = PointModel(TARGET)
    model.canary_disagrees = {Variant.STANDARD_INT8}
    model.relative_accuracy = {Variant.EDGE_OPTIMIZED_FP32: 0.99, Variant.EDGE_OPTIMIZED: 0.5}
    system = make(model).trained()
    ended = system.done("/api/edge/optimize", {"strategy": "quantization", "target_latency": 50})
    rejected = {c["variant"]: c["rejected"] for c in ended["result"]["candidates"]}
    assert "in the canary it agreed with standard on 0.00%" in rejected["standard_int8"]
    assert ended["result"]["variant"] == "edge_optimized_fp32"

    model.canary_disagrees = {Variant.EDGE_OPTIMIZED}
    model.latency_ms = {Variant.EDGE_OPTIMIZED_FP32: 80}
    ended = system.done("/api/edge/optimize", {"strategy": "lighter_variant", "target_latency": 50})
    assert (ended["result"]["target_met"], ended["result"]["switched"]) == (True, False)
    assert ended["result"]["reason"] == "No candidate that is fast enough is good enough."
    assert system.get("/api/model/info")["variant"] == "edge_optimized_fp32"


def test_the_gate_turns_a_fast_but_bad_candidate_down(make: Make) -> None:
    model = PointModel(TARGET)
    model.latency_ms = {Variant.EDGE_OPTIMIZED_FP32: 80}
    model.relative_accuracy = {Variant.EDGE_OPTIMIZED: 0.5}
    system = make(model).trained()
    ended = system.done("/api/edge/optimize", {"strategy": "lighter_variant", "target_latency": 50})
    rejected = {c["variant"]: c["rejected"] for c in ended["result"]["candidates"]}
    assert "held-out accuracy" in rejected["edge_optimized"]
    assert ended["result"]["switched"] is False
    assert len(system.store.releases.all()) == 2


def test_an_optimised_variant_is_built_for_later_releases_too(make: Make) -> None:
    system = make(max_accuracy_drop=1.0).trained()
    ended = system.done("/api/edge/optimize", {"strategy": "quantization", "target_latency": 50})
    assert ended["result"]["variant"] == "standard_int8"
    again = system.done("/api/edge/optimize", {"strategy": "quantization", "target_latency": 50})
    assert (again["result"]["switched"], again["result"]["reason"]) == (False, "standard_int8 serves already.")
    system.done("/api/model/retrain", {"strategy": "fine_tune"})
    system.local.wait(WAIT_S)
    info = system.get("/api/model/info")
    assert (info["version"], info["variant"]) == ("v1.2.4", "standard_int8")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"strategy": "magic", "target_latency": 50}, "strategy"),
        ({"strategy": "quantization", "target_latency": 0}, "target_latency"),
        ({"strategy": "quantization", "target_latency": "soon"}, "target_latency"),
        ({"strategy": "quantization", "target_latency": 50, "colour": 1}, "colour"),
        ({"strategy": "quantization"}, "target_latency"),
    ],
)
def test_a_bad_optimisation_is_refused_by_field(make: Make, body: JsonObject, word: str) -> None:
    system = make().trained()
    answer = system.http.post("/api/edge/optimize", json=body)
    assert answer.status_code == 422
    assert word in answer.json()["detail"]
    assert system.get("/api/operations") == []


def test_before_a_release_there_is_nothing_to_change(make: Make) -> None:
    system = make()
    bodies = {
        "/api/edge/optimize": {"strategy": "quantization", "target_latency": 50},
        "/api/model/switch": {"variant": "edge_optimized"},
        "/api/model/retrain": {"strategy": "fine_tune"},
    }
    for path, body in bodies.items():
        answer = system.http.post(path, json=body)
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict"), path
    assert system.get("/api/operations") == []
