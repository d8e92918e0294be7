"""The hostile requests as a table: every one as the bytes that are sent. See test_hostile.py."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path

NEW = {"device_id": "truck-66", "num_examples": 3}
GOOD = json.dumps(NEW).encode()
REGISTER, STATUS, VICTIM = "/api/clients/register", "/api/clients/status", "/api/clients/vehicle-0001"
ROLLBACK, CONFIG = "/api/model/rollback", "/api/training/config"
Headers = tuple[tuple[str, str], ...]


# In a folder that is nobody's: what an attack would leave there is looked for.
PICKLED = Path(tempfile.gettempdir()) / f"fedvit-was-pickled-{os.getpid()}"


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {PICKLED}",)


@dataclass(frozen=True)
class Attack:
    """One request as bytes.

    Attributes:
        as_whom: the token that it bears.
        harmless: why it may be answered with 2xx.
        may_hang_up: the server may end the connection without a word.
        broken_off: the caller says no more where the server still waits for something.
    """

    name: str
    content: bytes
    as_whom: str | None = "admin"
    harmless: str | None = None
    may_hang_up: bool = False
    broken_off: bool = False


def request(method: str, path: str, body: bytes = b"", headers: Headers = (), *, length: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"Content-Length: {len(body)}"] if length else []
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n<token>\r\n" + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def post(name: str, body: bytes, path: str = REGISTER, *headers: tuple[str, str]) -> Attack:
    return Attack(name, request("POST", path, body, headers))


def kind(content_type: str) -> tuple[str, str]:
    return ("Content-Type", content_type)


def get(name: str, path: str, *headers: tuple[str, str], harmless: str | None = None) -> Attack:
    return Attack(name, request("GET", path, headers=headers), harmless=harmless)


def borne(name: str, whom: str) -> Attack:
    return Attack(name, request("POST", REGISTER, GOOD), whom)


def tampered(name: str, *lines: str, body: bytes = GOOD, broken_off: bool = False) -> Attack:
    """A good request with header lines that no client writes."""
    head = [f"POST {REGISTER} HTTP/1.1", "Host: localhost", "Connection: close", *lines]
    content = "\r\n".join(head).encode("latin-1") + b"\r\n<token>\r\n" + body
    return Attack(name, content, may_hang_up=True, broken_off=broken_off)


LENGTH = f"Content-Length: {len(GOOD)}"
# Stays for the length that was promised, and is refused in any case.
PADDING = b"[]".ljust(len(GOOD))
SMUGGLED = b"DELETE /api/clients/vehicle-0001 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
MULTIPART = b'--x\r\nContent-Disposition: form-data; name="device_id"\r\n\r\ntruck-66\r\n--x--\r\n'
XML = b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><a>&e;</a>'


def field(name: str, value: str) -> Attack:
    """A registration with one value (JSON text) exchanged."""
    given = {"device_id": '"truck-66"', "num_examples": "3"} | {name.split(":", 1)[-1]: value}
    body = ", ".join(f'"{key}": {text}' for key, text in given.items())
    return post(f"{name} = {value[:30]}", f"{{{body}}}".encode())


BODIES = [
    post("a body of 2 MB", b" " * 2_000_000 + GOOD),
    Attack(
        "chunks of 2 MB",
        request(
            "POST", REGISTER, chunked(*[b" " * 50_000] * 40, GOOD), (("Transfer-Encoding", "chunked"),), length=False
        ),
    ),
    tampered("a length of 10**20", "Content-Length: 100000000000000000000"),
    post("100,000 nested lists", b"[" * 100_000 + b"]" * 100_000),
    post("40 nested objects", b'{"capabilities": ' + b'{"a":' * 40 + b"1" + b"}" * 41),
    post("UTF-16", json.dumps(NEW).encode("utf-16")),
    post("UTF-32", json.dumps(NEW).encode("utf-32")),
    post("latin-1", '{"device_id": "truck-66", "capabilities": {"é": 1}}'.encode("latin-1")),
    post("overlong UTF-8", b'{"device_id": "truck-66", "capabilities": {"\xc0\xaf": 1}}'),
    post("half a surrogate pair", b'{"device_id": "truck-66", "capabilities": {"\\ud800": 1}}'),
    post("two byte order marks", b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD),
    post("NUL bytes", b"\0" * 100),
    post("NUL behind good JSON", GOOD + b"\0"),
    post("a gzip bomb, declared", gzip.compress(b" " * 10_000_000), REGISTER, ("Content-Encoding", "gzip")),
    post("a gzip bomb, undeclared", gzip.compress(b" " * 10_000_000)),
    post("good JSON, called brotli", GOOD, REGISTER, ("Content-Encoding", "br")),
    post("good JSON, encoded twice", GOOD, REGISTER, ("Content-Encoding", "identity, gzip")),
    *(
        post(f"a pickle called {called}", pickle.dumps(Payload(), protocol=protocol), REGISTER, kind(called))
        for protocol, called in enumerate(
            ("application/json", "application/octet-stream", "application/python-pickle", "text/plain", "image/png")
        )
    ),
    post("a pickle in a text", json.dumps({"device_id": base64.b64encode(pickle.dumps(Payload())).decode()}).encode()),
    post("a form", b"device_id=truck-66&num_examples=3", REGISTER, kind("application/x-www-form-urlencoded")),
    post("a multipart form", MULTIPART, REGISTER, kind("multipart/form-data; boundary=x")),
    post("XML with an entity", XML, REGISTER, kind("application/xml")),
    post("YAML that calls", b"!!python/object/apply:os.system ['true']", REGISTER, kind("application/yaml")),
    post("a key twice", b'{"device_id": "truck-66", "device_id": "vehicle-0001"}'),
    post("two documents", GOOD + GOOD),
    post("a comment", GOOD + b" // ok"),
    post("a trailing comma", GOOD[:-1] + b",}"),
    post("a list", b"[" + GOOD + b"]"),
]

VALUES = [
    field("num_examples", "NaN"),
    field("num_examples", "-Infinity"),
    field("num_examples", "1e400"),
    field("num_examples", "-1"),
    field("num_examples", "9223372036854775808"),
    field("num_examples", "9" * 5000),
    field("num_examples", "true"),
    field("num_examples", '"3"'),
    field("__proto__", '{"admin": true}'),
    field("constructor", "{}"),
    field("__class__", '"Store"'),
    field("", "1"),
    field("active", "false"),
    field("device_id", '"../../etc/passwd"'),
    field("device_id", '"truck-66\\u0000"'),
    field("device_id", '"truck-66\\n"'),
    field("device_id", '"truck\\u202e66"'),
    field("device_id", '"\\uff54ruck-66"'),
    field("device_id", '"tru\\u0441k-66"'),
    field("device_id", '"x\'; DROP TABLE clients; --"'),
    field("device_id", '"' + "a" * 10_000 + '"'),
    field("device_id", '"vehicle-0001"'),
    field("device_id", '{"$ne": ""}'),
    post("a version as SQL", b'{"version": "v1.1.2\' OR 1=1 --", "force": true}', ROLLBACK),
    post("a version as a path", b'{"version": "../../../keys/root", "force": true}', ROLLBACK),
    post("a version with another dot", '{"version": "v1․1․2", "force": true}'.encode(), ROLLBACK),
    post("a version with NUL", b'{"version": "v1.1.2\\u0000", "force": true}', ROLLBACK),
    post("force as a text", b'{"version": "v1.1.2", "force": "true"}', ROLLBACK),
    post(
        "an endless reason", json.dumps({"version": "v1.1.2", "force": True, "reason": "x" * 5000}).encode(), ROLLBACK
    ),
    post("a latency of nothing", b'{"strategy": "quantization", "target_latency": 0}', "/api/edge/optimize"),
    post("a precondition that never held", b'{"min_clients": 2}', CONFIG, ("If-Match", '"99", W/"1", \'; --')),
    get("limit=-1", f"{STATUS}?limit=-1"),
    get("limit=10**9", f"{STATUS}?limit=1000000000"),
    get("limit=NaN", f"{STATUS}?limit=NaN"),
    get("limit twice", f"{STATUS}?limit=1&limit=1000000"),
    get("offset=2**63", f"{STATUS}?offset=9223372036854775808"),
    get("a version offset=2**63", "/api/model/versions?offset=9223372036854775808"),
    get("an operation offset=2**63", "/api/operations?offset=9223372036854775808"),
    get("after=2**63", "/api/audit?after=9223372036854775808"),
    get("hours=inf", "/api/privacy/history?hours=inf"),
    get("hours=nan", "/api/privacy/history?hours=nan"),
    get("a status as SQL", "/api/operations?status=queued%27%20OR%201=1--"),
    get("a variant as a path", "/api/model/release?variant=..%2f..%2fkeys%2froot.key"),
]

PATHS = [
    *(
        Attack(f"DELETE {path[:60]}", request("DELETE", path))
        for path in (
            "/api/clients/%2e%2e",
            "/api/clients/x/../vehicle-0001",
            "/api/clients/x%2f..%2fvehicle-0001",
            "/api//clients/vehicle-0001",
            "//api/clients/vehicle-0001",
            f"{VICTIM}/",
            f"{VICTIM}%2f",
            f"{VICTIM}%00",
            f"{VICTIM}%20",
            f"{VICTIM};x=1",
            f"{VICTIM}%3fx=1",
            "/api/clients/%76ehicle-0001%0d%0aX-Injected:%201",
            "/api/clients/vehicle%252d0001",
            "/api/clients/%c0%aevehicle-0001",
            "/api/clients/%ed%a0%80",
            "/api/clients/VEHICLE-0001",
            "/api/clients/vehicle-0001'%20OR%20'1'='1",
            "/API/clients/vehicle-0001",
            "/api/clients/" + "a" * 50_000,
            "/api/clients/" + "%2e%2e%2f" * 2_000,
            "/api/operations/..%2f..%2f",
        )
    ),
    get("a key for a blob", "/api/model/blobs/..%2f..%2fkeys%2froot.key"),
    get("the database for a blob", "/api/model/blobs/%2e%2e/%2e%2e/state.db"),
    Attack("a made-up method", request("WIPE", VICTIM), may_hang_up=True),
    Attack("TRACE", request("TRACE", STATUS), may_hang_up=True),
    Attack("CONNECT", request("CONNECT", "localhost:22"), may_hang_up=True),
    Attack("a method in lower case", request("delete", VICTIM), may_hang_up=True),
    Attack("PUT over a client", request("PUT", VICTIM, GOOD)),
    Attack(
        "a WebSocket",
        request(
            "GET",
            STATUS,
            headers=(
                ("Connection", "Upgrade"),
                ("Upgrade", "websocket"),
                ("Sec-WebSocket-Version", "13"),
                ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
            ),
        ),
        may_hang_up=True,
        harmless="the two Connection headers may cancel the upgrade; what is left is a reading",
    ),
]

HEADERS = [
    tampered("two lengths", LENGTH, "Content-Length: 0"),
    tampered("a length with a sign", f"Content-Length: +{len(GOOD)}"),
    tampered("a negative length", "Content-Length: -1"),
    tampered("a hexadecimal length", f"Content-Length: {len(GOOD):#x}"),
    tampered("a space before the colon", f"Content-Length : {len(GOOD)}"),
    tampered("length against chunks", "Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
    tampered("a length that hides a request", "Content-Length: 2", body=b"{}" + SMUGGLED),
    tampered("an unknown transfer encoding", LENGTH, "Transfer-Encoding: xchunked", body=SMUGGLED),
    tampered(
        "chunked twice", "Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=b"0\r\n\r\n" + SMUGGLED
    ),
    tampered("chunked behind a tab", "Transfer-Encoding:\x0bchunked", LENGTH),
    tampered("a negative chunk", "Transfer-Encoding: chunked", body=b"-1\r\n" + GOOD),
    tampered(
        "a chunk of 2**64 bytes", "Transfer-Encoding: chunked", body=b"10000000000000000\r\n" + GOOD, broken_off=True
    ),
    tampered("a chunk that is no number", "Transfer-Encoding: chunked", body=b"zz\r\n" + GOOD + b"\r\n0\r\n\r\n"),
    tampered("chunks without an end", "Transfer-Encoding: chunked", body=chunked(GOOD, end=b""), broken_off=True),
    tampered("less than was promised", f"Content-Length: {len(GOOD) + 1}", broken_off=True),
    tampered("a line feed alone in a value", "X-Request-ID: a\nX-Injected: 1", LENGTH, body=PADDING),
    tampered("a carriage return alone in a value", "X-Request-ID: a\rX-Injected: 1", LENGTH, body=PADDING),
    tampered("NUL in a value", "X-Request-ID: a\0b", LENGTH, body=PADDING),
    tampered("a header without a name", ": x", LENGTH, body=PADDING),
    tampered("a folded header", "X-Request-ID: a", " b", LENGTH, body=PADDING),
    tampered("a header of 1 MB", "X-Long: " + "a" * 1_000_000, LENGTH, body=PADDING),
    tampered("20,000 headers", *[f"X-{i}: {i}" for i in range(20_000)], LENGTH, body=PADDING),
    Attack("no Host", b"GET /api/nothing HTTP/1.1\r\nConnection: close\r\n<token>\r\n", may_hang_up=True),
    Attack("HTTP/9.9", b"GET /api/nothing HTTP/9.9\r\nHost: x\r\nConnection: close\r\n<token>\r\n", may_hang_up=True),
    Attack(
        "no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 60 + b"\r\n\r\n", may_hang_up=True
    ),
    post("an old key with another body", GOOD, REGISTER, ("Idempotency-Key", "used-before")),
    Attack(
        "a request once more",
        request("POST", REGISTER, b'{"device_id":"truck-1"}', (("Idempotency-Key", "used-before"),)),
        harmless="under its key it gets the first answer again",
    ),
    post("a key of 201 characters", GOOD, REGISTER, ("Idempotency-Key", "k" * 201)),
    post("a key that is no ASCII", GOOD, REGISTER, ("Idempotency-Key", "ké")),
    post("two keys", GOOD, REGISTER, ("Idempotency-Key", "one"), ("Idempotency-Key", "two")),
    post("a method override on POST", b"", VICTIM, ("X-HTTP-Method-Override", "DELETE")),
    get("a method override on GET", STATUS, ("X-HTTP-Method-Override", "DELETE"), harmless="nobody reads the header"),
    get(
        "a method in the query", f"{STATUS}?_method=DELETE", harmless="unknown parameters are ignored; it is a reading"
    ),
    get(
        "another URL in a header",
        STATUS,
        ("X-Original-URL", VICTIM),
        ("X-Rewrite-URL", VICTIM),
        harmless="nobody reads the headers",
    ),
    get(
        "another host's name",
        STATUS,
        ("X-Forwarded-Host", "evil.example"),
        harmless="no answer is built from a host's name",
    ),
    Attack(
        "a slash too much, to another host",
        b"GET /api/clients/status/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n<token>\r\n",
    ),
    Attack(
        "an absolute target",
        b"GET http://evil.example/api/audit/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n<token>\r\n",
    ),
]

TOKENS = [
    borne("an expired token", "expired"),
    borne("a revoked token", "revoked"),
    borne("a token of another system", "foreign"),
    borne("a token with one letter changed", "changed"),
    borne("one token's name with another's secret", "crossed"),
    borne("an unsigned web token", "unsigned"),
    borne("a token that is no text", "binary"),
    borne("a token of 100,000 letters", "endless"),
    borne("a password", "basic"),
    borne("a token twice", "twice"),
    borne("a token for reading", "viewer"),
    Attack("a vehicle's token that deletes", request("DELETE", VICTIM), "device"),
    Attack("a vehicle's token that registers another", request("POST", REGISTER, GOOD), "device"),
    Attack("a vehicle's token that beats for another", request("POST", f"{VICTIM}/heartbeat", b"{}"), "device"),
    Attack("a vehicle's token that fetches another's task", request("GET", f"{VICTIM}/task"), "device"),
    Attack("a follower's token that registers", request("POST", REGISTER, GOOD), "releases"),
    Attack("a follower's token that fetches a task", request("GET", f"{VICTIM}/task"), "releases"),
    Attack("an emergency's token that registers", request("POST", REGISTER, GOOD), "emergency"),
    Attack("no token", request("POST", REGISTER, GOOD), None),
    Attack(
        "no token, said to come from here", request("POST", REGISTER, GOOD, (("X-Forwarded-For", "127.0.0.1"),)), None
    ),
    Attack("a token in a cookie", request("POST", REGISTER, GOOD, (("Cookie", "token=<text>"),)), None),
    Attack("a token in the query", request("POST", f"{REGISTER}?token=<text>&access_token=<text>", GOOD), None),
    Attack("the audit trail with a viewer's token", request("GET", "/api/audit"), "viewer"),
]

ATTACKS = [*BODIES, *VALUES, *PATHS, *HEADERS, *TOKENS]
