"""Command line of a vehicle: ``fedvit-edge``, also ``python -m edge_runtime``."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from starlette.types import ASGIApp

from edge_runtime.access import access_rules
from edge_runtime.connections import BoundedProtocol
from edge_runtime.engine import InferenceEngine
from edge_runtime.heartbeat import TIMEOUT_S, HeartbeatLoop
from edge_runtime.mailbox import MailboxSender, read_mailbox_key
from edge_runtime.server import ServingOptions, ServingProcess
from fedvit.api.transport import open_http, read_token
from fedvit.atomic_write import write_atomically
from fedvit.errors import FedvitError, InterruptedRunError, NotFoundError, PortInUseError, UsageError
from fedvit.registry.client import ReleaseClient
from fedvit.registry.feed import open_feed
from fedvit.types import Variant
from fedvit.wire.folders import open_folder
from fedvit.wire.manifest import load_or_create_signing_key, parse_public_key, public_key_text

if TYPE_CHECKING:
    from edge_runtime.training.policy import VehiclePolicy

GRACE_S = 5
BACKLOG = 512

app = typer.Typer(
    name="fedvit-edge",
    help="Serve a signed model release on a vehicle, with ONNX Runtime alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

SourceOption = Annotated[str, typer.Option(help="URL of a control server, or a release folder.")]
KeyOption = Annotated[
    list[str], typer.Option("--trusted-key", help="Public key that signs releases: a file or the text (repeatable).")
]
VariantOption = Annotated[
    Variant | None, typer.Option(help="Pin a variant; left out, the one that the fleet runs is followed.")
]
SourceTokenOption = Annotated[
    Path | None,
    typer.Option(help="File with the vehicle's own token for the control server (scope releases; to train, device)."),
]
SourceCaOption = Annotated[
    Path | None, typer.Option(help="Certificates to trust the control server by, PEM, instead of the machine's.")
]
MailboxOption = Annotated[
    str | None,
    typer.Option(help="Send heartbeats, and leave them here when the control server does not answer: path or URL."),
]
MailboxKeyOption = Annotated[
    Path | None, typer.Option(help="File with the mailbox key of this device, hex; see `fedvit token create --client`.")
]
PolicyOption = Annotated[
    Path | None, typer.Option(help="Signed policy of the vehicle's owner; see `fedvit-edge policy sign`.")
]
OwnerKeyOption = Annotated[
    str | None, typer.Option(help="Public key that signs the policy: a file or the text; required with --policy.")
]
TargetEpsilonOption = Annotated[
    float | None, typer.Option(min=0.01, help="Without --policy: most epsilon that is ever spent, 8 by default.")
]
TargetDeltaOption = Annotated[
    float | None, typer.Option(min=1e-12, max=0.1, help="Without --policy: at which delta, 1e-5 by default.")
]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads for one image.")]


@app.command()
def serve(
    source: SourceOption,
    trusted_key: KeyOption,
    cache: Annotated[Path, typer.Option(help="Folder for verified releases.")] = Path("fedvit-edge-cache"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8081,
    variant: VariantOption = None,
    poll_interval: Annotated[float, typer.Option(min=0.05, help="Seconds between polls.")] = 1.0,
    device_id: Annotated[str, typer.Option(help="Name in health answers.")] = "edge-1",
    threads: ThreadsOption = 1,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the token that requests must have; required on other addresses than loopback."),
    ] = None,
    source_token_file: SourceTokenOption = None,
    source_ca: SourceCaOption = None,
    mailbox: MailboxOption = None,
    mailbox_key_file: MailboxKeyOption = None,
) -> None:
    """Serve the source's current release, and follow it. SIGTERM ends gracefully."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # One request a poll would fill the log of a vehicle that runs for months.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _reporting_errors():
        rules = access_rules(host, token_file, source_token_file)
        with _listen(host, port) as listener:
            feed = open_feed(source, token_file=source_token_file, ca_file=source_ca)
            client = ReleaseClient(feed, cache, _trusted(trusted_key), variant)
            options = ServingOptions(device_id=device_id, source=source, poll_interval_s=poll_interval, threads=threads)
            process = ServingProcess(client, options)
            mailbox_sender = _sender(mailbox, mailbox_key_file, source, device_id)
            with _heartbeats(process, mailbox_sender, source_token_file, source_ca):
                _serve(process.app(*rules), listener, host)


