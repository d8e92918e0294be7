"""``fedvit model``: versions and releases, and which of them serves."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedvit.cli.api_session import asking
from fedvit.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    LimitOption,
    NoWaitOption,
    OffsetOption,
    UrlOption,
    YesOption,
    console,
    explained,
    print_json,
    settings_from,
)
from fedvit.cli.output import plain
from fedvit.errors import NotFoundError
from fedvit.types import Variant

if TYPE_CHECKING:
    from fedvit.client.life import Model

app = typer.Typer(help="Model versions: what serves, what did, what shall.", no_args_is_help=True)


@app.command("list")
def list_versions(
    home: HomeOption = None,
    config: ConfigOption = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Model versions of the state folder, whether its system runs or not; newest first."""
    with explained(as_json):
        from rich.table import Table

        from fedvit.cli.state import open_existing_store

        store = open_existing_store(settings_from(config, home))
        versions, current = store.versions(limit=limit), store.current_release()
        if as_json:
            print_json([asdict(version) for version in versions])
            return
        table = Table("version", "run", "round", "accuracy", "epsilon", "released", "current")
        for v in versions:
            is_current = current is not None and current.version == v.version
            table.add_row(
                v.version,
                v.run_id,
                str(v.round_index),
                f"{v.metrics.get('accuracy', float('nan')):.3f}",
                f"{v.epsilon:.3f}",
                "yes" if v.released else "",
                "●" if is_current else "",
            )
        console.print(table)


@app.command("export")
def export_release(
    folder: Annotated[Path, typer.Argument(help="Folder to write; made if absent.")],
    home: HomeOption = None,
    config: ConfigOption = None,
    variant: Annotated[Variant, typer.Option(help="Which variant.")] = Variant.STANDARD,
    as_json: JsonOption = False,
) -> None:
    """Write the current release as a folder that ``fedvit-edge serve --source FOLDER`` reads, and its trusted key."""
    with explained(as_json):
        from fedvit.cli.state import open_existing_store
        from fedvit.registry.client import write_release_folder
        from fedvit.wire.manifest import load_or_create_signing_key, public_key_text

        store = open_existing_store(settings_from(config, home))
        release = store.current_release()
        if release is None or variant.value not in release.artifacts:
            raise NotFoundError(f"No release has a variant {variant.value!r}.", cure="Train first: `fedvit run`.")
        content = store.blobs.get(release.artifacts[variant.value])
        write_release_folder(folder, release.envelopes[variant.value], content)
        key = public_key_text(load_or_create_signing_key(store.home / "keys").public_key())
        (folder / "trusted_key.txt").write_text(key + "\n")
        told = {"folder": str(folder), "version": release.version, "variant": variant.value, "trusted_key": key}
        if as_json:
            print_json(told)
        else:
            console.print(f"{release.version} ({variant.value}) is in {folder}; vehicles trust {key}.")


@app.command("info")
def info(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """The served model: size in bytes by variant, complexity, classes."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.model.info())


@app.command("current")
def current(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """The version that replicas and vehicles are offered, with its lineage."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.model.current())


@app.command("versions")
def versions(
    limit: LimitOption = 50,
    offset: OffsetOption = 0,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Model versions of a running system, newest first."""
    with asking(home, url, config, as_json) as ask:
        found = ask.client.model.versions(limit, offset)
        ask.show(found, "version", "run_id", "round_index", "metrics", "epsilon", "released", "refusal")


@app.command("rollback")
def rollback(
    version: Annotated[str, typer.Argument(help="The version whose content is wanted, such as v1.2.3.")],
    force: Annotated[bool, typer.Option("--force", help="Take one that the release gate would refuse.")] = False,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; kept in the lineage.")] = None,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an older version's content current again, as a new and higher version."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        model = ask.client.model
        release = ask.change(
            lambda: model.rollback(version, force=force, reason=reason),
            present=lambda: {"current": _brief(model, None), "target": _brief(model, version)},
            question=f"EligiblePool the whole fleet back to {version}?",
        )
        ask.show(release)


@app.command("switch")
def switch(
    variant: Annotated[Variant, typer.Argument(help="The variant that the whole fleet shall run.")],
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move replicas and vehicles to another variant of the current version; harmless when repeated."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        model = ask.client.model
        release = ask.change(
            lambda: model.switch(variant),
            present=lambda: plain(model.info()),
            question=f"Move the whole fleet to {variant}?",
        )
        ask.show(release)


@app.command("optimize")
def optimize(
    strategy: Annotated[
        Literal["quantization", "lighter_variant"], typer.Option("--strategy", help="What may be done to the model.")
    ],
    target_latency: Annotated[
        float, typer.Option("--target-latency", min=0, help="Milliseconds that 95 of 100 images may take.")
    ],
    no_wait: NoWaitOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure faster variants and move the fleet to the most accurate one that meets the target."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        model = ask.client.model
        operation = ask.change(lambda: model.optimize(strategy, target_latency), present=lambda: plain(model.info()))
        ask.finish(operation, no_wait=no_wait)


@app.command("retrain")
def retrain(
    strategy: Annotated[
        Literal["full_retrain", "fine_tune"],
        typer.Argument(help="From the base weights, or from the current release's."),
    ],
    no_wait: NoWaitOption = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the present run after its round and begin another; `fedvit training status` tells how that fares."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        operation = ask.change(
            lambda: ask.client.model.retrain(strategy),
            present=lambda: plain(ask.client.training.status()),
            question=f"End this run and begin another ({strategy})?",
        )
        ask.finish(operation, no_wait=no_wait)


def _brief(model: Model, version: str | None) -> dict[str, Any]:
    """What a user wants to know of a version, or of the current one, before he changes to it."""
    if version is None:
        found = model.current()
    else:
        by_name = {each.version: each for each in model.iterate_versions()}
        if version not in by_name:
            raise NotFoundError(f"There is no model version {version!r}.", cure="See `fedvit model versions`.")
        found = by_name[version]
    facts = {name: getattr(found, name) for name in ("version", "released", "refusal", "epsilon")}
    return {**facts, "accuracy": found.metrics.get("accuracy")}
