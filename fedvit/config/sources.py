"""Sources of settings, merged key by key by pydantic-settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

Tree = Mapping[str, Any]
"""Settings as nested mappings, before validation."""


def merged(*trees: Tree) -> dict[str, Any]:
    """One tree of several; an earlier one overrides a later one, key by key."""
    return dict(_Merged(trees=trees).model_extra or {})


class _TreeSource(PydanticBaseSettingsSource):
    """A tree as a source. Unlike pydantic's own sources it keeps unknown keys, so that they are refused by name."""

    def __init__(self, settings_cls: type[BaseSettings], tree: Tree) -> None:
        super().__init__(settings_cls)
        self._tree = {str(key): value for key, value in tree.items()}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._tree.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._tree


class _Merged(BaseSettings):
    """The merged trees as extra fields.

    ``Settings`` itself is no BaseSettings: settings that travel as JSON must not read the receiver's environment.
    """

    model_config = SettingsConfigDict(extra="allow")

    def __init__(self, *, trees: tuple[Tree, ...]) -> None:
        super().__init__(trees=trees)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        return tuple(_TreeSource(settings_cls, tree) for tree in init_settings.init_kwargs["trees"])
