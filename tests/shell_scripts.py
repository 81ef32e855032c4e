"""Documents' shell scripts beside a real service, as somebody pastes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.lucid_serve import Served

ADDRESS = "http://127.0.0.1:8000"  # that documents write


def run_script(script: str, served: Served) -> str:
    """Run the script in one shell in the folder of the service's data; return what it printed.

    A command that fails, or says something on stderr, fails the test.
    """
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace(ADDRESS, served.url)],
        cwd=served.folder,
        env={"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "HOME": str(served.folder), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout
