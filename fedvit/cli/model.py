"""``fedvit model``: model versions, and which of them is served."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from fedvit.api.choices import OptimizeStrategy, RetrainStrategy
from fedvit.cli.api_session import ApiSession, api_command, read_api_or_store
from fedvit.cli.options import STATE_OR_API, LimitOption, NoWaitOption, OffsetOption, Options, local_command
from fedvit.cli.output import print_json, show_rows, show_text
from fedvit.cli.state import open_existing_store
from fedvit.errors import NotFoundError
from fedvit.types import Variant

if TYPE_CHECKING:
    from fedvit.api.model import ModelView
    from fedvit.client.training import Model
    from fedvit.config import Settings
    from fedvit.store.store import Store

app = typer.Typer(help="List, roll back, switch, optimize and export model versions.", no_args_is_help=True)
COLUMNS = ("version", "run_id", "round_index", "accuracy", "epsilon", "released", "refusal")


@local_command(app, "list", options=STATE_OR_API)
def list_versions(options: Options, limit: LimitOption = 50, offset: OffsetOption = 0) -> None:
    """Model versions, newest first: of the state folder, whether its system runs or not, or of the system at --url."""

    def from_store(store: Store, settings: Settings) -> list[dict[str, Any]]:
        release = store.releases.current()
        return [
            {
                **asdict(version),
                "released": version.released,
                "current": release is not None and release.version == version.version,
            }
            for version in store.versions.all(offset, limit)
        ]

    versions = read_api_or_store(options, lambda client: client.model.versions(limit, offset), from_store)
    if options.as_json:
        print_json(versions)
        return
    rows = [version | {"accuracy": version["metrics"].get("accuracy")} for version in versions]
    show_rows(rows, *COLUMNS, *(["current"] if options.named_url is None else []))


@local_command(app, "export")
def export_release(
    options: Options,
    folder: Annotated[Path, Argument(help="Folder to write; made if absent.")],
    variant: Annotated[Variant, Option(help="Which variant.")] = Variant.STANDARD,
) -> None:
    """Write the current release as a folder that ``fedvit-edge serve --source FOLDER`` reads, and its trusted key."""
    from fedvit.registry.client import write_release_folder
    from fedvit.registry.publisher import why_no_release
    from fedvit.wire.manifest import load_or_create_signing_key, public_key_text

    store = open_existing_store(options.settings())
    release = store.releases.current()
    if release is None or variant.value not in release.artifacts:
        message, cure = f"The release has no variant {variant.value!r}.", "See `release.variants`."
        if release is None:
            message, cure = why_no_release(store)
        raise NotFoundError(message, cure=cure)
    content = store.blobs.get(release.artifacts[variant.value])
    write_release_folder(folder, release.envelopes[variant.value], content)
    key = public_key_text(load_or_create_signing_key(store.home / "keys").public_key())
    (folder / "trusted_key.txt").write_text(key + "\n")
    facts = {"folder": str(folder), "version": release.version, "variant": variant.value, "trusted_key": key}
    text = f"{release.version} ({variant.value}) is in {folder}; vehicles trust {key}."
    show_text(text, facts, options.as_json)


@api_command(app, "info")
def info(session: ApiSession) -> object:
    """The served model: size in bytes by variant, complexity, classes."""
    return session.client.model.info()


@api_command(app, "current")
def current(session: ApiSession) -> object:
    """The version that replicas and vehicles are offered, with its lineage."""
    return session.client.model.current()


@api_command(app, "rollback", confirm=True)
def rollback(
    session: ApiSession,
    version: Annotated[str, Argument(help="The version to roll back to, such as v1.2.3.")],
    force: Annotated[bool, Option("--force", help="Take one that the release gate would refuse.")] = False,
    reason: Annotated[str | None, Option("--reason", help="Why; kept in the lineage.")] = None,
) -> object:
    """Make an older version's content current again, as a new and higher version."""
    model = session.client.model
    return session.change(
        lambda: model.rollback(version, force=force, reason=reason),
        present=lambda: {"current": _brief(model.current()), "target": _brief(_version(model, version))},
        question=f"Roll the whole fleet back to {version}?",
    )


@api_command(app, "switch", confirm=True)
def switch(
    session: ApiSession, variant: Annotated[Variant, Argument(help="The variant for the whole fleet.")]
) -> object:
    """Move replicas and vehicles to another variant of the current version; harmless when repeated."""
    model = session.client.model
    return session.change(
        lambda: model.switch(variant), present=model.info, question=f"Move the whole fleet to {variant}?"
    )


@api_command(app, "optimize", change=True)
def optimize(
    session: ApiSession,
    strategy: Annotated[OptimizeStrategy, Option("--strategy", help="How the model may be changed.")],
    target_latency: Annotated[float, Option("--target-latency", min=0, help="Largest latency (p95) in milliseconds.")],
    no_wait: NoWaitOption = False,
) -> None:
    """Measure faster variants and move the fleet to the most accurate one that meets the target."""
    model = session.client.model
    session.finish(
        session.change(lambda: model.optimize(strategy, target_latency), present=model.info), no_wait=no_wait
    )


@api_command(app, "retrain", confirm=True)
def retrain(
    session: ApiSession,
    strategy: Annotated[RetrainStrategy, Argument(help="From the base weights, or from the current release's.")],
    no_wait: NoWaitOption = False,
) -> None:
    """End the present run after its round and begin another; `fedvit training status` shows its progress."""
    client = session.client
    operation = session.change(
        lambda: client.model.retrain(strategy),
        present=client.training.status,
        question=f"End this run and begin another ({strategy})?",
    )
    session.finish(operation, no_wait=no_wait)


def _version(model: Model, name: str) -> ModelView:
    for version in model.iterate_versions():
        if version.version == name:
            return version
    raise NotFoundError(f"There is no model version {name!r}.", cure="See `fedvit model list`.")


def _brief(version: ModelView) -> dict[str, Any]:
    facts = {name: getattr(version, name) for name in ("version", "released", "refusal", "epsilon")}
    return {**facts, "accuracy": version.metrics.get("accuracy")}
