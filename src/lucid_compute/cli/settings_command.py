"""`lucid settings`: every variable that any part of this package reads, with its default and meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from rich.console import RenderableType
from rich.padding import Padding

from lucid_compute.agent.settings import AgentSettings
from lucid_compute.cli.failures import complain
from lucid_compute.cli.output import JsonOption, sentence, show, show_json
from lucid_compute.cli.settings import PROFILE, is_set, mistyped
from lucid_compute.client.settings import SETTINGS as CLIENT_SETTINGS
from lucid_compute.server.settings import Settings


class SettingRow(NamedTuple):
    """A variable. A `default` of None is unset."""

    name: str
    default: str | None
    meaning: str


# Each part of the package that has settings: a class of pydantic-settings, or a list.
SOURCES: tuple[tuple[str, type[BaseModel] | Sequence[tuple[str, str | None, str]]], ...] = (
    ("service", Settings),
    ("client", CLIENT_SETTINGS),
    ("agent", AgentSettings),
    ("command line", [(PROFILE, None, "The profile to use: a name of `lucid profiles`.")]),
)


def settings(as_json: JsonOption = False) -> None:
    """List every setting: its variable, default and meaning, and whether it is set now."""
    rows = [_row(reader, setting) for reader, setting in _all()]
    if as_json:
        show_json({"settings": rows})
        return
    parts: list[RenderableType] = []
    for row in rows:
        mark = " (set)" if row["isSet"] else ""
        parts.append(sentence(f"{row['variable']}{mark}", style="bold"))
        parts.append(sentence(f"    {row['reader']}, default: {row['default'] or 'unset'}"))
        parts.append(Padding(sentence(row["meaning"]), (0, 0, 1, 4)))
    show(*parts)


def warn_of_mistyped() -> None:
    """Warn of each variable that resembles a setting but is none."""
    for name, meant in mistyped({setting.name for _, setting in _all()}):
        complain(f"Nothing reads {name}. Did you mean {meant}? See: lucid settings")


def _all() -> list[tuple[str, SettingRow]]:
    return [(reader, setting) for reader, source in SOURCES for setting in _declared_by(source)]


def _declared_by(source: type[BaseModel] | Sequence[tuple[str, str | None, str]]) -> list[SettingRow]:
    if not isinstance(source, type):
        return [SettingRow(*setting) for setting in source]
    prefix = str(source.model_config.get("env_prefix", ""))
    return [
        SettingRow(f"{prefix}{name}".upper(), _written(field.default), field.description or "")
        for name, field in source.model_fields.items()
    ]


def _row(reader: str, setting: SettingRow) -> dict[str, Any]:
    return {
        "variable": setting.name,
        "reader": reader,
        "default": setting.default,
        "isSet": is_set(setting.name),
        "meaning": setting.meaning,
    }


def _written(value: object) -> str | None:
    if value is None or value == ():
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)
