"""A gateway for tests: nodes that send heartbeats, a key with the scope inference:run, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import openai

from tests.fault_answers import Answer, respond
from tests.fault_node import Behaviour, FaultNode
from tests.lucid_serve import Served, eventually

CONSUMER = "a consumer"
LEDGER_SECONDS = 2.0
SLACK = 3
RETRIES_LAST_SECONDS = 30.0
EARNING_REQUESTS = 300
QUESTION: list[Any] = [{"role": "user", "content": "go on"}]


class Gateway:
    """One service, with clients for its admin (`admin`) and for a key of the scope inference:run (`raw`, `openai`)."""

    def __init__(self, served: Served, admin: httpx.AsyncClient, key: str) -> None:
        self.served = served
        self.admin = admin
        self.key = key
        self.openai = self.openai_with(key)
        self.raw = served.client(key, timeout_seconds=30)
        self._earned_at = -RETRIES_LAST_SECONDS

    def openai_with(self, key: str, timeout_seconds: float = 30.0) -> openai.AsyncOpenAI:
        """Return OpenAI's client with `key`; it retries nothing."""
        http_client = openai.DefaultAsyncHttpx2Client(trust_env=False)
        url = f"{self.served.url}/v1"
        return openai.AsyncOpenAI(
            base_url=url, api_key=key, max_retries=0, timeout=timeout_seconds, http_client=http_client
        )

    async def close(self) -> None:
        """Close every connection."""
        await self.openai.close()
        await self.raw.aclose()

    async def new_key(self, *scopes: str, **fields: Any) -> dict[str, Any]:
        """Return a new key, which may infer unless `scopes` say otherwise."""
        body = {"name": "a key", "owner": CONSUMER, "scopes": list(scopes or ("inference:run",)), **fields}
        return await self._post("/keys", body)

    async def add_model(self, **metadata: Any) -> str:
        """Register a model; return its name, which no other test uses and which has an alias, `{name}/alias`."""
        name = f"model-{uuid4().hex[:12]}"
        known = {"format": "gguf", "aliases": [f"{name}/alias"], **metadata}
        await self._post("/passports", {"name": name, "type": "model", "metadata": known})
        return name

    async def id_of(self, model: str) -> str:
        """Return a model's passport id."""
        return str((await self.admin.get(f"/models/{model}")).json()["id"])

    async def add_node(self, url: str, *models: str, beat: dict[str, Any] | None = None, **metadata: Any) -> str:
        """Register a node at `url` that reports `models`, send a heartbeat, and return its id. It is fresh for 30 s."""
        known = {"gpu": "none", "vram": "80GB", "runtimes": ["llama.cpp"], "inferenceUrl": url, **metadata}
        node = await self._post("/passports", {"name": uuid4().hex, "type": "compute", "metadata": known})
        await self.beat(node["id"], *models, **(beat or {}))
        return str(node["id"])

    async def beat(self, node: str, *models: str, **changes: Any) -> None:
        """Send one heartbeat of a healthy node."""
        body = {"passportId": node, "status": "healthy", "load": 0, "availableModels": models, "queueDepth": 0}
        await self._post("/compute/heartbeat", {**body, **changes})

    async def health(self, node: str) -> dict[str, Any]:
        """Return a node's health."""
        answer = await self.admin.get(f"/compute/health/{node}")
        assert answer.status_code == 200, answer.text
        health: dict[str, Any] = answer.json()
        return health

    async def becomes_idle(self, node: str, within_seconds: float = SLACK) -> None:
        """Wait until no request runs on the node."""

        async def is_idle() -> bool:
            return bool((await self.health(node))["inFlight"] == 0)

        await eventually(is_idle, within_seconds)

    async def match(self, model: str, **body: Any) -> dict[str, Any]:
        """Ask which node would serve a request."""
        answer = await self.raw.post("/match", json={"model": model, **body})
        assert answer.status_code == 200, answer.text
        matched: dict[str, Any] = answer.json()
        return matched

    async def comes_to(self, model: str, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the response of /match `holds`, for example after another replica has received a change."""

        async def does() -> bool:
            answer = await self.raw.post("/match", json={"model": model})
            return answer.status_code == httpx.codes.OK and holds(answer.json())

        await eventually(does)

    async def jobs(self, model: str, count: int = 1) -> list[dict[str, Any]]:
        """Return the jobs of a model once `count` of them have ended, the newest first."""
        found: list[dict[str, Any]] = []

        async def have_ended() -> bool:
            answer = await self.admin.get("/compute/jobs", params={"model": model, "perPage": 100})
            assert answer.status_code == 200, answer.text
            found[:] = [job for job in answer.json()["jobs"] if job["outcome"] != "running"]
            return len(found) >= count

        await eventually(have_ended, LEDGER_SECONDS * SLACK)
        return found

    async def chat(self, model: str, **body: Any) -> httpx.Response:
        """Ask for a chat and return the raw response."""
        return await self.raw.post("/v1/chat/completions", json={"model": model, "messages": QUESTION, **body})

    async def earn_retries(self) -> None:
        """Send so many requests that the retry budget, a tenth of them, is enough for a test."""
        if time.monotonic() - self._earned_at < RETRIES_LAST_SECONDS:
            return
        async with FaultNode(Behaviour(answer=chat_answer())) as node:
            model = await self.add_model()
            await self.add_node(node.url, model)
            for _ in range(EARNING_REQUESTS // 10):
                answers = await asyncio.gather(*(self.chat(model) for _ in range(10)))
                assert {answer.status_code for answer in answers} == {200}
        self._earned_at = time.monotonic()

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.admin.post(path, json=body)
        assert answer.status_code in {200, 201}, answer.text
        created: dict[str, Any] = answer.json()
        return created


class BusyNode(NamedTuple):
    """A node on which one request runs until the client leaves."""

    id: str
    request: asyncio.Task[Any]


@asynccontextmanager
async def open_gateway(served: Served) -> AsyncIterator[Gateway]:
    """Open clients of a service, with a new key, while the block runs."""
    async with served.client() as admin:
        body = {"name": "inference only", "owner": CONSUMER, "scopes": ["inference:run"]}
        key = (await admin.post("/keys", json=body)).json()["key"]
        gateway = Gateway(served, admin, key)
        try:
            yield gateway
        finally:
            await gateway.close()


def chat_answer(text: str = "said", tokens_in: int = 3, tokens_out: int = 2) -> Answer:
    """Return a complete chat response with its usage."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return respond(json.dumps(body).encode())


def text_of(chunks: Sequence[Any]) -> str:
    """Return the text of a streamed chat's chunks."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def within(seconds: float) -> float:
    """Return a stated bound with threefold slack: machines are noisy."""
    return seconds * SLACK
