"""The vehicle's process as its supervisor sees it: lines, signals and exit statuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny_release import MemoryFeed, png, tiny_model

from fedvit.registry.client import write_release_folder
from fedvit.wire.manifest import public_key_text

END_S = 30
Command = Callable[..., list[str]]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    feed, content = MemoryFeed(), tiny_model()
    feed.offer(content, 1)
    assert feed.envelope is not None
    write_release_folder(folder, feed.envelope, content)
    (tmp_path / "trusted_key.txt").write_text(public_key_text(feed.key.public_key()) + "\n")
    return folder


@pytest.fixture
def command(tmp_path: Path, release: Path) -> Command:
    def make(name: str, *more: str) -> list[str]:
        key = tmp_path / "trusted_key.txt"
        return [sys.executable, "-m", "edge_runtime", name, "--source", str(release), "--trusted-key", str(key), *more]

    return make


@contextmanager
def serving(
    command: list[str], log: Path, ignored: Sequence[signal.Signals] = ()
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it has said that it listens; it begins with these signals ignored."""

    def begin() -> None:
        # A child inherits ignored signals, for example from a shell that started the tests in the background.
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN if each in ignored else signal.SIG_DFL)

    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, preexec_fn=begin
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), log.read_text()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)


@pytest.mark.parametrize(
    ("sent", "status", "ignored"),
    [(signal.SIGTERM, 0, ()), (signal.SIGINT, 130, ()), (signal.SIGTERM, 0, (signal.SIGINT, signal.SIGHUP))],
)
def test_it_serves_until_it_is_told_to_end(
    command: Command, tmp_path: Path, sent: signal.Signals, status: int, ignored: tuple[signal.Signals, ...]
) -> None:
    log = tmp_path / "log"
    arguments = ("--port", "0", "--cache", str(tmp_path / "cache"), "--poll-interval", "0.05", "--device-id", "edge-9")
    with serving(command("serve", *arguments), log, ignored) as (process, url):
        with httpx.Client(base_url=url, timeout=END_S) as http:
            assert _first_answer(http).json()["label"] == "red"
            assert http.get("/health/detailed").json()["device_id"] == "edge-9"
        process.send_signal(sent)
        output, _ = process.communicate(timeout=END_S)
    assert process.returncode == status
    assert output == ""
    assert "Traceback" not in log.read_text()


def _first_answer(http: httpx.Client) -> httpx.Response:
    """The model is loaded after the port is opened; until then the answer is 503."""
    for _ in range(10_000):
        response = http.post("/infer", content=png())
        if response.status_code != 503:
            return response
    pytest.fail("no model was loaded")


def test_it_serves_from_its_cache_when_the_source_is_gone(command: Command, tmp_path: Path, release: Path) -> None:
    arguments = ("--port", "0", "--cache", str(tmp_path / "cache"))
    with serving(command("serve", *arguments), tmp_path / "log") as (_, url), httpx.Client(base_url=url) as http:
        _first_answer(http)
    (release / "release.json").unlink()
    with serving(command("serve", *arguments), tmp_path / "log") as (_, url), httpx.Client(base_url=url) as http:
        # The very first request: what is in the cache is loaded before the port is announced.
        assert http.post("/infer", content=png()).status_code == 200


def test_a_taken_port_is_one_sentence_and_status_2(command: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = ended(command("serve", "--port", str(port), "--cache", str(tmp_path / "cache")))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"Port {port} on 127.0.0.1 cannot be listened on" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "without a token"),
        (("--host", "0.0.0.0", "--token-file", "/dev/null"), "has 0 characters"),
        (("--trusted-key", "not-a-key"), "no Ed25519 public key"),
        (("--source", "no-such-folder"), "neither a folder nor a URL"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_status_2(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = ended(command("serve", "--port", "0", "--cache", str(tmp_path / "cache"), *arguments))
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_infer_prints_one_line_of_json_an_image(command: Command, tmp_path: Path) -> None:
    images = {"red.png": (255, 0, 0), "blue.png": (0, 0, 255)}
    for name, colour in images.items():
        (tmp_path / name).write_bytes(png(colour))
    result = ended(command("infer", *(str(tmp_path / name) for name in images)))
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(answer["image"]).name for answer in answers] == list(images)
    assert [answer["label"] for answer in answers] == ["red", "blue"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("absent.png",), 2, "absent.png cannot be read"),
        (("--variant", "edge_optimized", "x.png"), 1, "--variant standard"),
    ],
)
def test_infer_says_what_is_wrong(command: Command, arguments: tuple[str, ...], status: int, said: str) -> None:
    result = ended(command("infer", *arguments))
    assert result.returncode == status
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_infer_refuses_a_release_that_another_key_signed(command: Command, tmp_path: Path) -> None:
    (tmp_path / "trusted_key.txt").write_text(public_key_text(Ed25519PrivateKey.generate().public_key()))
    result = ended(command("infer", "x.png"))
    assert result.returncode == 1
    assert "not trusted" in result.stderr
