"""Where the ranks of a job meet: on the network that Ray's nodes know each other by."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str | None:
    """The network interface of this host that has an IPv4 address; None where none has it as its first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            # One without an address says so by an error.
            with suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def name_interface() -> None:
    """Tell gloo which interface to use, where nobody has.

    It would take the address that the host's own name stands for, and on many a distribution that is the loopback:
    ranks on other hosts are then told to call 127.0.0.1.
    """
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(GLOO_VARIABLE, name)


class _Backend(_TorchBackend):  # type: ignore[misc]  # Ray has no types for it.
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class RankConfig(TorchConfig):  # type: ignore[misc]  # As above.
    """Ray Train's set-up of torch's process group, with :func:`name_interface` before it."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """See Ray Train."""
        return _Backend
