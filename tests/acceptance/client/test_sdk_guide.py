"""The providers' guide in Python, by both clients of the SDK against a real `lucid serve`; and docs/sdk.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from itertools import count
from typing import Any

import pytest

from lucid_compute.client import AsyncLucid, Lucid
from lucid_compute.client import errors as sdk_errors
from tests import ROOT
from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import Served, serving
from tests.node_js import code_blocks
from tests.sdk import KINDS, Kind, Speaker, speaker

DOCS = ROOT / "docs" / "sdk.md"
MODELS = [
    {"id": "llama-3-70b", "max_tokens": 4096, "quantization": "fp16"},
    {"id": "mistral-7b", "max_tokens": 8192, "quantization": "awq-4bit"},
    {"id": "deepseek-coder-33b", "max_tokens": 16384, "quantization": "gptq"},
]
_numbers = count()


@pytest.fixture
async def provider_key(admin: AsyncLucid) -> str:
    """The guide's prerequisite: a Lucid API key with compute scope."""
    made = await admin.keys.create(name="gpu", owner=f"provider-{next(_numbers)}", scopes=["compute"])
    return made.key


async def test_the_guide_reads_the_same_in_python(served: Served, provider_key: str) -> None:
    """Each of its calls, in its order."""
    async with AsyncLucid(served.url, provider_key) as lucid:
        passport = await lucid.passports.create(
            name="my-gpu-node",
            type="compute",
            metadata={
                "gpu": "NVIDIA A100",
                "vram": "80GB",
                "region": "us-east-1",
                "inferenceUrl": "http://your-gpu:8080/v1",
                "capabilities": ["inference", "fine-tuning"],
                "maxConcurrency": 8,
            },
        )
        assert passport.metadata == {**GUIDE_PASSPORT["metadata"], "vramGb": 80}
        answer = await lucid.compute.heartbeat(
            passport_id=passport.id,
            status="healthy",
            load=0.42,
            available_models=["llama-3-70b", "mistral-7b"],
            queue_depth=3,
        )
        assert 8.1 <= answer.next_heartbeat_in_seconds <= 9.9
        health = await lucid.compute.health(passport.id)
        assert (health.status, health.fresh, health.load, health.queue_depth) == ("healthy", True, 0.42, 3)
        assert health.uptime_seconds >= 0
        assert (health.jobs_completed, health.avg_latency_ms, health.error_rate) == (0, None, None)
        declared = await lucid.compute.update_models(passport.id, models=MODELS)
        assert [model.max_tokens for model in declared.models] == [4096, 8192, 16384]
        assert (await lucid.compute.drain(passport.id)).drained
        assert (await lucid.compute.deregister(passport.id)).status == "deregistered"


def test_the_guide_reads_the_same_without_asyncio(served: Served, provider_key: str) -> None:
    """Each of its calls, in its order."""
    with Lucid(served.url, provider_key) as lucid:
        passport = lucid.passports.create(**GUIDE_PASSPORT)
        answer = lucid.compute.heartbeat(
            passport_id=passport.id,
            status="healthy",
            load=0.42,
            available_models=["llama-3-70b", "mistral-7b"],
            queue_depth=3,
        )
        assert answer.drain is False
        assert lucid.compute.health(passport.id).uptime_seconds >= 0
        lucid.compute.update_models(passport.id, models=MODELS)
        assert [model.quantization for model in lucid.compute.declared_models(passport.id).models] == [
            "fp16",
            "awq-4bit",
            "gptq",
        ]
        assert lucid.compute.drain(passport.id).status == "draining"
        assert lucid.compute.resume(passport.id).status == "healthy"
        assert lucid.compute.deregister(passport.id, wait_seconds=5).status == "deregistered"
        with pytest.raises(sdk_errors.NodeDeregistered, match="Register it again"):
            lucid.compute.health(passport.id)


def literals_of_the_guide() -> dict[str, Any]:
    """Return the dicts of the guide's calls as Python has them: by the call, with the names of the wire."""
    code = "\n".join(code_blocks("compute-providers"))
    found = {}
    for call in ("passports.create", "compute.heartbeat", "compute.updateModels"):
        literal = code.split(f"lucid.{call}(", 1)[1].split(");", 1)[0].removeprefix("passport.id, ")
        literal = re.sub(r" //.*", "", literal.split(";", 1)[0]).removesuffix("}).replace")
        literal = literal.replace("await getGPUUtilization()", "0.42").replace("await getQueueDepth()", "3")
        literal = literal.replace("passportId,", "passportId: null,")
        quoted = re.sub(r"(\w+): ", r'"\1": ', literal)
        found[call] = json.loads(re.sub(r",(\s*[}\]])", r"\1", quoted))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_dict", [False, True])
