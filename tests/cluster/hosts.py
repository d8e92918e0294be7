"""Hosts on one machine: network namespaces on a bridge of their own, each with its processes, files and an sshd.

Nothing of the machine's own network is touched: the bridge lies in a namespace too. Everything ends with the one
process that each host hangs on, and no process is ended by its name.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "rsync")
COMMAND_LIMIT_S = 300.0
END_LIMIT_S = 20.0
SHARED = Path("/srv/fedvit")
HOME = Path("/srv/home")
PACKAGES = Path("/srv/packages")

OWN_FOLDERS = ("/tmp", "/srv", "/run", "/dev/shm")
# Run as the first process of a host. What lies in these folders is the host's own from here on.
_INIT = """
set -eu
files=$1 name=$2 shared=$3 packages=$4
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
hostname "$name"
mount -t tmpfs tmpfs /srv
mkdir -p /srv/home /srv/fedvit /srv/etc /srv/packages
mount --bind -o ro "$packages" /srv/packages
mount --bind "$files" /srv/home
mount --bind "$shared" /srv/fedvit
sed 's#^root:\\(.*\\):/root:#root:\\1:/srv/home:#' /etc/passwd > /srv/etc/passwd
mount --bind /srv/etc/passwd /etc/passwd
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
exec "$(command -v sshd)" -D -e -f /srv/home/.ssh/sshd_config
"""

_SSHD = """
ListenAddress {address}
HostKey /srv/home/.ssh/host_key
AuthorizedKeysFile /srv/home/.ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
"""


def missing() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if os.geteuid() != 0:
        return "not root"
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(lacking)} not installed"
    for place, own in itertools.product((Path(sys.prefix), Path(__file__).parents[2]), OWN_FOLDERS):
        if place.resolve().is_relative_to(own):
            return f"a host has {own} to itself, and would not find {place}"
    tried = _run("unshare", "--net", "--mount", "--pid", "--fork", "true", check=False)
    return None if tried.returncode == 0 else "this machine allows no namespaces"


@dataclass
class Host:
    """One host: ``address`` is on the bridge, ``init`` the process that everything on it hangs on."""

    name: str
    address: str
    files: Path
    network: str
    holder: subprocess.Popen[bytes] = field(repr=False)

    @property
    def init(self) -> int:
        """The process id, seen from outside, of the host's first process."""
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        return int(children[0])

    def run(
        self, *command: str, limit_s: float = COMMAND_LIMIT_S, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host as somebody logged in would."""
        return subprocess.run(
            self.line(*command),
            env=_environment() | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Begin a command on the host; whoever asked for it ends it."""
        return subprocess.Popen(
            self.line(*command), env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self, *command: str) -> list[str]:
        """The command line that runs ``command`` on the host."""
        entered = ("--mount", "--pid", "--net", "--uts", "--ipc", f"--wdns={HOME}")
        return ["nsenter", f"--target={self.init}", *entered, *command]

    def processes(self) -> dict[int, str]:
        """What runs on the host besides its sshd, by process id as seen from outside."""
        ours = os.readlink(f"/proc/{self.init}/ns/pid")
        results = {}
        for path in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if path.name.isdecimal() and os.readlink(path / "ns" / "pid") == ours:
                    results[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return {pid: title for pid, title in results.items() if pid != self.init}

    def cut(self) -> None:
        """Take the host off the network, as a pulled cable does."""
        _run("ip", "-n", self.network, "link", "set", _port(self.name), "down")

    def rejoin(self) -> None:
        """Plug it in again."""
        _run("ip", "-n", self.network, "link", "set", _port(self.name), "up")

    def end(self) -> None:
        """End the host with all that runs on it."""
        self.holder.kill()
        self.holder.wait(END_LIMIT_S)


@contextlib.contextmanager
def hosts(folder: Path, names: tuple[str, ...]) -> Iterator[dict[str, Host]]:
    """Start hosts of these names, at 10.213.7.2 and up, that share ``folder/shared`` as /srv/fedvit."""
    switch = f"fvswitch{os.getpid()}"
    (folder / "shared").mkdir(parents=True)
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    with contextlib.ExitStack() as stack:
        _namespace(stack, switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        results = {}
        for index, name in enumerate(names):
            results[name] = _host(stack, folder, name, f"10.213.7.{index + 2}", switch)
        yield results


def leftovers(ended: Mapping[str, Host]) -> list[str]:
    """What is still there of hosts that were ended: processes, namespaces, mounts."""
    spaces = _run("ip", "netns", "list").stdout.decode().split()
    named = [space for space in spaces if space.startswith("fv") and space.endswith(str(os.getpid()))]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    folders = {str(host.files.parent) for host in ended.values()}
    mounted = [line for line in mounts if any(folder in line for folder in folders)]
    alive = [host.name for host in ended.values() if host.holder.poll() is None]
    return [*named, *mounted, *alive]


def _host(stack: contextlib.ExitStack, folder: Path, name: str, address: str, switch: str) -> Host:
    own = f"fv{name}{os.getpid()}"
    _namespace(stack, own)
    _wire(own, name, address, switch)
    files = folder / name
    _logins(files, folder / "key", address)
    command = ["ip", "netns", "exec", own, "unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child"]
    log = stack.enter_context((folder / f"{name}.sshd.log").open("wb"))
    holder = subprocess.Popen(
        [
            *command,
            "bash",
            "-c",
            _INIT,
            "init",
            str(files),
            name,
            str(folder / "shared"),
            str(Path(sys.prefix).resolve()),
        ],
        stdout=log,
        stderr=log,
        env=_environment(),
        start_new_session=True,
    )
    host = Host(name, address, files, switch, holder)
    stack.callback(host.end)
    return host


def _namespace(stack: contextlib.ExitStack, name: str) -> None:
    _run("ip", "netns", "add", name)
    stack.callback(_run, "ip", "netns", "delete", name, check=False)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _wire(own: str, name: str, address: str, switch: str) -> None:
    _run("ip", "-n", own, "link", "add", "eth0", "type", "veth", "peer", "name", _port(name), "netns", switch)
    _run("ip", "-n", own, "address", "add", f"{address}/24", "dev", "eth0")
    _run("ip", "-n", own, "link", "set", "eth0", "up")
    # Nothing lies beyond; some libraries find their own address only by asking for a route.
    _run("ip", "-n", own, "route", "add", "default", "dev", "eth0")
    _run("ip", "-n", switch, "link", "set", _port(name), "master", "bridge")
    _run("ip", "-n", switch, "link", "set", _port(name), "up")


def _logins(files: Path, key: Path, address: str) -> None:
    ssh = files / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    shutil.copy(key, ssh / "key")
    shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "host_key"))
    (ssh / "sshd_config").write_text(_SSHD.format(address=address))


def _port(name: str) -> str:
    return f"to-{name}"


def _environment() -> dict[str, str]:
    """What a login has, and nothing that would configure fedvit or Ray."""
    return {"PATH": os.environ["PATH"], "HOME": str(HOME), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, timeout=COMMAND_LIMIT_S, check=check)
