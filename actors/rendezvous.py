"""Connection of ranks: one network interface for all of their traffic, and a store that listens on its address only."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915
# Rank 0's store serves for as long as its process keeps it.
_stores: list[Any] = []


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
    """Set the interface of gloo and NCCL, unless the environment sets one.

    By default gloo takes the address of the host's own name, which on many distributions is the loopback address:
    ranks on other hosts then try to connect to 127.0.0.1.
    """
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, name)


def open_store(timeout_s: float) -> tuple[str, int]:
    """Start the store that ranks find each other by, in the process of rank 0; return its address and port.

    It listens on the address of its node. One that torch starts by itself listens on every interface, and takes orders
    from everybody who reaches it.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = ray.util.get_node_ip_address()
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = listener.getsockname()[1]
    store = TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    _stores[:] = [store]
    return address, port


def join_group(backend: str, rank: int, ranks: int, address: str, port: int, timeout_s: float) -> None:
    """Join the process group whose store is at ``address``, in the process of each rank."""
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=timeout_s)
    store = _stores[0] if rank == 0 else TCPStore(address, port, is_master=False, timeout=timeout)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set up torch's process group as Ray Train does, but with :func:`open_store`."""
        worker_group.execute(name_interface)
        worker_group.execute(_set_torch_distributed_env_vars)
        ranks, timeout_s = len(worker_group), backend_config.timeout_s
        place = worker_group.execute_single(0, open_store, timeout_s)
        joining = [
            worker_group.execute_single_async(rank, join_group, backend_config.backend, rank, ranks, *place, timeout_s)
            for rank in range(ranks)
        ]
        ray.get(joining)


@dataclass
class RankConfig(TorchConfig):
    """The configuration of torch's process group; ``backend`` has to be named."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
