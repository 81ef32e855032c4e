"""The guides' calls, pasted into a shell beside a real `lucid serve`: none is refused. Every metric is explained."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

from tests import ROOT
from tests.lucid_serve import Served, serving_on_a_clone
from tests.prometheus import read_scrape
from tests.shell_scripts import run_script

DOCS = ROOT / "docs"
# A refusal is a status of curl, and ends the script.
PREFACE = 'curl() { command curl --fail-with-body "$@"; }\n'
MODEL = {"name": "llama-3-70b", "type": "model", "metadata": {"format": "safetensors", "minVramGb": 40}}
NODE = {"name": "a-node", "type": "compute", "metadata": {"vram": "8GB", "inferenceUrl": "http://your-gpu:8080"}}


@pytest.fixture
def served(postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """A service beside an admin.key, as `make run` has; its database is of the run's server, which is quicker."""
    with serving_on_a_clone(postgres_and_template) as served:
        (served.data_dir / "admin.key").touch(0o600)
        (served.data_dir / "admin.key").write_text(served.admin_key)
        yield served


def pasted(page: str) -> str:
    """The page's bash blocks, but for those that say why they are not run."""
    text = re.sub(
        r"<!-- not run.*?-->\n```bash\n.*?^```$", "", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return PREFACE + "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", ["providers.md", "operations.md", "monitoring.md", "payouts.md", "webhooks.md"])
async def test_what_a_guide_types_works_when_it_is_pasted_from_its_first_line(served: Served, page: str) -> None:
    """Each page by itself, in one shell, beside the data folder: it says where its names come from."""
    async with served.client() as admin:
        for body in (MODEL, NODE):
            assert (await admin.post("/passports", json=body)).status_code == 201
    script = pasted(page)
    assert "curl" in script.removeprefix(PREFACE)
    await asyncio.to_thread(run_script, script, served)


async def test_every_metric_is_explained_and_no_other(served: Served) -> None:
    """On one page."""
    async with served.client() as admin:
        found = read_scrape((await admin.get("/metrics")).text)
    page = (DOCS / "observability.md").read_text()
    there = {f"{name}_total" if kind == "counter" else name for name, kind in found.types.items()}
    named = set(re.findall(r"`(lucid_[a-z_]+)", page))
    only_with_a_queue = {"lucid_inference_queue_seconds"}
    assert {name.replace("_total_total", "_total") for name in there} == named - only_with_a_queue
