"""`lucid profiles`: store the address and the key of several services, and choose one."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lucid_compute.cli.command_groups import ListByDefault
from lucid_compute.cli.failures import CommandFailed, ExitStatus, YesOption, confirm
from lucid_compute.cli.formatting import or_unknown, yes_or_no
from lucid_compute.cli.output import Column, JsonOption, Listing, sentence, show, show_done, show_json
from lucid_compute.cli.profiles import NAME_FORM, Profile, Profiles, changing_profiles, read_profiles
from lucid_compute.client.errors import ConfigurationFault
from lucid_compute.client.lucid import Lucid

app = typer.Typer(
    cls=ListByDefault,
    help="Store the addresses and keys of several services, and choose one.",
    epilog="`lucid profiles` alone is `lucid profiles list`. A command takes `--profile NAME`, or LUCID_PROFILE.",
)
LONGEST_KEY = 4096
COLUMNS = (Column("NAME", shortest=12), Column("URL", shortest=20), Column("KEY", rank=1), Column("DEFAULT"))
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The profile's name.")]


@app.command("list")
def list_profiles(as_json: JsonOption = False) -> None:
    """List the profiles. Of a key only its end is shown."""
    stored = read_profiles()
    rows = [_described(stored, name) for name in sorted(stored.profiles)]
    if as_json:
        show_json({"profiles": rows})
    elif rows:
        show(Listing(COLUMNS, [_row(row) for row in rows]))
    else:
        show(sentence("No profiles. `lucid profiles add NAME URL` adds one."))


@app.command("add")
def add_profile(
    name: NameArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help="The service's address.")],
    profile_key: Annotated[
        str | None,
        typer.Option("--key", metavar="KEY", help="Its API key; `-` reads it from stdin. Asked for if unset."),
    ] = None,
    is_default: Annotated[bool, typer.Option("--default", help="Use it where no other service is named.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Store a service, or change a stored one. The file is in your configuration folder, readable by you alone."""
    if NAME_FORM.fullmatch(name) is None:
        raise CommandFailed(
            "Name a profile with letters, digits, dots, dashes and underscores, 64 at most.", ExitStatus.USAGE
        )
    profile = _checked(url, _read_key(profile_key))
    with changing_profiles() as stored:
        stored.profiles[name] = profile
        if is_default:
            stored.default = name
    done = f"The profile {name} is stored. Try it: lucid status --profile {name}"
    show_done(done, _described(stored, name), as_json=as_json)


@app.command("use")
def use_profile(name: NameArgument, as_json: JsonOption = False) -> None:
    """Make a profile the default: the one for commands that name no service, by option or variable."""
    with changing_profiles() as stored:
        profile = stored.get(name)
        stored.default = name
    show_done(f"Commands now call {profile.url}, unless told otherwise.", _described(stored, name), as_json=as_json)


@app.command("remove")
def remove_profile(name: NameArgument, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Remove a profile. Its key stays valid until it is revoked."""
    read_profiles().get(name)
    confirm(f"Remove the profile {name}?", is_agreed=yes)
    with changing_profiles() as stored:
        stored.profiles.pop(name, None)
        if stored.default == name:
            stored.default = None
    show_done(f"The profile {name} is removed.", {"name": name, "removed": True}, as_json=as_json)


def _read_key(text: str | None) -> str | None:
    """Return the key of the option, of stdin, or of a person who is asked without an echo."""
    if text is None and sys.stdin.isatty() and sys.stderr.isatty():
        text = typer.prompt("API key, or Enter for none", default="", hide_input=True, show_default=False, err=True)
    elif text == "-":
        text = sys.stdin.read(LONGEST_KEY + 1)
    return (text or "").strip() or None


def _checked(url: str, key: str | None) -> Profile:
    try:
        with Lucid(base_url=url, api_key=key or "") as lucid:
            return Profile(lucid.base_url, key)
    except ConfigurationFault as error:
        raise CommandFailed(error.message, ExitStatus.USAGE) from None


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    return row["name"], row["url"], or_unknown(row["key"]), yes_or_no(row["isDefault"])


def _described(stored: Profiles, name: str) -> dict[str, Any]:
    profile = stored.profiles[name]
    key = None if profile.key is None else f"...{profile.key[-4:]}"
    return {"name": name, "url": profile.url, "key": key, "isDefault": name == stored.default}
