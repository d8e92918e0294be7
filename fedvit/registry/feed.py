"""Sources of releases: a control server over HTTP, or a folder that was copied to the vehicle.

A feed is not trusted: releases are verified by :class:`fedvit.registry.client.ReleaseClient`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import quote

import httpx

from fedvit.api.problems import error_of
from fedvit.api.transport import Sink, exchange, open_http, read_token, transfer_s
from fedvit.errors import FeedUnavailableError, IntegrityError, NoReleaseError, NotFoundError, UsageError
from fedvit.wire.manifest import MAX_ENVELOPE_BYTES

ENVELOPE_FILE = "release.json"
MODEL_FILE = "model.onnx"


class Feed(Protocol):
    """A source of releases."""

    def current(self, variant: str | None) -> str | None:
        """The envelope of the current release; None when there is none (yet). Without a variant: what the fleet runs.

        Raises:
            FeedUnavailableError: no answer.
            IntegrityError: the answer is larger than an envelope may be.
        """

    def fetch(self, digest: str, size: int, file: BinaryIO) -> None:
        """Write the artifact of that SHA-256, unverified, to ``file``.

        Args:
            size: its bytes; a larger one is not read further.
            file: open for reading and writing, at its end, with the first bytes of the artifact where a fetch broke off
                before. What arrives is appended, also when this fetch breaks off; a feed that cannot resume begins
                anew.

        Raises:
            NotFoundError: there is none (any more).
            FeedUnavailableError: no answer, or it broke off.
            IntegrityError: it is larger than ``size``, or is not what was asked for.
            OSError: ``file`` cannot be written.
        """

    def close(self) -> None:
        """Close connections."""


def open_feed(
    source: str, timeout_s: float = 10.0, *, token_file: Path | None = None, ca_file: Path | None = None
) -> Feed:
    """The feed that ``source`` names: an http(s) URL of a control server, or a release folder.

    ``token_file`` holds the bearer token to send, ``ca_file`` the certificates (PEM) to trust instead of the machine's.

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


class HttpFeed:
    """Releases of a control server: ``GET /api/model/release`` and ``GET /api/model/blobs/{digest}``.

    See :func:`open_feed`. A poll is given up after ``timeout_s``; an artifact has more time, by its length.
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
        token = None if token_file is None else read_token(token_file)
        self._base_url, self._timeout_s = base_url.rstrip("/"), timeout_s
        self._http = open_http(base_url, timeout_s=timeout_s, token=token, verify=ca_file or True, transport=transport)

    def current(self, variant: str | None) -> str | None:
        query = "" if variant is None else f"?variant={quote(variant, safe='')}"
        response = self._get(f"/api/model/release{query}", MAX_ENVELOPE_BYTES)
        if response.status_code != httpx.codes.NOT_FOUND:
            return response.content.decode("utf-8", errors="replace")
        # Anything may answer 404, also a server that is no control server at all.
        error = error_of(response.status_code, response.text)
        if isinstance(error, NoReleaseError):
            return None
        raise FeedUnavailableError(
            f"{self._base_url} answered 404 to the question for its release: {error.message}",
            cure="Check that this is the URL of a control server, and that its release has this variant.",
        )

    def fetch(self, digest: str, size: int, file: BinaryIO) -> None:
        start = file.tell()

        def sink(response: httpx.Response) -> Callable[[bytes], object]:
            if response.status_code != httpx.codes.PARTIAL_CONTENT:
                file.seek(0)
                file.truncate()
            elif not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise IntegrityError(f"{response.url} sends another part of the artifact than was asked for.")
            return file.write

        headers = {"Range": f"bytes={start}-"} if start else {}
        response = self._get(f"/api/model/blobs/{quote(digest, safe='')}", size, transfer_s(size), headers, sink)
        if response.status_code == httpx.codes.NOT_FOUND:
            raise NotFoundError(f"{self._base_url} has no artifact {digest}.", cure="It was replaced: poll again.")

    def close(self) -> None:
        self._http.close()

    def _get(
        self,
        path: str,
        max_bytes: int,
        download_s: float = 0.0,
        headers: Mapping[str, str] | None = None,
        sink: Sink | None = None,
    ) -> httpx.Response:
        """A response of 200, 206 or 404."""
        try:
            request = self._http.build_request("GET", path, headers=headers)
            response = exchange(
                self._http, request, max_bytes=max_bytes, deadline_s=self._timeout_s, download_s=download_s, sink=sink
            )
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise FeedUnavailableError(
                f"{self._base_url} does not answer: {reason}.", cure="See that the control server runs."
            ) from None
        known = {httpx.codes.OK, httpx.codes.NOT_FOUND} | ({httpx.codes.PARTIAL_CONTENT} if sink else set())
        if response.status_code not in known:
            raise FeedUnavailableError(f"{self._base_url}{path} answered {response.status_code}.")
        return response


class FolderFeed:
    """The one release in a folder that :func:`fedvit.registry.client.write_release_folder` wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def current(self, variant: str | None) -> str | None:
        path = self._path / ENVELOPE_FILE
        return self._read(path, MAX_ENVELOPE_BYTES).decode("utf-8", errors="replace") if path.exists() else None

    def fetch(self, digest: str, size: int, file: BinaryIO) -> None:
        path = self._path / MODEL_FILE
        if not path.exists():
            raise NotFoundError(f"The release folder lacks {path}.", cure="Write it again: `fedvit model export`.")
        content = self._read(path, size)
        file.seek(0)
        file.truncate()
        file.write(content)

    def close(self) -> None:
        pass

    def _read(self, path: Path, max_bytes: int) -> bytes:
        try:
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        except OSError as error:
            raise FeedUnavailableError(f"{path} cannot be read: {error.strerror}.") from None
        if len(content) > max_bytes:
            raise IntegrityError(f"{path} has more than {max_bytes} bytes.")
        return content
