"""The network interface on which ranks connect."""

from __future__ import annotations

import os

import pytest
import ray
from listening import listeners
from torch.distributed import TCPStore

from actors import rendezvous


def test_the_interface_of_an_address_is_found() -> None:
    assert rendezvous.interface_of("127.0.0.1") == "lo"


def test_an_address_of_another_host_has_none() -> None:
    assert rendezvous.interface_of("203.0.113.7") is None


@pytest.mark.parametrize("variable", rendezvous.INTERFACE_VARIABLES)
@pytest.mark.parametrize(("before", "after"), [(None, "lo"), ("eth7", "eth7")])
def test_the_interface_is_set_unless_the_environment_sets_one(
    variable: str, before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(os, "environ", {} if before is None else {variable: before})
    rendezvous.name_interface()
    assert os.environ[variable] == after


def test_an_address_that_no_interface_has_leaves_the_environment_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.7")
    monkeypatch.setattr(os, "environ", {})
    rendezvous.name_interface()
    assert os.environ == {}


def test_the_store_of_the_ranks_listens_on_the_address_of_its_node_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    address, port = rendezvous.open_store(timeout_s=20.0)
    assert {listening for listening, at in listeners() if at == port} == {address}
    TCPStore(address, port, is_master=False).set("key", "value")
