"""`lucid settings`: every variable that any part of this package reads, with its default and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.padding import Padding

from lucid_compute.api.settings import Settings
from lucid_compute.cli.output import JsonOption, sentence, show, show_json
from lucid_compute.cli.settings import is_set
from lucid_compute.client.settings import SETTINGS as CLIENT_SETTINGS


class Setting(NamedTuple):
    """A variable; `default` None is unset."""

    name: str
    default: str | None
    meaning: str


def service_settings() -> Iterator[Setting]:
    """Answer the service's, as `api/settings.py` declares them."""
    for name, field in Settings.model_fields.items():
        yield Setting(f"LUCID_{name.upper()}", _written(field.default), field.description or "")


def client_settings() -> Iterator[Setting]:
    """Answer the SDK's and the command line's, as `client/settings.py` declares them."""
    for setting in CLIENT_SETTINGS:
        yield Setting(*setting)


# Who reads them, and what answers them: one line for each part of the package that has settings.
SOURCES = {
    "service": service_settings,
    "client": client_settings,
}


def settings(as_json: JsonOption = False) -> None:
    """List every setting: its variable, its default, what it means, and whether it is set now."""
    rows = [_row(reader, setting) for reader, answer in SOURCES.items() for setting in answer()]
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


def _row(reader: str, setting: Setting) -> dict[str, Any]:
    return {
        "variable": setting.name,
        "reader": reader,
        "default": setting.default,
        "isSet": is_set(setting.name),
        "meaning": setting.meaning,
    }


def _written(value: Any) -> str | None:
    if value is None or value == ():
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)
