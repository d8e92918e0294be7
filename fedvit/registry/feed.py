"""Where releases come from: a control server over HTTP, or a folder that was carried to the vehicle.

A feed is not trusted with anything: what it hands out is checked by :class:`fedvit.registry.client.ReleaseClient`.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import httpx

from fedvit.errors import FedvitError, IntegrityError, NotFoundError, UsageError
from fedvit.wire.manifest import MAX_ENVELOPE_BYTES

ENVELOPE_FILE = "release.json"
MODEL_FILE = "model.onnx"
TRUSTED_KEY_FILE = "trusted_key.txt"


class FeedUnavailableError(FedvitError):
    """The source of releases does not answer, or not as it should; a later poll may succeed."""

    code = "feed-unavailable"
    http_status = 503


class Feed(Protocol):
    """A source of releases."""

    def current(self, variant: str | None) -> str | None:
        """The envelope of the current release; None when there is none (yet). Without a variant: what the fleet runs.

        Raises:
            FeedUnavailableError: no answer.
            IntegrityError: the answer is larger than an envelope may be.
        """
        ...

    def blob(self, digest: str, max_bytes: int) -> bytes:
        """The artifact of that SHA-256, unverified, at most ``max_bytes``.

        Raises:
            NotFoundError: there is none (any more).
            FeedUnavailableError: no answer.
            IntegrityError: it is larger than ``max_bytes``.
        """
        ...

    def close(self) -> None:
        """Give connections back."""
        ...


def open_feed(
    source: str, timeout_s: float = 10.0, *, token_file: Path | None = None, ca_file: Path | None = None
) -> Feed:
    """The feed that ``source`` names: an http(s) URL of a control server, or a release folder.

    ``token_file`` and ``ca_file`` are for a control server that demands a token, or whose certificate a private
    authority signed.

    Raises:
        UsageError: a URL that cannot be one, or a folder or file that does not exist.
    """
    if "://" in source:
        return HttpFeed(source, timeout_s, token_file=token_file, ca_file=ca_file)
    if not Path(source).is_dir():
        raise UsageError(
            f"The source {source!r} is neither a folder nor a URL.",
            cure="Name a folder that `fedvit model export` wrote, or http://HOST:PORT of a control server.",
        )
    return FolderFeed(Path(source))


def control_client(
    timeout_s: float,
    transport: httpx.BaseTransport | None = None,
    *,
    token_file: Path | None = None,
    ca_file: Path | None = None,
) -> httpx.Client:
    """An HTTP client that speaks to a control server as :class:`HttpFeed` does.

    Raises:
        UsageError: a file cannot be used.
    """
    headers = {} if token_file is None else {"Authorization": f"Bearer {read_token(token_file)}"}
    return httpx.Client(timeout=timeout_s, transport=transport, headers=headers, verify=_trust(ca_file))


class HttpFeed:
    """Releases of a control server: ``GET /api/model/release`` and ``GET /api/model/blobs/{digest}``.

    Args:
        base_url: ``http://HOST:PORT`` of the control server.
        timeout_s: the longest silence on the line before a request is given up.
        token_file: holds the bearer token to send.
        ca_file: certificates to trust, PEM, instead of the machine's.

    Raises:
        UsageError: ``base_url`` is no http(s) URL, or a file cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        timeout_s: float = 10.0,
        transport: httpx.BaseTransport | None = None,
        *,
        token_file: Path | None = None,
        ca_file: Path | None = None,
    ) -> None:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise UsageError(f"The source {base_url!r} is no http or https URL.", cure="Give http://HOST:PORT.")
        self._base_url = base_url.rstrip("/")
        self._http = control_client(timeout_s, transport, token_file=token_file, ca_file=ca_file)

    def current(self, variant: str | None) -> str | None:
        """See :class:`Feed`."""
        query = "" if variant is None else f"?variant={quote(variant, safe='')}"
        content = self._get(f"/api/model/release{query}", MAX_ENVELOPE_BYTES)
        return None if content is None else content.decode("utf-8", errors="replace")

    def blob(self, digest: str, max_bytes: int) -> bytes:
        """See :class:`Feed`."""
        content = self._get(f"/api/model/blobs/{quote(digest, safe='')}", max_bytes)
        if content is None:
            raise NotFoundError(f"{self._base_url} has no artifact {digest}.", cure="It was replaced: poll again.")
        return content

    def close(self) -> None:
        """See :class:`Feed`."""
        self._http.close()

    def _get(self, path: str, max_bytes: int) -> bytes | None:
        try:
            with self._http.stream("GET", self._base_url + path) as response:
                if response.status_code == httpx.codes.NOT_FOUND:
                    return None
                if response.status_code != httpx.codes.OK:
                    raise FeedUnavailableError(f"{self._base_url}{path} answered {response.status_code}.")
                return self._read(response, max_bytes)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise FeedUnavailableError(
                f"{self._base_url} does not answer: {reason}.", cure="See that the control server runs."
            ) from None

    def _read(self, response: httpx.Response, max_bytes: int) -> bytes:
        """Stop at the first byte too many: a hostile server may send for ever."""
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > max_bytes:
                raise IntegrityError(f"{response.url} sends more than {max_bytes} bytes.")
        return bytes(content)


def read_token(path: Path) -> str:
    """The one bearer token in a file.

    Raises:
        UsageError: there is none.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"The token file {path} cannot be read: {error}.") from None
    if not token or not token.isprintable():
        raise UsageError(f"The token file {path} holds no token.", cure="Put one token in it, on one line.")
    return token


def _trust(ca_file: Path | None) -> ssl.SSLContext | bool:
    try:
        return True if ca_file is None else ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{ca_file} holds no certificate to trust: {error}.", cure="Name a PEM file.") from None


class FolderFeed:
    """The one release in a folder that :func:`fedvit.registry.client.write_release_folder` wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def current(self, variant: str | None) -> str | None:
        """See :class:`Feed`; the folder's one release, whatever its variant: the client judges that."""
        path = self._path / ENVELOPE_FILE
        return self._read(path, MAX_ENVELOPE_BYTES).decode("utf-8", errors="replace") if path.exists() else None

    def blob(self, digest: str, max_bytes: int) -> bytes:
        """See :class:`Feed`."""
        path = self._path / MODEL_FILE
        if not path.exists():
            raise NotFoundError(f"The release folder lacks {path}.", cure="Write it again: `fedvit model export`.")
        return self._read(path, max_bytes)

    def close(self) -> None:
        """See :class:`Feed`."""

    def _read(self, path: Path, max_bytes: int) -> bytes:
        try:
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        except OSError as error:
            raise FeedUnavailableError(f"{path} cannot be read: {error.strerror}.") from None
        if len(content) > max_bytes:
            raise IntegrityError(f"{path} has more than {max_bytes} bytes.")
        return content
