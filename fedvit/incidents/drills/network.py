"""Network namespaces, each linked to this one; a link can be cut in one direction. Needs root and iproute2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedvit.errors import DrillError
from fedvit.incidents.drills.system import wait_until
from fedvit.processes import end_child, end_with_parent

PORT = 8000
NETWORK = "10.213"
CHILDREN = "fedvit.incidents.drills.children"


@dataclass(frozen=True, slots=True)
class Link:
    """A namespace and its veth pair; ``number`` makes names and addresses unique."""

    number: int

    @property
    def namespace(self) -> str:
        """The name of the namespace."""
        return f"fedvit-drill-{self.number}"

    @property
    def near(self) -> str:
        """The address at this machine's end."""
        return f"{NETWORK}.{self.number}.1"

    @property
    def far(self) -> str:
        """The address inside the namespace."""
        return f"{NETWORK}.{self.number}.2"

    @property
    def interfaces(self) -> tuple[str, str]:
        """The interfaces, the near one first."""
        return f"fvdrill{self.number}", f"fvcar{self.number}"

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command in the namespace."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def block_outgoing(self, *, undo: bool = False) -> None:
        """Drop what leaves the namespace; packets to it still arrive."""
        _ip("-n", self.namespace, "route", "del" if undo else "add", "blackhole", f"{self.near}/32")

    def block_incoming(self, *, undo: bool = False) -> None:
        """Drop what is sent into the namespace; packets from it still arrive."""
        _ip("route", "del" if undo else "add", "blackhole", f"{self.far}/32")

    def received(self) -> tuple[int, int]:
        """Packets received at the near and at the far end."""
        near, far = self.interfaces
        path = f"/sys/class/net/{far}/statistics/rx_packets"
        count = subprocess.run(self.inside(["cat", path]), capture_output=True, text=True, check=True).stdout
        return int(Path(f"/sys/class/net/{near}/statistics/rx_packets").read_text()), int(count)

    def create(self, stack: ExitStack) -> None:
        """Create namespace and veth pair; both are deleted when the stack closes."""
        near, far = self.interfaces
        _ip("netns", "add", self.namespace)
        # Deleting the namespace deletes its end of the pair, and with it the near end.
        stack.callback(_ip, "netns", "del", self.namespace)
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", self.namespace)
        _ip("addr", "add", f"{self.near}/30", "dev", near)
        _ip("link", "set", near, "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.far}/30", "dev", far)
        _ip("-n", self.namespace, "link", "set", far, "up")
        _ip("-n", self.namespace, "link", "set", "lo", "up")

    def reaches_server(self) -> bool:
        """Whether the server answers a request from the namespace."""
        url = f"http://127.0.0.1:{PORT}/healthz"
        return subprocess.run(self.inside(["curl", "-s", "-f", "-o", "/dev/null", "-m", "5", url])).returncode == 0


@contextmanager
def linked_namespaces(numbers: Sequence[int], environment: Mapping[str, str]) -> Iterator[list[Link]]:
    """Namespaces whose port 8000 on the loopback address is relayed to this machine's.

    Raises:
        DrillError: an ``ip`` command failed.
    """
    with ExitStack() as stack:
        links = [Link(number) for number in numbers]
        for link in links:
            link.create(stack)
            near, loopback = f"{link.near}:{PORT}", f"127.0.0.1:{PORT}"
            relay = [sys.executable, "-m", CHILDREN, "relay"]
            start_child(stack, [*relay, near, loopback], environment)
            start_child(stack, link.inside([*relay, loopback, near]), environment)
            wait_until(f"{link.namespace} reaches the server", partial(Link.reaches_server, link))
        yield links


def start_child(
    stack: ExitStack, command: Sequence[str], environment: Mapping[str, str], output: Path | None = None
) -> None:
    """Start a process that ends with the stack; its output is appended to a file."""
    with Path(output or "/dev/null").open("ab") as log:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
        )
    stack.callback(end_child, process)


def _ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    if result.returncode:
        raise DrillError(f"`ip {' '.join(words)}` failed: {result.stderr.strip()}")
