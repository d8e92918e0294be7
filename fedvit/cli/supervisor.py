"""The process that ``fedvit up`` leaves running. Reads its settings from standard input; not for people."""

from __future__ import annotations

import os
import sys

from fedvit.cli.system import supervise, supervisor_log
from fedvit.config import settings_from_json
from fedvit.errors import FedvitError


def main() -> int:
    """Run the system until a signal ends it; the exit status of the error that did, otherwise."""
    settings = settings_from_json(sys.stdin.read())

    def log_to_file() -> None:
        log = supervisor_log(settings)
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, sys.stderr.fileno())

    try:
        supervise(settings, on_ready=log_to_file)
    except FedvitError as error:
        return error.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
