"""Install the packages of a lock file, and a project, into a virtual environment; print one sentence on a failure.

`make run` and `make demo` may be started at the same time on a fresh clone: the second waits for the first.
"""

import fcntl
import os
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

OLDEST = (3, 11)


def main(folder: Path, lock: Path, stamp: Path, *projects: Path) -> int:
    """Touch `stamp` when all of `lock` is in `folder`, which is created if it is incomplete; return the exit status.

    `projects` are folders that are installed too, as editable.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.version_info < OLDEST:
        return refuse(f"Python 3.11 or newer is needed, and this is {version}. Try: make PYTHON=python3.12 run")
    if find_spec("ensurepip") is None:
        return refuse(
            f"this Python has no ensurepip, so it cannot make a virtual environment. Install it with: "
            f"apt-get install python{version}-venv (Debian, Ubuntu), then run make again"
        )
    wait_for_others()
    sources = [lock, *(project / "pyproject.toml" for project in projects)]
    if stamp.exists() and stamp.stat().st_mtime >= max(path.stat().st_mtime for path in sources):
        return 0
    print(f"installing what {lock.name} names into {folder.name}, over the network", flush=True)
    try:
        if not (folder / "bin" / "pip").exists():  # pip comes last, so a folder with it is complete
            venv.EnvBuilder(with_pip=True, clear=True, symlinks=True).create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        return refuse(
            f"{folder} could not be made ({error}). Is the folder writable? On Debian and Ubuntu, "
            f"is python{version}-venv installed?"
        )
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    ours = [("--no-deps", "--no-build-isolation", "--editable", project) for project in projects]
    for arguments in [("--require-hashes", "-r", lock), *ours]:
        if subprocess.run([*pip, *arguments], check=False).returncode != 0:
            return refuse(
                "pip could not install the packages; it says why above. Is the package index reachable (another one: "
                "PIP_INDEX_URL=... make run)? make goes on where this ended"
            )
    stamp.touch()
    return 0


def wait_for_others() -> None:
    """Wait until no other process installs in this folder; the kernel releases the lock when this process ends."""
    here = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for another make that installs here", flush=True)
        fcntl.flock(here, fcntl.LOCK_EX)


def refuse(sentence: str) -> int:
    """Print why nothing is installed; return the exit status."""
    print(f"lucid-compute: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(*map(Path, sys.argv[1:])))
    except KeyboardInterrupt:
        sys.exit(130)
