"""Every error that fedvit raises on purpose, as one tree.

::

    FedvitError                 something went wrong that fedvit understands
    +-- UsageError              what was asked cannot be done as asked (exit status 2, HTTP 4xx)
    |   +-- ConfigError         a setting is unknown, of the wrong type or out of range
    |   +-- DataError           a data set is missing, empty, undecodable or lacks a class
    |   +-- ModelError          a model is unknown or cannot be trained or exported as asked
    |   +-- StateError          the state folder is unreadable, corrupt, in use or another fleet's
    |   |   +-- StateUnavailableError  the state cannot be written now; the same request may succeed later (HTTP 503)
    |   |   +-- MailboxError           the mailbox cannot be reached (HTTP 503)
    |   +-- PortInUseError      a port that must be listened on is taken
    |   +-- PlacementError      Ray cannot place an actor or a replica
    |   +-- NotFoundError       the named thing does not exist (HTTP 404)
    |   +-- ConflictError       the request contradicts the present state (HTTP 409)
    |   |   +-- ReleaseRefusedError  a model did not pass the release gate (HTTP 409)
    |   |   +-- StaleRequestError    the request names a state that is no longer the present one (HTTP 412)
    |   |   +-- LedgerFrozenError    an incident froze the privacy ledger: nothing may be charged (HTTP 409)
    |   +-- UnauthorizedError   the request carries no good token (HTTP 401)
    |   +-- ForbiddenError      the identity may not do this (HTTP 403)
    |   +-- RateLimitedError    too many requests of one identity (HTTP 429)
    |   +-- InvalidRequestError a field is missing, unknown or out of range (HTTP 422)
    |   +-- PayloadTooLargeError  the body is larger than an image may be (HTTP 413)
    |   +-- SlowBodyError       the image does not arrive in time (HTTP 408)
    +-- HttpFaultError          the HTTP exchange itself is at fault; a client raises ControlApiError for it
    |   +-- BodyTooLargeError   the body is too large (HTTP 413)
    |   +-- CompressedBodyError the body is compressed (HTTP 415)
    |   +-- InvalidJsonError    the body is not JSON (HTTP 400)
    |   +-- InvalidIdempotencyKeyError  the Idempotency-Key is malformed (HTTP 400)
    |   +-- BodyTimeoutError    the body does not arrive in time (HTTP 408)
    |   +-- ResponseTimeoutError  the request is not answered in time (HTTP 504)
    +-- BudgetExhaustedError    the privacy budget does not admit the release (HTTP 409)
    +-- UpdateRejectedError     an update failed update validation (HTTP 422)
    +-- IntegrityError          content does not match its hash or its signature (HTTP 502)
    +-- FeedUnavailableError    the source of releases does not answer, or not as it should (HTTP 503)
    +-- InferenceError          the model ran and gave no usable answer
    +-- NoModelError            there is no model to serve yet (HTTP 503)
    +-- OverloadedError         more requests wait than can be answered in time (HTTP 503)
    +-- ControlApiError         the control API answered with something that has no class here
    +-- ControlUnreachableError the control API does not answer
    +-- DrillError              a drill did not show what it has to show
    +-- StillRunningError       a long operation has not ended within the time that was given
    +-- InterruptedRunError     the user or a signal ended the work early (exit status 130)

Each message is one sentence that names what was wrong; ``cure`` is one that names what would be right. ``code``,
``title`` and ``http_status`` of a class are the ``type``, ``title`` and ``status`` of its problem document; see
:mod:`fedvit.api.problems`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class FedvitError(Exception):
    """Base of the tree.

    Args:
        message: one sentence: what was wrong, with the value and the place.
        cure: one sentence: what would be right.
        details: machine-readable facts for a problem document; JSON types only.
    """

    code: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    http_status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        if "title" not in vars(cls):
            cls.title = cls.__name__.removesuffix("Error")

    def __init__(self, message: str, *, cure: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} {self.cure}" if self.cure else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries inside Ray; the default protocol loses keyword arguments.
        return _rebuild, (type(self), self.message, self.cure, self.details)


def _rebuild(kind: type[FedvitError], message: str, cure: str | None, details: dict[str, Any]) -> FedvitError:
    return kind(message, cure=cure, **details)


class UsageError(FedvitError):
    """What was asked cannot be done as asked."""

    code, http_status = "invalid-request", 400
    exit_status = 2


class ConfigError(UsageError):
    """A setting is unknown, of the wrong type or out of range."""

    code, http_status = "invalid-config", 422


class DataError(UsageError):
    """A data set is missing, empty, undecodable or lacks a class."""

    code, http_status = "invalid-data", 422


class ModelError(UsageError):
    """A model is unknown, or cannot be built, trained or exported as asked."""

    code, http_status = "invalid-model", 422


class StateError(UsageError):
    """The state folder is unreadable, corrupt, in use, or belongs to another fleet."""

    code, http_status = "invalid-state", 409


class StateUnavailableError(StateError):
    """The state cannot be read or written now; the same request may succeed later."""

    title, http_status = "State unavailable", 503


class MailboxError(StateError):
    """The mailbox cannot be reached."""

    code, http_status = "mailbox-unreachable", 503


class PortInUseError(UsageError):
    """A port that must be listened on is taken."""

    code, http_status = "port-in-use", 409


class PlacementError(UsageError):
    """Ray cannot place an actor or a replica within its time limit."""

    code, http_status = "cannot-place", 503


class NotFoundError(UsageError):
    """The named thing does not exist."""

    code, http_status = "not-found", 404


class ConflictError(UsageError):
    """The request contradicts the present state."""

    code, http_status = "conflict", 409


class ReleaseRefusedError(ConflictError):
    """A model did not pass the release gate; what served before keeps serving."""

    code = "release-refused"


class StaleRequestError(ConflictError):
    """The request names a state (``If-Match``) that is no longer the present one."""

    code, http_status = "stale-request", 412


class LedgerFrozenError(ConflictError):
    """An incident froze the privacy ledger; nothing is charged, so nothing is released, until it is lifted."""

    code = "ledger-frozen"


class UnauthorizedError(UsageError):
    """The request carries no good token."""

    code, http_status = "unauthorized", 401


class ForbiddenError(UsageError):
    """The identity is known and may not do this."""

    code, http_status = "forbidden", 403


class RateLimitedError(UsageError):
    """Too many requests of one identity; ``details["retry_after_s"]`` says when to try again."""

    code, http_status = "rate-limited", 429


class InvalidRequestError(UsageError):
    """A field of a request is missing, unknown or out of range."""

    title, http_status = "Invalid request", 422


class PayloadTooLargeError(UsageError):
    """The body is larger than an image may be."""

    code, http_status = "payload-too-large", 413


class SlowBodyError(UsageError):
    """The image does not arrive in time."""

    code, http_status = "slow-body", 408


class HttpFaultError(FedvitError):
    """The HTTP exchange itself is at fault. A client raises :class:`ControlApiError` for it."""


class BodyTooLargeError(HttpFaultError):
    """The body is too large."""

    code, title, http_status = "body-too-large", "Body too large", 413


class CompressedBodyError(HttpFaultError):
    """The body is compressed."""

    code, title, http_status = "compressed-body", "Unsupported encoding", 415


class InvalidJsonError(HttpFaultError):
    """The body is not JSON, or nests too deeply."""

    code, title, http_status = "invalid-json", "Invalid JSON", 400


class InvalidIdempotencyKeyError(HttpFaultError):
    """The Idempotency-Key is malformed, or there are several."""

    code, title, http_status = "invalid-idempotency-key", "Invalid key", 400


class BodyTimeoutError(HttpFaultError):
    """The body does not arrive in time."""

    code, title, http_status = "request-timeout", "Request timeout", 408


class ResponseTimeoutError(HttpFaultError):
    """The request is not answered in time; it may still take effect."""

    code, title, http_status = "timeout", "Timeout", 504


class BudgetExhaustedError(FedvitError):
    """The privacy budget does not admit the release that was asked for."""

    code, http_status = "privacy-budget-exhausted", 409


class UpdateRejectedError(FedvitError):
    """An update failed update validation."""

    code, http_status = "update-rejected", 422


class IntegrityError(FedvitError):
    """Content does not match its hash or its signature."""

    code, http_status = "integrity", 502


class FeedUnavailableError(FedvitError):
    """The source of releases does not answer, or not as it should; a later poll may succeed."""

    code, http_status = "feed-unavailable", 503


class InferenceError(FedvitError):
    """The model ran and gave no usable answer."""

    code = "inference-failed"


class NoModelError(FedvitError):
    """There is no model to serve yet."""

    code, http_status = "no-model", 503


class OverloadedError(FedvitError):
    """More requests wait than can be answered in time."""

    code, http_status = "overloaded", 503


class ControlApiError(FedvitError):
    """The control API answered with a problem that has no class of its own here, or with no sense at all."""

    code, http_status = "control-api", 502

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self.details.get("status", 0))

    @property
    def type(self) -> str:
        """The problem document's ``type``; ``about:blank`` where there was no such document."""
        return str(self.details.get("type", "about:blank"))

    @property
    def detail(self) -> str:
        """The problem document's ``detail``."""
        return self.message

    @property
    def request_id(self) -> str | None:
        """What the server's log knows the request by."""
        request_id = self.details.get("request_id")
        return None if request_id is None else str(request_id)


class ControlUnreachableError(FedvitError):
    """The control API does not answer; ``details["idempotency_key"]`` repeats a change that may have been made."""

    code, http_status = "control-unreachable", 503


class DrillError(FedvitError):
    """A drill did not show what it has to show: an alert, an effect, or an end."""

    code = "drill-failed"


class StillRunningError(FedvitError):
    """A long operation has not ended within the time that was given; it goes on."""

    code, http_status = "still-running", 504


class InterruptedRunError(FedvitError):
    """The user or a signal ended the work early; the state continues from the last committed step."""

    code = "interrupted"
    exit_status = 130
