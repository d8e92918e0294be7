"""``fedvit model``: versions and releases."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedvit.cli.common import ConfigOption, HomeOption, JsonOption, console, explained, print_json, settings_from
from fedvit.types import Variant

app = typer.Typer(help="Model versions: list them, hand one to a vehicle.", no_args_is_help=True)


@app.command("list")
def list_versions(
    home: HomeOption = None,
    config: ConfigOption = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Model versions, newest first, with accuracy and the epsilon spent when each was committed."""
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
        from fedvit.errors import NotFoundError
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
