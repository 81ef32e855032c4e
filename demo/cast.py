"""Who is in the demo: the service, the models, the provider's nodes, and the keys of those who ask."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import NamedTuple

from demo.children import DemoFailed
from demo.llama_cpp import CONTEXT_OF_A_SLOT, MODEL
from demo.node import PLACES, Node
from demo.stage import LUCID, Stage
from demo.tiny_gguf import write_tiny_gguf
from lucid_compute.client import AsyncLucid
from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.keys.shapes import NewKey

PROVIDER = "aurora-gpus"
TOO_LARGE = "llama-3-70b"
READY_SECONDS = 30.0
CONSUMERS = {"acme-shop": None, "bright-search": None, "curious-student": None, "thrifty-startup": 60}


class Cast(NamedTuple):
    """All of it, ready. `consumers` and `guest`, for whoever watches, may ask for inference; `reader` may only read."""

    url: str
    admin_key: str
    nodes: tuple[Node, ...]
    consumers: dict[str, NewKey]
    reader: NewKey
    guest: NewKey

    def lucid(self) -> AsyncLucid:
        """Return the SDK's client, with the admin's key."""
        return AsyncLucid(self.url, self.admin_key)


async def assemble(stage: Stage, port: int) -> Cast:
    """Start everything; return when every node can be sent requests.

    Raises:
        DemoFailed: something does not start.
    """
    write_tiny_gguf(stage.folder / "tiny.gguf", MODEL)
    serve: list[str | Path] = [LUCID, "serve", "--port", str(port), "--data-dir", stage.data_dir]
    service = stage.start("lucid serve", serve, death_signal=signal.SIGTERM, LUCID_LOG_LEVEL="WARNING")
    nodes = tuple(Node(stage, place) for place in PLACES)
    for node in nodes:
        node.start_server()
    url = await service.says(r"listens on (\S+)\n")
    admin_key = (stage.data_dir / "admin.key").read_text(encoding="ascii").strip()
    async with AsyncLucid(url, admin_key) as lucid:
        await _register_models(lucid)
        key = await _key(lucid, "agents", PROVIDER, Scope.COMPUTE)
        await asyncio.gather(*(node.start_agent(url, key.key) for node in nodes))
        cast = Cast(
            url=url,
            admin_key=admin_key,
            nodes=nodes,
            consumers={
                name: await _key(lucid, name, name, Scope.INFERENCE_RUN, limit) for name, limit in CONSUMERS.items()
            },
            reader=await _key(lucid, "dashboard", PROVIDER, Scope.PASSPORTS_READ),
            guest=await _key(lucid, "guest", "guest", Scope.INFERENCE_RUN),
        )
        await _wait_for_nodes(lucid, nodes)
    return cast


async def _register_models(lucid: AsyncLucid) -> None:
    """Register the model that the nodes serve, and one that none of them has the memory for."""
    metadata = {"format": "gguf", "minVramGb": 1, "contextLength": CONTEXT_OF_A_SLOT}
    await lucid.passports.create(name=MODEL, type="model", owner="tiny-labs", metadata=metadata)
    metadata = {"format": "safetensors", "minVramGb": 140, "contextLength": 8192}
    await lucid.passports.create(name=TOO_LARGE, type="model", owner="tiny-labs", metadata=metadata)


async def _key(lucid: AsyncLucid, name: str, owner: str, scope: Scope, per_minute: int | None = None) -> NewKey:
    limits = None if per_minute is None else {"requests_per_minute": per_minute}
    return await lucid.keys.create(name=name, owner=owner, scopes=[scope], limits=limits)


async def _wait_for_nodes(lucid: AsyncLucid, nodes: tuple[Node, ...]) -> None:
    """Wait until every node is there, healthy, and reports the model."""
    for _ in range(round(READY_SECONDS / 0.1)):
        found = {node.name: node async for node in lucid.compute.list(status="healthy", model=MODEL)}
        if all(node.name in found and MODEL in found[node.name].health.available_models for node in nodes):
            for node in nodes:
                node.passport_id = found[node.name].id
            return
        await asyncio.sleep(0.1)
    raise DemoFailed(f"The nodes are not ready within {READY_SECONDS:g} s.")
