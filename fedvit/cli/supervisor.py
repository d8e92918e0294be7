"""Processes that run a system: the supervisor that ``fedvit up`` leaves running, or the command itself.

``python -m fedvit.cli.supervisor`` is the supervisor. It reads its settings from standard input and reports by JSON
lines on standard output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from fedvit.cli.api_session import check_token
from fedvit.cli.output import print_step, stdout_for_json
from fedvit.cli.state import find_system, running_system
from fedvit.errors import FedvitError, InterruptedRunError, StateError, UsageError
from fedvit.private_files import open_private_folder
from fedvit.processes import why_ended

if TYPE_CHECKING:
    from fedvit.config import Settings
    from fedvit.ports import SystemUrls

DOWN_TIMEOUT_S = 60.0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C, and both end the command with one sentence."""
    try:
        with sigterm_unwinds():
            yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "Interrupted; everything committed is safe.", cure="The same command continues from there."
        ) from None


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def end_this_process() -> None:
    """End this process by SIGTERM, as ``fedvit down`` does; for a system that its API shuts down."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def temporary_system(
    settings: Settings, *, quiet: bool, seconds: dict[str, float] | None = None
) -> Iterator[SystemUrls]:
    """The system that runs on this state folder already, or one that runs as long as the block.

    ``quiet`` prints no steps; the time of the start is added to ``seconds`` as ``start``.
    """
    running = running_system(settings.home)
    if running is not None:
        yield running.urls
        return
    check_token(settings)
    started_s = time.monotonic()
    on_step = functools.partial(print_step, quiet=quiet)
    system = find_system(settings)
    with stdout_for_json(quiet), system.running(on_step, end_this_process, train=False) as urls:
        if seconds is not None:
            seconds["start"] = time.monotonic() - started_s
        yield urls


def supervisor_log(settings: Settings) -> Path:
    """The log file of the supervisor."""
    return settings.home / "logs" / "supervisor.log"


def spawn_supervisor(settings: Settings, on_step: Callable[[str], None]) -> None:
    """Start the supervisor and return once its system is ready; ``on_step`` is called with each step.

    Raises:
        FedvitError: the system could not start; with the supervisor's own message.
    """
    # Its log file is made once the system is ready: a start that is refused leaves no file behind.
    with tempfile.TemporaryFile() as errors:
        _await_ready(settings, on_step, errors)


def _await_ready(settings: Settings, on_step: Callable[[str], None], errors: BinaryIO) -> None:
    command, pipe = [sys.executable, "-m", "fedvit.cli.supervisor"], subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    # A child that ended at once does not read; how it ended is reported below.
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(settings.model_dump_json())
    for line in child.stdout:
        report = _report(line)
        if "step" in report:
            on_step(report["step"])
        elif "error" in report:
            child.wait()
            failure = UsageError if report["exit_status"] == UsageError.exit_status else FedvitError
            raise failure(report["error"], cure=report["cure"])
        elif report.get("ready"):
            return
    status = child.wait()
    errors.seek(0)
    output = errors.read()
    cure = None
    # The state folder may be unusable; the reason is in the message all the same.
    with contextlib.suppress(OSError, StateError), open(_open_log(settings), "ab") as log:
        log.write(output)
        cure = f"See {supervisor_log(settings)}."
    reason = why_ended(status, output.decode(errors="replace"))
    raise FedvitError(f"The system ended at its start {reason}.", cure=cure)


def _open_log(settings: Settings) -> int:
    """A descriptor that appends to the log file of the supervisor."""
    log = supervisor_log(settings)
    open_private_folder(settings.home)
    log.parent.mkdir(exist_ok=True)
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _report(line: str) -> dict[str, Any]:
    """A JSON object that the supervisor printed; empty for what some library printed in between."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def supervise(settings: Settings, on_ready: Callable[[], None] = lambda: None) -> None:
    """Run the system until a signal ends it, and report its steps, or why it could not start, as JSON lines."""

    def report(**fields: Any) -> None:
        # The parent process may be gone by the time the system stops.
        with contextlib.suppress(BrokenPipeError, ValueError):
            print(json.dumps(fields), flush=True)

    try:
        system = find_system(settings)
        with interruptible(), system.running(lambda step: report(step=step), end_this_process, train=True):
            on_ready()
            report(ready=True)
            signal.pause()
    except InterruptedRunError:
        return
    except FedvitError as error:
        report(error=error.message, cure=error.cure, exit_status=error.exit_status)
        raise


def stop_process(pid: int) -> None:
    """Send SIGTERM to a process and wait for its end; FedvitError where that takes too long."""
    try:
        handle = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([handle], [], [], DOWN_TIMEOUT_S)
    finally:
        os.close(handle)
    if not ended:
        raise FedvitError(
            f"Process {pid} did not end within {DOWN_TIMEOUT_S:g} s.", cure=f"See the logs, then `kill -9 {pid}`."
        )


def main() -> int:
    """Run the system until a signal ends it; return the exit status."""
    from fedvit.settings import settings_from_json

    settings = settings_from_json(sys.stdin.read())

    def log_to_file() -> None:
        os.dup2(_open_log(settings), sys.stderr.fileno())

    try:
        supervise(settings, on_ready=log_to_file)
    except FedvitError as error:
        return error.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
