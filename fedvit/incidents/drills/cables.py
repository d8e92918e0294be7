"""Network namespaces with a cable each to this one, which can be cut in one direction. Needs root and iproute2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedvit.errors import DrillError
from fedvit.incidents.drills.site import await_that
from fedvit.processes import end_child, end_with_parent

PORT = 8000
NETWORK = "10.213"


@dataclass(frozen=True, slots=True)
class Cable:
    """One namespace. ``number`` makes its name and its addresses its own."""

    number: int

    @property
    def namespace(self) -> str:
        """Its name."""
        return f"fedvit-drill-{self.number}"

    @property
    def here(self) -> str:
        """Our end."""
        return f"{NETWORK}.{self.number}.1"

    @property
    def there(self) -> str:
        """The other end."""
        return f"{NETWORK}.{self.number}.2"

    @property
    def links(self) -> tuple[str, str]:
        """The interfaces, ours first."""
        return f"fvdrill{self.number}", f"fvcar{self.number}"

    def inside(self, command: Sequence[str]) -> list[str]:
        """The same command in the namespace."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def cut_from_there(self) -> None:
        """Let nothing out of the namespace; what is sent to it arrives."""
        _ip("-n", self.namespace, "route", "add", "blackhole", f"{self.here}/32")

    def mend_from_there(self) -> None:
        """Undo it."""
        _ip("-n", self.namespace, "route", "del", "blackhole", f"{self.here}/32")

    def cut_from_here(self) -> None:
        """Send nothing into the namespace; what comes from it arrives."""
        _ip("route", "add", "blackhole", f"{self.there}/32")

    def mend_from_here(self) -> None:
        """Undo it."""
        _ip("route", "del", "blackhole", f"{self.there}/32")

    def received(self) -> tuple[int, int]:
        """How many packets have arrived: here, and there."""
        ours, theirs = self.links
        path = f"/sys/class/net/{theirs}/statistics/rx_packets"
        there = subprocess.run(self.inside(["cat", path]), capture_output=True, text=True, check=True).stdout
        return int(Path(f"/sys/class/net/{ours}/statistics/rx_packets").read_text()), int(there)


@contextmanager
def laid(numbers: Sequence[int], environment: Mapping[str, str]) -> Iterator[list[Cable]]:
    """Namespaces with cables, from whose loopback address port 8000 leads to ours.

    Raises:
        DrillError: the machine does not let us.
    """
    with ExitStack() as stack:
        cables = [Cable(number) for number in numbers]
        for cable in cables:
            _lay(stack, cable)
            near, far = f"{cable.here}:{PORT}", f"127.0.0.1:{PORT}"
            running(stack, relay_command(near, far), environment)
            running(stack, cable.inside(relay_command(far, near)), environment)
            await_that(f"{cable.namespace} reaches the server", partial(_reaches, cable))
        yield cables


def running(
    stack: ExitStack, command: Sequence[str], environment: Mapping[str, str], output: Path | None = None
) -> subprocess.Popen[bytes]:
    """A process that ends with the stack; what it says goes into a file."""
    with Path(output or "/dev/null").open("ab") as log:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
        )
    stack.callback(end_child, process)
    return process


def relay_command(listen: str, target: str) -> list[str]:
    """The command line of a relay."""
    return [sys.executable, "-m", "fedvit.incidents.drills.relay", listen, target]


def _lay(stack: ExitStack, cable: Cable) -> None:
    ours, theirs = cable.links
    _ip("netns", "add", cable.namespace)
    # Its end of the cable goes with it, and with that ours.
    stack.callback(_ip, "netns", "del", cable.namespace)
    _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", cable.namespace)
    _ip("addr", "add", f"{cable.here}/30", "dev", ours)
    _ip("link", "set", ours, "up")
    _ip("-n", cable.namespace, "addr", "add", f"{cable.there}/30", "dev", theirs)
    _ip("-n", cable.namespace, "link", "set", theirs, "up")
    _ip("-n", cable.namespace, "link", "set", "lo", "up")


def _reaches(cable: Cable) -> bool:
    ask = cable.inside(["curl", "-s", "-f", "-o", "/dev/null", "-m", "5", f"http://127.0.0.1:{PORT}/healthz"])
    return subprocess.run(ask).returncode == 0


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise DrillError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")
