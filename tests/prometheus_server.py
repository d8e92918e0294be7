"""A real Prometheus on a free port, for tests that ask it; and something that it can scrape."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

PATIENCE_S = 60.0
INTERVAL = "250ms"


class PrometheusServer:
    """What a running Prometheus answers."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of an expression; it must be good PromQL."""
        answer = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=10, trust_env=False)
        assert answer.is_success, answer.text
        results: list[dict[str, Any]] = answer.json()["data"]["result"]
        return results

    def await_that(self, expression: str, wanted: Callable[[list[dict[str, Any]]], Any] = bool) -> list[dict[str, Any]]:
        """The first answer that is as wanted; scrapes and evaluations take a moment."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not wanted(result := self.query(expression)):
            assert time.monotonic() < deadline_s, f"{expression}: at last {result}"
            time.sleep(0.1)
        return result


@contextmanager
def exporter(render: Callable[[], bytes]) -> Iterator[str]:
    """Serve what ``render`` gives; yields host:port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = render()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def prometheus(folder: Path, jobs: dict[str, str], rules: Path | None = None) -> Iterator[PrometheusServer]:
    """A Prometheus that scrapes an address a job, four times a second."""
    # Port 0 would leave us to find out which one it took: its log says.
    config = {
        "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in jobs.items()
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    program = shutil.which("prometheus")
    assert program is not None
    log = folder / "prometheus.log"
    words = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'series'}"]
    with log.open("wb") as output:
        process = subprocess.Popen([program, *words, "--web.listen-address=127.0.0.1:0"], stdout=output, stderr=output)
    try:
        yield PrometheusServer(f"http://{_address(log, process)}")
    finally:
        process.terminate()
        process.wait(20)


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s and process.poll() is None:
        for line in log.read_text().splitlines():
            _, result, rest = line.partition('msg="Listening on" address=')
            if result:
                return rest.split()[0]
        time.sleep(0.05)
    raise AssertionError(log.read_text()[-2000:])
