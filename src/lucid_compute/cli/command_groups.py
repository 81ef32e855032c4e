"""Command groups: one that imports its commands late, one that suggests commands, one with a default command."""

from __future__ import annotations

import gc
from functools import partial
from importlib import import_module
from shlex import quote
from types import ModuleType
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup

from lucid_compute.cli.profiles import profile_option

LIST = "list"
SHOW = "show"
HELP_FLAGS = ["-h", "--help"]


class LazyCommands(TyperGroup):
    """A group that imports a command's module when the command is called, or when all commands are listed.

    `GROUPS` names the commands by the help's headings, in its order, as `module:name`: a function, or a Typer
    application. So `lucid nodes` starts without what `lucid serve` needs.
    """

    GROUPS: ClassVar[dict[str, dict[str, str]]] = {}
    PLACES: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls) -> None:
        """Find the commands of all headings in one dictionary."""
        cls.PLACES = {name: place for group in cls.GROUPS.values() for name, place in group.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands; those without a place come last."""
        return [*self.PLACES, *(name for name in super().list_commands(ctx) if name not in self.PLACES)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command, imported if necessary. After a wrong name all commands are imported, to suggest one."""
        if cmd_name in self.PLACES:
            return self._imported(cmd_name)
        if (command := super().get_command(ctx, cmd_name)) is None:
            for name in self.PLACES:
                self._imported(name)
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page, with the commands by their headings."""
        _write_help(self, ctx, formatter)

    def _imported(self, name: str) -> Any:
        if name not in self.commands:
            module, _, attribute = self.PLACES[name].partition(":")
            command = _command(name, getattr(_import(module), attribute))
            command.rich_help_panel = next(title for title, group in self.GROUPS.items() if name in group)
            _prepare(command)
            self.commands[name] = command
        return self.commands[name]


def _import(module: str) -> ModuleType:
    """Import a module without garbage collections: what it makes stays, and they are a twelfth of a command's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _prepare(command: Any) -> None:
    """Give the command, and each command inside it, our help pages, and `--profile` if it calls the service."""
    for inner in getattr(command, "commands", {}).values():
        _prepare(inner)
    names = {parameter.name for parameter in command.params}
    if "api" in names and "profile" not in names:
        command.params.append(profile_option())
    command.format_help = partial(_write_help, command)


def _write_help(command: Any, context: Any, _: Any) -> None:
    from lucid_compute.cli.help_pages import write_help  # noqa: PLC0415 - it imports Rich, which few commands need

    write_help(command, context)


def _command(name: str, found: Any) -> Any:
    """Return a function or an application as a command. Only `lucid` itself has the options for completion."""
    holder = typer.Typer(add_completion=False)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name)
        group: Any = typer.main.get_command(holder)
        return group.commands[name]
    holder.command(name)(found)
    return typer.main.get_command(holder)


class SuggestingGroup(TyperGroup):
    """A group that suggests commands after an unknown word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command. `lucid models llama` suggests `lucid models show llama`."""
        try:
            return super().resolve_command(ctx, args)
        except typer.TyperException as error:
            if "Did you mean" not in error.message:
                error.message = f"No such command {args[0]!r}. {self._instead(ctx, args[0])}"
            raise

    def _instead(self, ctx: Any, word: str) -> str:
        if SHOW in self.commands:
            return f"To see one: {ctx.command_path} {SHOW} {quote(word)}"
        return "There are: " + ", ".join(name for name, command in self.commands.items() if not command.hidden)


class ListByDefault(SuggestingGroup):
    """A group whose default command is `list`: `lucid nodes --watch` is `lucid nodes list --watch`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `list` where no command is named, except in completion, which offers the others too."""
        names_none = not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names)
        if names_none and not ctx.resilient_parsing:
            args = [LIST, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return the group's commands, and the options of `list`."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-") and (command := self.get_command(ctx, LIST)) is not None:
            found += command.shell_complete(ctx, incomplete)
        return found
