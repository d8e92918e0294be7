"""The backup channel: a mailbox in blob storage for vehicles that cannot reach this API."""

from __future__ import annotations

from fastapi import FastAPI

from fedvit.api.clients import BackupView
from fedvit.operations.mailbox import Mailbox
from serve_apps.control.http.access import OPERATOR, VIEWER, Note
from serve_apps.control.http.route import route


def add_communication_routes(api: FastAPI, mailbox: Mailbox) -> None:
    """Add the routes of the backup channel."""

    @route(api, "POST /api/communication/enable-backup", "communication", OPERATOR, 503)
    def enable(note: Note) -> BackupView:
        """Take the messages that vehicles left in the mailbox, those left before included; harmless when repeated."""
        note.before = {"enabled": mailbox.enabled()}
        state = mailbox.enable()
        note.after = {"enabled": state.enabled, "url": state.url}
        return BackupView.of(state)

    @route(api, "POST /api/communication/disable-backup", "communication", OPERATOR, 503)
    def disable(note: Note) -> BackupView:
        """Leave messages where they are; harmless when repeated."""
        note.before = {"enabled": mailbox.enabled()}
        state = mailbox.disable()
        note.after = {"enabled": state.enabled, "url": state.url}
        return BackupView.of(state)

    @route(api, "GET /api/communication/backup", "communication", VIEWER, 422, 503)
    def backup() -> BackupView:
        """How the channel stands."""
        return BackupView.of(mailbox.state())