async def test_the_guides_dicts_are_taken_as_they_are(
    served: Served, provider_key: str, kind: Kind, as_dict: bool
) -> None:
    """With the names of the wire: spread into arguments, or as the one argument that JavaScript has."""
    literals = literals_of_the_guide()
    assert literals["passports.create"] == GUIDE_PASSPORT

    def call(method: Any, *args: Any, **fields: Any) -> Any:
        return method(*args, fields) if as_dict else method(*args, **fields)

    async with speaker(kind, served.url, provider_key) as client:
        made = await client.ask(lambda lucid: call(lucid.passports.create, **literals["passports.create"]))
        beat = {**literals["compute.heartbeat"], "passportId": made.id, "bootId": "b", "sequence": 1}
        answer = await client.ask(lambda lucid: call(lucid.compute.heartbeat, **beat))
        assert (answer.passport_id, answer.status) == (made.id, "healthy")
        health = await client.ask(lambda lucid: lucid.compute.health(made.id))
        assert (health.load, health.queue_depth, health.available_models) == (0.42, 3, beat["availableModels"])
        models = literals["compute.updateModels"]
        declared = await client.ask(lambda lucid: call(lucid.compute.update_models, made.id, **models))
        assert [(model.id, model.max_tokens) for model in declared.models] == [
            (model["id"], model["maxTokens"]) for model in models["models"]
        ]
        jobs = await client.ask(lambda lucid: lucid.compute.jobs(passportId=made.id, sortBy="createdAt"))
        assert jobs == []
        with pytest.raises(TypeError, match="under both of its names"):
            await client.ask(lambda lucid: lucid.compute.heartbeat(**beat, passport_id=made.id))
        with pytest.raises(TypeError, match="given twice"):
            await client.ask(lambda lucid: lucid.compute.heartbeat(beat, sequence=2))
        with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_thing'"):
            await client.ask(lambda lucid: lucid.compute.health(made.id, noSuchThing=1))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_models_life_is_seen_through_the_sdk(
    served: Served, admin: AsyncLucid, provider_key: str, kind: Kind
) -> None:
    """Names with slashes; available when a node can run it, found by the filter, explained when it can't be run."""
    name = f"{kind.__name__}/llama-3"
    await admin.passports.create(name=name, type="model", metadata={"format": "gguf", "minVramGb": 40})
    async with speaker(kind, served.url, provider_key) as client:
        explained = await client.ask(lambda lucid: lucid.models.availability(name))
        assert (explained.available, explained.nodes) == (False, [])
        node = await client.ask(lambda lucid: lucid.passports.create(**GUIDE_PASSPORT))
        beat = {"passport_id": node.id, "status": "healthy", "load": None, "queue_depth": None}
        await client.ask(lambda lucid: lucid.compute.heartbeat(**beat, available_models=[name]))
        assert (await client.ask(lambda lucid: lucid.models.get(name))).available
        listed = await client.ask(lambda lucid: lucid.models.list(available=True, search=kind.__name__))
        assert [model.name for model in listed] == [name]
        matched = await admin.match(name, lucid={"allow_regions": ["us-east-1"], "node_ids": [node.id]})
        assert matched.chosen is not None
        assert matched.chosen.passport_id == node.id
        changed = await client.ask(lambda lucid: lucid.passports.update(node.id, metadata={"region": None}))
        assert "region" not in changed.metadata
        events = await client.ask(lambda lucid: lucid.compute.events(node.id))
        assert events[-1].type == "registered"
        assert await client.ask(lambda lucid: lucid.compute.jobs(passport_id=node.id)) == []
        assert await client.ask(lambda lucid: lucid.passports.revoke(node.id)) is None
        assert (await client.ask(lambda lucid: lucid.passports.get(node.id))).status == "revoked"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_keys_life_is_seen_through_the_sdk(served: Served, kind: Kind) -> None:
    """Made, listed, used, rotated, revoked, and in the audit trail."""
    owner = f"{kind.__name__}-owner"
    async with speaker(kind, served.url, served.admin_key) as client:
        limits = {"requests_per_minute": 600}
        made = await client.ask(
            lambda lucid: lucid.keys.create(name="k", owner=owner, scopes=["compute"], limits=limits)
        )
        assert made.limits.requests_per_minute == 600
        assert [key.id for key in await client.ask(lambda lucid: lucid.keys.list(owner=owner))] == [made.id]
        rotated = await client.ask(lambda lucid: lucid.keys.rotate(made.id, now=True))
        assert rotated.key != made.key
        await _refused(served, kind, made.key)
        async with speaker(kind, served.url, rotated.key) as mine:
            assert await mine.ask(lambda lucid: lucid.compute.list()) == []
        await client.ask(lambda lucid: lucid.keys.revoke(made.id))
        await _refused(served, kind, rotated.key)
        actions = [change.action for change in await client.ask(lambda lucid: lucid.audit(target_id=made.id))]
        assert actions == ["key.revoke", "key.rotate", "key.create"]


