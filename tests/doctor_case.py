"""For tests of the doctor: a node in a real service, its inference server, and what can be broken about them."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import httpx

from lucid_compute.agent.doctor.check import CheckFinding
from lucid_compute.agent.doctor.examination import examine
from lucid_compute.client import AsyncLucid
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.lucid_serve import Served

BEAT_SECONDS = 0.05
SLOTS = 2
CONTEXT = 4096
_hosts = (f"127.1.{third}.{fourth}" for third in itertools.count(1) for fourth in range(1, 255))


def next_host() -> str:
    """Return a loopback address that no test has used: a host is probed once in ten seconds."""
    return next(_hosts)


def says(value: object, status: int = 200) -> Behaviour:
    """Return a value as JSON."""
    return Behaviour(answer=respond(json.dumps(value).encode(), status=status))


class Ward:
    """One healthy node, until a test breaks something. `findings` are the doctor's, by check."""

    def __init__(self, served: Served, admin: httpx.AsyncClient, key: str, server: FaultNode) -> None:
        """Begin without a passport; `admit` registers the node."""
        self.served, self.admin, self.server = served, admin, server
        self.api, self.key, self.wanted = served.url, key, ""
        self.model = f"model-{uuid4().hex[:8]}"
        self.name, self.node, self.model_id = f"node-{uuid4().hex[:8]}", "", ""
        self.sender: dict[str, Any] | None = {}  # what heartbeats say; None: none is sent
        self.url: str | None = None
        self.findings: dict[str, CheckFinding] = {}

    async def admit(self) -> None:
        """Register the node and its model, declare it, and let the server answer as llama.cpp does."""
        self.server.by_path |= {
            "/v1/models": says({"data": [{"id": self.model, "owned_by": "llamacpp"}]}),
            "/props": says(
                {"build_info": "b1", "total_slots": SLOTS, "default_generation_settings": {"n_ctx": CONTEXT}}
            ),
            "/metrics": Behaviour(answer=respond(b"llamacpp:requests_processing 0\n", content_type="text/plain")),
            "/slots": says([{}] * SLOTS),
        }
        metadata = {"format": "gguf", "minVramGb": 10, "contextLength": CONTEXT}
        self.model_id = (await self.post("/passports", name=self.model, type="model", metadata=metadata))["id"]
        known = {"vram": "80GB", "inferenceUrl": self.server.url, "runtimes": ["llama.cpp"], "maxConcurrency": SLOTS}
        owned = {"name": self.name, "type": "compute", "owner": "acme", "metadata": known}
        self.node = (await self.post("/passports", **owned))["id"]
        self.wanted = self.name
        await self.declare(self.model, CONTEXT)

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Ask as the admin."""
        answer = await self.admin.post(path, json=body)
        assert answer.is_success, answer.text
        told: dict[str, Any] = answer.json()
        return told

    async def patch(self, passport_id: str | None = None, **changes: Any) -> None:
        """Change the node's passport, or another."""
        answer = await self.admin.patch(f"/passports/{passport_id or self.node}", json=changes)
        assert answer.is_success, answer.text

    async def declare(self, name: str, max_tokens: int | None = None) -> None:
        """Replace the node's declaration."""
        body = {"models": [{"id": name, "maxTokens": max_tokens}]}
        assert (await self.admin.put(f"/compute/models/{self.node}", json=body)).is_success

    async def beat(self, **changes: Any) -> None:
        """Send one heartbeat."""
        body = {"passportId": self.node, "status": "healthy", "load": 0, "availableModels": [], "queueDepth": 0}
        await self.admin.post("/compute/heartbeat", json={**body, **changes})

    async def examine(self) -> dict[str, CheckFinding]:
        """Let the doctor look; heartbeats go on meanwhile."""
        beating = asyncio.create_task(self._go_on_beating())
        try:
            if self.sender is not None and self.node:
                await self.beat(**self.sender)
            async with AsyncLucid(self.api, self.key) as lucid:
                async for check_id, _, finding in examine(lucid, self.wanted or None, self.url):
                    self.findings[check_id] = finding
        finally:
            beating.cancel()
            with suppress(asyncio.CancelledError):
                await beating
        return self.findings

    async def _go_on_beating(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if self.sender is not None and self.node:
                await self.beat(**self.sender)


@asynccontextmanager
async def open_ward(served: Served) -> AsyncIterator[Ward]:
    """Admit a healthy node for as long as the block runs."""
    async with served.client() as admin, FaultNode(Behaviour(answer=respond(status=404)), host=next_host()) as server:
        body = {"name": "a provider's", "owner": "acme", "scopes": ["compute"]}
        key = (await admin.post("/keys", json=body)).json()["key"]
        ward = Ward(served, admin, key, server)
        await ward.admit()
        yield ward
