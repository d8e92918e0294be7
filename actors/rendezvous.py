"""Network interface on which the ranks of a job connect: the one of the Ray node's address."""

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
            # An interface without an address raises an error.
            with suppress(OSError):
                request = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(request[20:24]) == address:
                    return name
    return None


def name_interface() -> None:
    """Set gloo's interface, unless the environment sets one.

    By default gloo takes the address of the host's own name, which on many distributions is the loopback address:
    ranks on other hosts then try to connect to 127.0.0.1.
    """
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(GLOO_VARIABLE, name)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class RankConfig(TorchConfig):
    """Ray Train's set-up of torch's process group, with :func:`name_interface` before it."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """See Ray Train."""
        return _Backend
