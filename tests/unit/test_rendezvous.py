"""The network interface on which ranks connect."""

from __future__ import annotations

import os

import pytest
import ray

from actors import trainer


def test_the_interface_of_an_address_is_found() -> None:
    assert trainer.interface_of("127.0.0.1") == "lo"


def test_an_address_of_another_host_has_none() -> None:
    assert trainer.interface_of("203.0.113.7") is None


@pytest.mark.parametrize(("before", "address", "after"), [(None, "127.0.0.1", "lo"), ("eth7", "127.0.0.1", "eth7")])
def test_gloos_interface_is_set_unless_the_environment_sets_one(
    before: str | None, address: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.delenv(trainer.GLOO_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(trainer.GLOO_VARIABLE, before)
    trainer.name_interface()
    # Removed here: monkeypatch restores only what was set through it.
    assert os.environ.pop(trainer.GLOO_VARIABLE) == after


def test_an_address_that_no_interface_has_leaves_gloo_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.7")
    monkeypatch.delenv(trainer.GLOO_VARIABLE, raising=False)
    trainer.name_interface()
    assert trainer.GLOO_VARIABLE not in os.environ