@app.command()
def infer(
    source: SourceOption,
    trusted_key: KeyOption,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    variant: VariantOption = None,
    threads: ThreadsOption = 1,
    source_token_file: SourceTokenOption = None,
    source_ca: SourceCaOption = None,
) -> None:
    """Classify image files; one line of JSON each."""
    with _reporting_errors(), tempfile.TemporaryDirectory(prefix="fedvit-edge-") as cache:
        feed = open_feed(source, token_file=source_token_file, ca_file=source_ca)
        client = ReleaseClient(feed, Path(cache), _trusted(trusted_key), variant)
        release = client.poll()
        if release is None:
            raise NotFoundError(f"{source} has no release yet.", cure="Train first, or name another source.")
        engine = InferenceEngine(release.model_path, release.manifest, threads)
        for path in images:
            typer.echo(json.dumps({"image": str(path), **dataclasses.asdict(engine.infer(_read(path)))}))


@app.command()
def train(
    source: Annotated[str, typer.Option(help="URL of a control server.")],
    data: Annotated[
        Path, typer.Option(help="Folder (or zip) with the vehicle's images: train/<class>/*, or <class>/*.")
    ],
    device_id: Annotated[str, typer.Option(help="Client id, which the token must name.")],
    home: Annotated[Path, typer.Option(help="Folder for the vehicle's key and its own ledger.")] = Path(
        "fedvit-edge-home"
    ),
    rounds: Annotated[int | None, typer.Option(min=1, help="End after so many rounds; left out, never.")] = None,
    policy: PolicyOption = None,
    owner_key: OwnerKeyOption = None,
    target_epsilon: TargetEpsilonOption = None,
    target_delta: TargetDeltaOption = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Pretrained weights, where there is no network.")] = None,
    threads: ThreadsOption = 1,
    source_token_file: SourceTokenOption = None,
    source_ca: SourceCaOption = None,
    mailbox: MailboxOption = None,
    mailbox_key_file: MailboxKeyOption = None,
) -> None:
    """Take part in training with noised updates. Prints one line of JSON a round; SIGTERM ends it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with _reporting_errors(), _trainer_installed():
        # Here, because serving must not load torch.
        from edge_runtime.training.vehicle import Vehicle
        from fedvit.client import FedvitClient

        rules = _policy(policy, owner_key, target_epsilon, target_delta)
        token = read_token(source_token_file) if source_token_file else None
        sender = _sender(mailbox, mailbox_key_file, source, device_id)
        with FedvitClient(source, token, verify=source_ca or True) as client:
            vehicle = Vehicle(
                client, device_id, data, home.resolve(), policy=rules, checkpoint=checkpoint, mailbox=sender
            )
            stop = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            vehicle.register()
            vehicle.run(stop, lambda result: typer.echo(json.dumps(dataclasses.asdict(result))), rounds)
            vehicle.close()


def _policy(
    file: Path | None, owner_key: str | None, target_epsilon: float | None, target_delta: float | None
) -> VehiclePolicy:
    """The policy in the owner's file; without one the default policy, with this budget."""
    from edge_runtime.training.policy import VehiclePolicy, read_policy

    if (file is None) != (owner_key is None):
        raise UsageError("--policy and --owner-key go together.", cure="Give both, or neither.")
    if file is None or owner_key is None:
        budget = {"max_epsilon": target_epsilon, "target_delta": target_delta}
        return VehiclePolicy.model_validate({name: value for name, value in budget.items() if value is not None})
    if target_epsilon is not None or target_delta is not None:
        raise UsageError("The policy sets the budget.", cure="Leave --target-epsilon and --target-delta out.")
    return read_policy(file, _trusted([owner_key]))


policy_app = typer.Typer(help="The policy of a vehicle's owner: what a server may ask of the vehicle.")
app.add_typer(policy_app, name="policy", no_args_is_help=True)


