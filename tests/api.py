"""A client of the whole application, in the same event loop: real Postgres, real routes, no socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from lucid_compute.server.app import LucidApp, create_app
from lucid_compute.server.replica import Replica
from lucid_compute.server.settings import Settings
from lucid_compute.server.wiring import build_replica
from tests.factories import GUIDE_PASSPORT
from tests.postgres import ADMIN_KEY as ADMIN_KEY

Adjust = Callable[[Replica], Replica | None]
"""Changes bounds of a replica's parts before it runs, or returns another replica in its place."""


class Api:
    """Speaks to one replica as the holder of one key; every call answers the raw response."""

    def __init__(self, app: LucidApp, key: str | None, fast_path: httpx.AsyncBaseTransport | None = None) -> None:
        """Speak to `app` with `key`, or without one; by its fast path where there is one."""
        self.app = app
        self.key = key
        self.fast_path = fast_path
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = fast_path or httpx.ASGITransport(app, client=("127.0.0.1", 40000))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://lucid", headers=headers)

    @property
    def replica(self) -> Replica:
        """The replica's parts, for tests that inspect them."""
        replica: Replica = self.app.fastapi.state.replica
        return replica

    def with_key(self, key: str | None) -> Api:
        """The same replica, spoken to with another key."""
        return Api(self.app, key, self.fast_path)

    async def new_key(self, owner: str, scopes: Iterable[str], **fields: Any) -> Api:
        """The same replica, spoken to with a new key of `owner`."""
        body = {"name": f"{owner}'s key", "owner": owner, "scopes": list(scopes), **fields}
        made = await self.http.post("/keys", json=body)
        assert made.status_code == 201, made.text
        return self.with_key(made.json()["key"])

    async def register(self, name: str = "my-gpu-node", metadata: dict[str, Any] | None = None) -> str:
        """Register a node like the guide's; return its id."""
        body = {**GUIDE_PASSPORT, "name": name, "metadata": {**GUIDE_PASSPORT["metadata"], **(metadata or {})}}
        made = await self.http.post("/passports", json=body)
        assert made.status_code == 201, made.text
        return str(made.json()["id"])

    async def add_model(self, name: str, format_: str = "safetensors", **metadata: Any) -> str:
        """Register a model; return its id."""
        body = {"name": name, "type": "model", "metadata": {"format": format_, **metadata}}
        made = await self.http.post("/passports", json=body)
        assert made.status_code == 201, made.text
        return str(made.json()["id"])

    async def beat(self, passport_id: str, **changes: Any) -> httpx.Response:
        """Send a healthy heartbeat, or one with `changes`."""
        body = {"passportId": passport_id, "status": "healthy", "load": 0.5, "availableModels": [], "queueDepth": 0}
        return await self.http.post("/compute/heartbeat", json={**body, **changes})

    async def health(self, passport_id: str) -> dict[str, Any]:
        """The node's health."""
        answer = await self.http.get(f"/compute/health/{passport_id}")
        assert answer.status_code == 200, answer.text
        health: dict[str, Any] = answer.json()
        return health


def leave_as_built(_: Replica) -> None:
    """Change no bound."""


def without_sweeps(replica: Replica) -> None:
    """Let no sweep run beside the test's own."""
    replica.sweep.interval_seconds = 3600.0


@asynccontextmanager
async def open_api(database_url: str, settings: Settings, adjust: Adjust = leave_as_built) -> AsyncIterator[Api]:
    """Run one replica for as long as the block runs, on a clone of the template or what was one."""

    def build(*arguments: Any) -> Replica:
        replica = build_replica(*arguments)
        return adjust(replica) or replica

    app = create_app(settings, database_url, build=build)
    async with app.fastapi.router.lifespan_context(app.fastapi):
        yield Api(app, ADMIN_KEY)


def error_code(answer: httpx.Response) -> str:
    """The contract's code of a refusal."""
    return str(answer.json()["error"]["code"])
