"""Loading of settings: a YAML file, overridden by environment variables, overridden by the command line.

``FEDVIT_TRAINING__ROUNDS=5`` overrides ``training.rounds``: the prefix ``FEDVIT_``, then the path with ``__`` between
sections. ``FEDVIT_HOME`` names the state folder. Every error names the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fedvit.config import Settings
from fedvit.config.renamed import RENAMED_KEYS
from fedvit.errors import ConfigError

ENV_PREFIX = "FEDVIT_"
# Variables that other parts of the program read; they are no settings.
ENV_RESERVED = frozenset({"FEDVIT_CONFIG", "FEDVIT_TOKEN", "FEDVIT_URL"})


def load_settings(
    path: Path | None = None, *, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from a YAML file, then ``environ``, then ``overrides`` (nested like the file).

    Raises:
        ConfigError: the file is unreadable, or a key is unknown, renamed or out of range.
    """
    file = _read_yaml(path) if path is not None else {}
    environment = _environment_tree(os.environ if environ is None else environ)
    source = str(path) if path is not None else "the built-in defaults"
    settings = _validated(f"In {source} and the environment", overrides or {}, environment, file)
    return settings if path is None else _resolve_paths(settings, path.parent)


def changed_settings(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """``settings`` with some of them changed, by ``section.key``.

    Raises:
        ConfigError: a key is unknown, or a value out of range.
    """
    trees = []
    for path, value in changes.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        trees.append(value)
    named = ", ".join(f"{key}={value}" for key, value in changes.items())
    return _validated(f"In the settings with {named}", *reversed(trees), settings.model_dump())


def environment_settings() -> Settings:
    """The settings of this process's environment: the file that ``FEDVIT_CONFIG`` names, and the other variables.

    Raises:
        ConfigError: see :func:`load_settings`.
    """
    named = os.environ.get("FEDVIT_CONFIG")
    return load_settings(Path(named) if named else None)


def _validated(where: str, *trees: Mapping[str, Any]) -> Settings:
    """Settings from several trees; an earlier tree overrides a later one."""
    # Imported here because it takes longer than all of pydantic, and most processes receive their settings as JSON.
    from fedvit.config.sources import merged

    try:
        return Settings.model_validate(merged(*trees))
    except ValidationError as error:
        faults = error.errors(include_url=False)
    more = f" ({len(faults) - 3} more.)" if len(faults) > 3 else ""
    raise ConfigError(f"{where}: {' '.join(map(_explain, faults[:3]))}{more}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"There is no configuration file {path}.", cure="Name an existing YAML file, or leave --config out."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        place = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {place}.", cure="Mend the line named.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds a {type(tree).__name__}, not sections.",
            cure=f"Begin with one of: {', '.join(Settings.model_fields)}.",
        )
    return tree


def _resolve_paths(settings: Settings, folder: Path) -> Settings:
    """Resolve relative paths of a settings file against its folder, all but ``home``."""

    def resolve(path: Path | None) -> Path | None:
        return path if path is None or path.is_absolute() or path.exists() else folder / path

    data = settings.data.model_copy(update={"path": resolve(settings.data.path)})
    model = settings.model.model_copy(update={"checkpoint": resolve(settings.model.checkpoint)})
    access = settings.access
    access = access.model_copy(
        update={
            "tls_cert": resolve(access.tls_cert),
            "tls_key": resolve(access.tls_key),
            "oidc": access.oidc and access.oidc.model_copy(update={"jwks_path": resolve(access.oidc.jwks_path)}),
        }
    )
    backup = settings.backup.model_copy(update={"passphrase_file": resolve(settings.backup.passphrase_file)})
    return settings.model_copy(update={"data": data, "model": model, "access": access, "backup": backup})


def _environment_tree(environ: Mapping[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX) or name in ENV_RESERVED:
            continue
        *sections, key = name.removeprefix(ENV_PREFIX).lower().split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{name} contradicts another FEDVIT_ variable.", cure="Unset one of the two.")
        # As YAML, 5, true, null and [8081, 8082] have their types; a path or a name stays text.
        node[key] = yaml.safe_load(text) if text.strip() else text
    return tree


def _explain(fault: Any) -> str:
    """A fault as a sentence: key, value, what is allowed."""
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path) or "the file"
    if fault["type"] == "extra_forbidden":
        if renamed := RENAMED_KEYS.get(".".join(part for part in path if not part.isdigit())):
            return f"'{key}' is now '{renamed}'."
        section = _section_at(path[:-1])
        allowed = list(section.model_fields) if section else []
        near = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"'{key}' is no setting.{hint} Allowed here: {', '.join(allowed)}."
    value = fault.get("input")
    shown = "" if isinstance(value, BaseModel | dict) else f" (found {value!r})"
    message = fault["msg"].removeprefix("Value error, ")
    return f"'{key}': {message[0].lower()}{message[1:]}{shown}."


def _section_at(path: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Settings
    for part in path:
        field = section.model_fields.get(part)
        kind = field.annotation if field else None
        kinds = [kind, *get_args(kind)]
        section_kind = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if section_kind is None:
            return None
        section = section_kind
    return section


def settings_to_json(settings: Settings) -> str:
    """Settings as JSON that :func:`settings_from_json` reads back; how they travel to actors and replicas."""
    return settings.model_dump_json()


def settings_from_json(text: str) -> Settings:
    """The inverse of :func:`settings_to_json`."""
    return Settings.model_validate_json(text)
