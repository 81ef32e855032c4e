"""Create the virtual environment of the Makefile, or say in one sentence what keeps it from being created."""

import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

OLDEST = (3, 11)


def main(target: Path) -> int:
    """Create `target` with pip in it; answer the exit status."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.version_info < OLDEST:
        return refuse(f"Python 3.11 or newer is needed, and this is {version}. Try: make PYTHON=python3.12 run")
    if find_spec("ensurepip") is None:
        return refuse(
            f"this Python has no ensurepip, so it cannot make a virtual environment. Install it with: "
            f"apt-get install python{version}-venv (Debian, Ubuntu), then run make again"
        )
    try:
        venv.EnvBuilder(with_pip=True, clear=True, symlinks=True).create(target)
    except (OSError, subprocess.CalledProcessError) as error:
        return refuse(
            f"{target} could not be made ({error}). Is the folder writable? On Debian and Ubuntu, "
            f"is python{version}-venv installed?"
        )
    return 0


def refuse(sentence: str) -> int:
    """Print why there is no virtual environment; answer the exit status."""
    print(f"lucid-compute: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
