"""Every error that fedvit raises on purpose, as one tree below :class:`FedvitError`.

A :class:`UsageError` says that what was asked cannot be done as asked (exit status 2, HTTP 4xx). An
:class:`HttpFaultError` says that the HTTP exchange itself is at fault.

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

    def __init_subclass__(
        cls,
        *,
        code: str | None = None,
        title: str | None = None,
        http_status: int | None = None,
        exit_status: int | None = None,
    ) -> None:
        # All but the title are inherited.
        cls.code, cls.title = code or cls.code, title or cls.__name__.removesuffix("Error")
        cls.http_status, cls.exit_status = http_status or cls.http_status, exit_status or cls.exit_status

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


class UsageError(FedvitError, code="invalid-request", http_status=400, exit_status=2):
    """What was asked cannot be done as asked."""


class ConfigError(UsageError, code="invalid-config", http_status=422):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(UsageError, code="invalid-data", http_status=422):
    """A data set is missing, empty, undecodable or lacks a class."""


class ModelError(UsageError, code="invalid-model", http_status=422):
    """A model is unknown, or cannot be built, trained or exported as asked."""


class WorkloadError(UsageError, code="invalid-workload", http_status=422):
    """A workload returned what cannot be used, or its code failed."""


class SecureAggregationError(UsageError, code="secure-aggregation-failed", http_status=409):
    """Secure aggregation failed or was refused; nothing of any client was revealed."""


class StateError(UsageError, code="invalid-state", http_status=409):
    """The state folder is unreadable, corrupt, in use, or belongs to another fleet."""


class StateUnavailableError(StateError, title="State unavailable", http_status=503):
    """The state cannot be read or written now; the same request may succeed later."""


class MailboxError(StateError, code="mailbox-unreachable", http_status=503):
    """The mailbox cannot be reached."""


class PortInUseError(UsageError, code="port-in-use", http_status=409):
    """A port that must be listened on is taken."""


class PlacementError(UsageError, code="cannot-place", http_status=503):
    """Ray cannot place an actor or a replica within its time limit."""


class NotFoundError(UsageError, code="not-found", http_status=404):
    """The named thing does not exist."""


class NoReleaseError(NotFoundError, code="no-release", title="No release"):
    """No model version is released yet."""


class ConflictError(UsageError, code="conflict", http_status=409):
    """The request contradicts the present state."""


class ReleaseRefusedError(ConflictError, code="release-refused"):
    """A model did not pass the release gate; what served before keeps serving."""


class StaleRequestError(ConflictError, code="stale-request", http_status=412):
    """The request names a state (``If-Match``) that is no longer the present one."""


class LedgerFrozenError(ConflictError, code="ledger-frozen"):
    """An incident froze the privacy ledger; nothing is charged, so nothing is released, until it is lifted."""


class UnauthorizedError(UsageError, code="unauthorized", http_status=401):
    """The request carries no good token."""


class ForbiddenError(UsageError, code="forbidden", http_status=403):
    """The identity is known and may not do this."""


class RateLimitedError(UsageError):
    """Too many requests of one identity; ``details["retry_after_s"]`` says when to try again."""

    code, http_status = "rate-limited", 429


class InvalidRequestError(UsageError, title="Invalid request", http_status=422):
    """A field of a request is missing, unknown or out of range."""


class HttpFaultError(FedvitError):
    """The HTTP exchange itself is at fault. A client raises :class:`ControlApiError` for it."""


class BodyTooLargeError(HttpFaultError, code="body-too-large", title="Body too large", http_status=413):
    """The body is too large."""


class CompressedBodyError(HttpFaultError, code="compressed-body", title="Unsupported encoding", http_status=415):
    """The body is compressed."""


class InvalidJsonError(HttpFaultError, code="invalid-json", title="Invalid JSON", http_status=400):
    """The body is not JSON, or nests too deeply."""


class InvalidIdempotencyKeyError(HttpFaultError, code="invalid-idempotency-key", title="Invalid key", http_status=400):
    """The Idempotency-Key is malformed, or there are several."""


class BodyTimeoutError(HttpFaultError, code="request-timeout", title="Request timeout", http_status=408):
    """The body does not arrive in time."""


class ResponseTimeoutError(HttpFaultError, code="timeout", title="Timeout", http_status=504):
    """The request is not answered in time; it may still take effect."""


class BudgetExhaustedError(FedvitError, code="privacy-budget-exhausted", http_status=409):
    """The privacy budget does not admit the release that was asked for."""


class AggregationError(FedvitError, code="aggregation-failed"):
    """An aggregation rule returned what cannot be the weights or the state after a round."""


class UpdateRejectedError(FedvitError, code="update-rejected", http_status=422):
    """An update failed update validation."""


class IntegrityError(FedvitError, code="integrity", http_status=502):
    """Content does not match its hash or its signature."""


class FeedUnavailableError(FedvitError, code="feed-unavailable", http_status=503):
    """The source of releases does not answer, or not as it should; a later poll may succeed."""


class InferenceError(FedvitError, code="inference-failed"):
    """The model ran and gave no usable answer."""


class NoModelError(FedvitError, code="no-model", http_status=503):
    """There is no model to serve yet."""


class OverloadedError(FedvitError, code="overloaded", http_status=503):
    """More requests wait than can be answered in time."""


class ControlApiError(FedvitError, code="control-api", http_status=502):
    """The control API answered with a problem that has no class of its own here, or with no sense at all."""

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


class DrillError(FedvitError, code="drill-failed"):
    """A drill did not show what it has to show: an alert, an effect, or an end."""


class StillRunningError(FedvitError, code="still-running", http_status=504):
    """A long operation has not ended within the time that was given; it goes on."""


class InterruptedRunError(FedvitError, code="interrupted", exit_status=130):
    """The user or a signal ended the work early; the state continues from the last committed step."""