@pytest.mark.parametrize("kind", KINDS)
async def test_lists_are_read_page_by_page(served: Served, admin: AsyncLucid, kind: Kind) -> None:
    """Seven items by three: all of them once, in order; one page alone knows where it stands."""
    key = (
        await admin.keys.create(name="k", owner=f"{kind.__name__}-lists", scopes=["passports:write", "passports:read"])
    ).key
    async with speaker(kind, served.url, key) as client:
        for number in range(7):
            await client.ask(partial(_new_tool, f"t{number}"))
        pages = await client.ask(lambda lucid: lucid.passports.list(sort_by="name", sort_order="asc").pages(per_page=3))
        assert [[passport.name for passport in page] for page in pages] == [
            ["t0", "t1", "t2"],
            ["t3", "t4", "t5"],
            ["t6"],
        ]
        page = await client.ask(lambda lucid: lucid.passports.list().page(2, per_page=5))
        assert (len(page), page.pagination.total, page.pagination.total_pages) == (2, 7, 2)
        assert len(await client.ask(lambda lucid: lucid.passports.list(type="tool"))) == 7
        assert await client.ask(lambda lucid: lucid.passports.list(type="dataset")) == []
        await _grow_while_reading(client)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_services_refusals_are_raised_as_what_they_are(served: Served, provider_key: str, kind: Kind) -> None:
    """With the contract's code and details, and the id that the service's log has."""
    async with speaker(kind, served.url, provider_key) as client:
        made = await client.ask(lambda lucid: lucid.passports.create(**GUIDE_PASSPORT))
        with pytest.raises(sdk_errors.PassportExists) as exists:
            await client.ask(lambda lucid: lucid.passports.create(**GUIDE_PASSPORT))
        assert exists.value.passport_id == made.id
        assert exists.value.request_id
        with pytest.raises(sdk_errors.InvalidRequest) as invalid:
            await client.ask(lambda lucid: lucid.passports.create(name="n", type="compute"))
        assert [fault["path"] for fault in invalid.value.details["fields"]] == [
            "metadata.vram",
            "metadata.inferenceUrl",
        ]
        with pytest.raises(sdk_errors.Forbidden):
            await client.ask(lambda lucid: lucid.keys.list())
        with pytest.raises(sdk_errors.NodeNotFound):
            await client.ask(lambda lucid: lucid.compute.health("another"))
        same = {"name": "m", "type": "compute", "metadata": GUIDE_PASSPORT["metadata"], "idempotency_key": "once"}
        first, again = [await client.ask(lambda lucid: lucid.passports.create(**same)) for _ in range(2)]
        assert first.id == again.id
    with pytest.raises(sdk_errors.TlsFailed, match="http://"):
        async with speaker(kind, served.url.replace("http:", "https:")) as tls:
            await tls.ask(lambda lucid: lucid.healthz())


def test_what_the_docs_show_runs() -> None:
    """Every Python block of docs/sdk.md in one program, but those that are marked as not run."""
    text = re.sub(r"<!-- not run.*?-->\n```python.*?```", "", DOCS.read_text(), flags=re.DOTALL)
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    with serving() as served:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env={"PATH": os.defpath, "LUCID_API_URL": served.url, "LUCID_API_KEY": served.admin_key},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    for said in ("Compute node registered:", "Status: healthy", "It is there already:", "0 nodes, 0 models"):
        assert said in done.stdout


def _new_tool(name: str, lucid: Any) -> Any:
    return lucid.passports.create(name=name, type="tool")


async def _refused(served: Served, kind: Kind, key: str) -> None:
    async with speaker(kind, served.url, key) as client:
        with pytest.raises(sdk_errors.Unauthorized):
            await client.ask(lambda lucid: lucid.compute.list())


async def _grow_while_reading(client: Speaker) -> None:
    """Items that a new one pushes to the next page are not answered twice."""
    seen: list[Any] = []
    if isinstance(client.lucid, Lucid):
        for page in client.lucid.passports.list().pages(per_page=3):
            seen += [passport.name for passport in page]
            client.lucid.passports.create(name=f"new-{len(seen)}", type="tool")
    else:
        async for page in client.lucid.passports.list().pages(per_page=3):
            seen += [passport.name for passport in page]
            await client.lucid.passports.create(name=f"new-{len(seen)}", type="tool")
    assert sorted(seen) == [f"t{number}" for number in range(7)]
