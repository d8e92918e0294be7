"""Processes that end with the one that started them, the ports that they listen on, and the folder of Ray's."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from fedvit.atomic_write import write_atomically
from fedvit.errors import PortInUseError

STOP_S = 10.0
PR_SET_PDEATHSIG = 1
MESSAGE_CHARACTERS = 500
RAY_LOGS = Path("logs") / "ray.json"
APPLICATIONS = ("control", "inference")
"""The names of a system's applications on Ray Serve."""


def ray_folder() -> Path:
    """Where the Ray that fedvit starts keeps sockets and logs. Ray opens it to all users; the folder above is private.

    It is not in the state folder, because the path of a socket has at most 107 bytes.
    """
    return Path(tempfile.gettempdir()) / f"fedvit-ray-{os.geteuid()}" / "ray"


def record_ray_logs(home: Path, folder: Path, job_id: str) -> None:
    """Note in the state folder where Ray writes the logs of its system: other systems may use the same folder."""
    write_atomically(home / RAY_LOGS, json.dumps({"folder": str(folder), "job_id": job_id}))


def ray_log_files(home: Path) -> list[Path]:
    """The logs of the actors and replicas of the last system on a state folder: those on this machine with content."""
    try:
        facts = json.loads((home / RAY_LOGS).read_text())
        folder, job_id = Path(facts["folder"]), facts["job_id"]
    except (OSError, ValueError, KeyError):
        return []
    replicas = [path for app in APPLICATIONS for path in (folder / "serve").glob(f"replica_{app}_*.log")]
    files = [*sorted(folder.glob(f"worker-*-{job_id}-*.err")), *sorted(replicas)]
    return [path for path in files if path.stat().st_size]


def end_with_parent() -> None:
    """For ``preexec_fn``: ask the kernel to end this child when its parent dies, however it dies (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_child(process: subprocess.Popen[bytes]) -> None:
    """End it gracefully; by force where it takes longer than :data:`STOP_S`."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def why_ended(status: int, errors: str) -> str:
    """A phrase that says why a child process ended.

    Args:
        status: its exit status, negative for a signal, as in :class:`subprocess.Popen`.
        errors: what it printed on standard error; the last exception in it is quoted, or else its last line.
    """
    end = f"with status {status}" if status >= 0 else f"by signal {-status} ({signal.strsignal(-status)})"
    return f"{end}: {last_error(errors) or 'it printed no reason'}"


def last_error(output: str) -> str:
    """The last exception that a program printed, in one line and without its traceback; or else its last line."""
    _, traceback, after = output.rpartition("Traceback (most recent call last):\n")
    lines = [line.strip() for line in after.splitlines() if line.strip() and not (traceback and line[0].isspace())]
    return (lines[0] if traceback else lines[-1])[:MESSAGE_CHARACTERS].rstrip(".") if lines else ""


def why_taken(host: str, port: int) -> str | None:
    """Why no process could listen there, or None."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            return error.strerror
    return None


def check_port_free(host: str, port: int, setting: str | None = None) -> None:
    """Raise PortInUseError where a port cannot be listened on; ``setting`` names what would choose another."""
    reason = why_taken(host, port)
    if reason is not None:
        other = f", or set {setting} to another port" if setting else ""
        raise PortInUseError(
            f"Port {port} on {host} cannot be listened on: {reason}.", cure=f"Stop the program that uses it{other}."
        )