@policy_app.command()
def sign(
    output: Annotated[Path, typer.Argument(help="File to write the signed policy to.")],
    draft: Annotated[
        Path | None, typer.Option(help="YAML with the fields that differ from the default policy; left out, none.")
    ] = None,
    key_folder: Annotated[
        Path, typer.Option(help="Folder of the owner's key, signing_key.pem, which is created if it is missing.")
    ] = Path("fedvit-owner"),
) -> None:
    """Sign a policy with the owner's key. Prints the public key, which `train --owner-key` takes."""
    with _reporting_errors(), _trainer_installed():
        from edge_runtime.training.policy import read_draft, sign_policy

        key = load_or_create_signing_key(key_folder)
        write_atomically(output, sign_policy(read_draft(draft), key).encode())
        typer.echo(public_key_text(key.public_key()))


@policy_app.command()
def verify(
    policy: Annotated[Path, typer.Argument(help="The signed policy.")],
    owner_key: Annotated[str, typer.Option(help="Public key that must have signed it: a file or the text.")],
) -> None:
    """Verify a policy's signature. Prints the policy as JSON."""
    with _reporting_errors(), _trainer_installed():
        from edge_runtime.training.policy import read_policy

        typer.echo(read_policy(policy, _trusted([owner_key])).model_dump_json(indent=2))


@contextmanager
def _trainer_installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"Training needs {error.name}.", cure="pip install 'fedvit[edge,trainer]'.") from None


def _sender(url: str | None, key_file: Path | None, source: str, device_id: str) -> MailboxSender | None:
    if (url is None) != (key_file is None):
        raise UsageError("--mailbox and --mailbox-key-file go together.", cure="Give both, or neither.")
    if url is None or key_file is None:
        return None
    if "://" not in source:
        raise UsageError(
            f"The source {source!r} accepts no heartbeats.", cure="Give --source the control server's URL."
        )
    return MailboxSender(open_folder(url), device_id, read_mailbox_key(key_file))


@contextmanager
def _heartbeats(
    process: ServingProcess, sender: MailboxSender | None, token_file: Path | None, ca_file: Path | None
) -> Iterator[None]:
    """Send heartbeats while the block runs; the client id is the device id."""
    if sender is None:
        yield
        return
    options = process.options
    token = read_token(token_file) if token_file else None
    with open_http(options.source, timeout_s=TIMEOUT_S, token=token, verify=ca_file or True) as http:
        loop = HeartbeatLoop(http, options.device_id, process.heartbeat, sender)
        loop.start()
        try:
            yield
        finally:
            loop.stop()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"The image {path} cannot be read: {error.strerror}.") from None


def _trusted(keys: Sequence[str]) -> list[Ed25519PublicKey]:
    return [parse_public_key(line) for key in keys for line in _key_lines(key)]


def _key_lines(key: str) -> list[str]:
    """The lines of the file with that name if there is one, else the text itself, which may begin with a slash, too."""
    try:
        if Path(key).is_file():
            return [line for line in Path(key).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"The trusted key {key!r} cannot be read: {error}.") from None
    return [key]


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, opened before anything is loaded, so that a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            raise PortInUseError(
                f"Port {port} on {host} cannot be listened on: {error.strerror}.",
                cure="Stop the program that uses it, or give another --port.",
            ) from None
        yield listener


def _serve(asgi: ASGIApp, listener: socket.socket, host: str) -> None:
    """Run until a signal. The handler of SIGTERM makes it a normal end, although uvicorn raises the signal again."""
    config = uvicorn.Config(
        asgi,
        http=BoundedProtocol,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=GRACE_S,
        lifespan="on",
    )
    shown = f"[{host}]" if ":" in host else host
    server = _AnnouncingServer(config, f"http://{shown}:{listener.getsockname()[1]}")
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        raise InterruptedRunError("Interrupted; the cached release serves at the next start.") from None
    if not server.started:
        raise FedvitError("The server did not start; its log says why.")


class _AnnouncingServer(uvicorn.Server):
    """Prints one line on standard output when it accepts requests, for supervisors."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then print the line."""
        await super().startup(sockets)
        if self.started:
            typer.echo(f"listening on {self._url}")


@contextmanager
def _reporting_errors() -> Iterator[None]:
    try:
        yield
    except FedvitError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_status) from None


def main() -> None:
    """Console entry point."""
    app()


if __name__ == "__main__":
    main()
