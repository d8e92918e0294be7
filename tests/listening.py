"""Sockets that listen, read from /proc, and a network namespace of a test's own."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("ip", "unshare", "nsenter")
SECOND_ADDRESS = "10.213.9.2"
_LISTEN = "0A"
Listener = tuple[str, int]


def listeners(pid: int | str = "self") -> dict[Listener, int]:
    """Address and port of every socket that listens in the network namespace of a process, with its inode."""
    results = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTEN:
                packed, _, port = local.partition(":")
                words = struct.unpack(f">{len(packed) // 8}I", bytes.fromhex(packed))
                address = socket.inet_ntop(family, struct.pack(f"<{len(words)}I", *words))
                results[address, int(port, 16)] = int(inode)
    return results


def listeners_of(pids: Iterable[int]) -> set[Listener]:
    """What these processes listen on."""
    inodes = set()
    for pid in pids:
        # A process may have ended meanwhile.
        with suppress(OSError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    target = os.readlink(handle)
                    if target.startswith("socket:["):
                        inodes.add(int(target[8:-1]))
    return {listener for listener, inode in listeners().items() if inode in inodes}


def is_loopback(address: str) -> bool:
    """Whether only this machine, or this namespace, reaches an address; ::ffff:127.0.0.1 is one."""
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def no_namespace() -> str | None:
    """Why no network namespace can be made here; None where one can."""
    if os.geteuid() != 0:
        return "not root"
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(lacking)} not installed"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "this machine allows no network namespaces"


@contextmanager
def namespace() -> Iterator[int]:
    """A network namespace with loopback and :data:`SECOND_ADDRESS` on a second interface; the process that holds it.

    What enters it with ``nsenter --net --target PID`` reaches nothing else.
    """
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
    try:
        while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            assert holder.poll() is None
        for words in (
            "link set lo up",
            "link add eth9 type veth peer name eth8",
            f"address add {SECOND_ADDRESS}/24 dev eth9",
            "link set eth9 up",
            "link set eth8 up",
            "route add default dev eth9",
        ):
            command = ["nsenter", "--net", f"--target={holder.pid}", "ip", *words.split()]
            subprocess.run(command, check=True, timeout=30)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()
