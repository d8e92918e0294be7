"""Placement of a system's parts on nodes, and the messages of refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from raises import raises_naming

from actors.client_proxy import ClientProxy
from actors.placement import (
    STORE_HERE,
    STORE_LABEL,
    Node,
    NodeProbe,
    check_probes,
    probe_node,
    store_selector,
    write_marker,
)
from fedvit.errors import PlacementError
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.settings import load_settings, settings_to_json

HEAD = Node("a", "10.0.0.10", {STORE_LABEL: STORE_HERE})
PLAIN = Node("b", "10.0.0.11")


def test_one_node_without_the_label_needs_no_selector() -> None:
    assert store_selector([PLAIN], here="b") == {}


def test_the_labelled_node_is_where_the_store_is_opened_also_before_others_join() -> None:
    assert store_selector([HEAD], here="a") == store_selector([PLAIN, HEAD], here="a") == {STORE_LABEL: STORE_HERE}


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        ([PLAIN, Node("c", "10.0.0.12")], "none has the label"),
        ([HEAD, Node("c", "10.0.0.12", HEAD.labels)], "10.0.0.10, 10.0.0.12 have the label"),
    ],
)
def test_sqlite_on_several_nodes_is_refused_unless_exactly_one_has_the_label(nodes: list[Node], named: str) -> None:
    with raises_naming(PlacementError, "SQLite", named):
        store_selector(nodes, here="a")


def test_a_process_on_another_node_is_refused_with_the_node_to_run_on() -> None:
    with raises_naming(PlacementError, "10.0.0.10"):
        store_selector([HEAD, PLAIN], here="b")


def test_a_node_with_a_folder_of_its_own_is_named(tmp_path: Path) -> None:
    head, worker = tmp_path / "head", tmp_path / "worker"
    marker = write_marker(head)
    write_marker(worker)
    probe = probe_node(head, [])
    probes = {"head": probe, "worker": probe_node(worker, []), "silent": None}
    with pytest.raises(PlacementError) as caught:
        check_probes(probes, marker, head, probe.version)
    assert f"worker does not see the state folder {head}" in caught.value.message
    assert "silent does not answer" in caught.value.message
    assert "head does not" not in caught.value.message


def test_missing_data_and_another_version_are_named(tmp_path: Path) -> None:
    marker = write_marker(tmp_path)
    images = str(tmp_path / "images")
    probes = {"one": probe_node(tmp_path, [images]), "two": NodeProbe(marker, (), "0.0.1")}
    with raises_naming(PlacementError, f"one does not see {images}", "two has fedvit 0.0.1"):
        check_probes(probes, marker, tmp_path, probes["one"].version)


def test_nodes_that_see_everything_pass(tmp_path: Path) -> None:
    marker = write_marker(tmp_path)
    probe = probe_node(tmp_path, [str(tmp_path)])
    check_probes({"one": probe, "two": probe}, marker, tmp_path, probe.version)


def test_a_proxy_without_the_state_folder_makes_no_key_of_its_own(tmp_path: Path) -> None:
    home = tmp_path / "not-mounted"
    settings = load_settings(environ={}).model_copy(update={"home": home})
    with pytest.raises(PlacementError):
        ClientProxy(settings_to_json(settings)).prepare()
    assert not home.exists()


def test_a_proxy_that_sees_the_key_builds_its_client_host(tmp_path: Path) -> None:
    load_or_create_root_secret(tmp_path)
    own = {
        "home": str(tmp_path),
        "workload": {"clients_class": "tests.workload_clients:PullingClients"},
        "privacy": {"privacy_unit": "client"},
        "training": {"cohort": {"selection": "poisson", "sampling_prob": 0.5}},
    }
    settings = load_settings(environ={}, overrides=own)
    assert ClientProxy(settings_to_json(settings)).prepare() > 0
