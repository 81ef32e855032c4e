"""Which service a command calls, with which key: by options, by the environment, or by a profile of the user's file."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from lucid_compute.cli import settings
from lucid_compute.cli.failures import CommandFailed, ExitStatus, refuse_both

LARGEST_FILE = 1_000_000
NAME_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OF_OTHERS = 0o077
_chosen: ContextVar[str | None] = ContextVar("profile", default=None)


@dataclass(frozen=True, slots=True)
class Profile:
    """The address of a service, and the key for it, if it needs one."""

    url: str
    key: str | None = field(default=None, repr=False)


@dataclass(slots=True)
class Profiles:
    """The content of the user's file: profiles by name, and the one that is used if nothing else is said."""

    profiles: dict[str, Profile] = field(default_factory=dict)
    default: str | None = None

    def get(self, name: str) -> Profile:
        """Return the profile with that name.

        Raises:
            CommandFailed: there is none.
        """
        if (found := self.profiles.get(name)) is not None:
            return found
        there = f"There are: {', '.join(sorted(self.profiles))}." if self.profiles else "There are none yet."
        raise CommandFailed(
            f"There is no profile {name!r}. {there} `lucid profiles add NAME URL` adds one.", ExitStatus.USAGE
        )


class Service(NamedTuple):
    """The service that a command calls. `profile` is the profile's name, if one was used."""

    url: str
    key: str | None
    profile: str | None = None


def choose_service(api: str | None, key: str | None, default_url: str) -> Service:
    """Return the address and the key to use: options first, then the environment, then the default profile.

    A profile's key is sent to the profile's address only.

    Raises:
        CommandFailed: the choice is ambiguous, or there is no such profile.
    """
    if (named := _chosen.get()) is not None:
        refuse_both("--profile", named, "--api", api)
        return _of_profile(named, key)
    url_set, key_set, profile_set = settings.api_url(), settings.api_key(), settings.profile()
    if api:
        return Service(api, key or key_set)
    if profile_set:
        if url_set or key_set:
            raise CommandFailed(
                "LUCID_PROFILE is set, and so is LUCID_API_URL or LUCID_API_KEY. Unset one of them, or pass --profile.",
                ExitStatus.USAGE,
            )
        return _of_profile(profile_set, key)
    if url_set or key_set:
        return Service(url_set or default_url, key or key_set)
    if (default := read_profiles().default) is not None:
        return _of_profile(default, key)
    return Service(default_url, key)


def _of_profile(name: str, key: str | None) -> Service:
    profile = read_profiles().get(name)
    return Service(profile.url, key or profile.key, name)


def _choose(name: str | None) -> str | None:
    if name is not None:
        _chosen.set(name)
    return name


def _complete_profile(incomplete: str) -> list[str]:
    try:
        return sorted(name for name in read_profiles().profiles if name.startswith(incomplete))
    except CommandFailed:
        return []


ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="A service and key that `lucid profiles add` stored. [LUCID_PROFILE]",
        callback=_choose,
        is_eager=True,
        autocompletion=_complete_profile,
    ),
]


def profile_option() -> Any:
    """Return `--profile`, for a command that calls the service. The chosen name is read by `choose_service`."""

    def holder(profile: ProfileOption = None) -> None:
        """Hold the option."""

    app = typer.Typer(add_completion=False)
    app.command()(holder)
    command: Any = typer.main.get_command(app)
    option = command.params[0]
    option.expose_value = False
    return option


def profiles_file() -> Path:
    """Return where the profiles are.

    Raises:
        CommandFailed: this user has no home folder.
    """
    if (folder := settings.config_dir()) is None:
        raise CommandFailed("There is no home folder for profiles. Set XDG_CONFIG_HOME or HOME.", ExitStatus.USAGE)
    return folder / "lucid" / "profiles.json"


def read_profiles() -> Profiles:
    """Return the stored profiles; none if there is no file.

    Raises:
        CommandFailed: the file can't be used: other users may read it, or it isn't ours.
    """
    if settings.config_dir() is None:
        return Profiles()
    path = profiles_file()
    try:
        with path.open(encoding="utf-8") as file:
            _require_private(path, os.fstat(file.fileno()))
            text = file.read(LARGEST_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return Profiles()
    except UnicodeDecodeError:
        raise _not_profiles(path) from None
    return _parse(path, text)


@contextmanager
def changing_profiles() -> Iterator[Profiles]:
    """Yield the stored profiles, to be changed in place, and store them afterwards. Other processes wait meanwhile.

    Raises:
        CommandFailed: as in `read_profiles`.
    """
    folder = profiles_file().parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        profiles = read_profiles()
        yield profiles
        _store(profiles)
        os.fsync(lock)
    finally:
        os.close(lock)


def _store(profiles: Profiles) -> None:
    """Replace the file at once: a process that is killed leaves the previous one."""
    path = profiles_file()
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(asdict(profiles), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _require_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise CommandFailed(f"{path} belongs to another user, so it is not used.", ExitStatus.USAGE)
    if stat.S_IMODE(status.st_mode) & OF_OTHERS:
        raise CommandFailed(f"{path} contains keys, and other users may read it: chmod 600 {path}", ExitStatus.USAGE)


def _parse(path: Path, text: str) -> Profiles:
    try:
        found = json.loads(text)
        profiles = {name: Profile(**each) for name, each in found["profiles"].items()}
        default = found["default"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _not_profiles(path) from None
    texts = [*(each.url for each in profiles.values()), *(each.key or "" for each in profiles.values()), default or ""]
    if len(text) > LARGEST_FILE or not all(isinstance(each, str) for each in texts):
        raise _not_profiles(path)
    return Profiles(profiles, default)


def _not_profiles(path: Path) -> CommandFailed:
    return CommandFailed(f"{path} is not as `lucid profiles add` writes it. Correct or delete it.", ExitStatus.USAGE)
