"""Nodes, models, keys and webhooks that come and go leave nothing in a replica's memory.

Everything is counted that can be reached from the application and from the service's modules, so a table that somebody
adds later is counted too. What is left out has a bound of its own, and a test of it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Iterable
from functools import _lru_cache_wrapper
from types import FunctionType, ModuleType
from uuid import uuid4

import asyncpg
import httpx
import pytest
import sqlalchemy

import lucid_compute
from lucid_compute.accounting.job_search import JobSearch
from lucid_compute.accounting.ledger import RowWriter
from lucid_compute.gateway.breakers import RetryBudgets
from lucid_compute.gateway.request_metrics import RequestMetrics
from lucid_compute.registry.fleet.freshness import ExpiryQueue
from lucid_compute.registry.keys.rate_limits import Throttle
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, chat_answer
from tests.other_replicas import run_sql

# Caches, and tables that are cleaned above a size: each keeps so many entries, whoever they are of.
BOUNDED = (ExpiryQueue, JobSearch, RequestMetrics, RetryBudgets, RowWriter, Throttle)
OUTSIDE = (asyncio.AbstractEventLoop, asyncpg.Connection, sqlalchemy.Engine, ModuleType)
ROUND = 12  # nodes
ROUNDS = 4  # at most: what else the event loop holds may grow by chance in one
UNLIMITED = {"passports_per_owner": 0, "key_writes_per_second": 0, "owner_writes_per_second": 0}
# As if all of it had ended long ago.
AGE = """
    UPDATE {table} SET {ended} = now() - interval '3 days', revision = revision + 1, changed_xid = pg_current_xact_id()
    WHERE {where}
"""


@pytest.fixture
def settings() -> Settings:
    """The settings of the replica under test: nobody waits for an allowance."""
    return Settings(bootstrap_admin_key=ADMIN_KEY, **UNLIMITED)


async def come_and_go(api: Api, node: FaultNode, count: int) -> None:
    """Let so many nodes live, one after the other, and let the replica do what it does once a minute."""
    for _ in range(count):
        await live(api, node, uuid4().hex)
    await run_sql(api, AGE.format(table="passports", ended="updated_at", where="deregistered_at IS NOT NULL"))
    await run_sql(api, AGE.format(table="api_keys", ended="revoked_at", where="revoked_at IS NOT NULL"))
    replica = api.replica
    await replica.feed.catch_up()
    await replica.gauges.flush()
    await replica.sweep.keep_up()
    replica.watchdog.inspect(replica.watchdog._cleaning_due)
    while replica.jobs.waiting:  # noqa: ASYNC110 - the ledger has nothing to await
        await asyncio.sleep(0.01)


async def live(api: Api, node: FaultNode, name: str) -> None:
    """Let a node with a model, a key, an owner and a webhook of its own do all that nodes do, and end all of them."""
    model_id = await api.add_model(f"model-{name}", "gguf", aliases=[f"alias-{name}"])
    metadata = {"inferenceUrl": f"{node.url}/{name}", "runtimes": ["llama.cpp"], "inferenceKey": f"secret-{name}"}
    node_id = await api.register(f"node-{name}", {**metadata, "note": name})
    owned = await api.new_key(f"owner-{name}", ["inference:run"])
    keys = (await api.http.get("/keys", params={"perPage": 100})).json()["keys"]
    key_id = next(key["id"] for key in keys if key["owner"] == f"owner-{name}")
    hook = {"url": f"http://127.0.0.1:9999/{name}", "events": ["node.drained"], "passportIds": [node_id]}
    hook_id = succeeded(await api.http.post("/webhooks", json=hook)).json()["id"]
    question = {"model": f"alias-{name}", "messages": QUESTION, "user": name}
    http = api.http
    for response in (
        await api.beat(node_id, availableModels=[f"model-{name}"], bootId=f"boot-{name}", sequence=1),
        await http.put(f"/compute/models/{node_id}", json={"models": [{"id": f"model-{name}"}]}),
        await owned.http.post("/v1/chat/completions", json=question),
        await owned.http.get("/usage"),
        await http.get(f"/models/model-{name}/availability"),
        await http.get(f"/compute/health/{node_id}"),
        await http.get(f"/compute/routing/{node_id}"),
        await http.patch(f"/passports/{node_id}", json={"tags": [name]}),
        await http.post(f"/compute/drain/{node_id}"),
        await http.post(f"/compute/deregister/{node_id}", params={"force": "true"}),
        await http.delete(f"/webhooks/{hook_id}"),
        await http.delete(f"/passports/{model_id}"),
        await http.delete(f"/keys/{key_id}"),
    ):
        succeeded(response)


def succeeded(response: httpx.Response) -> httpx.Response:
    """Return a response that is no error."""
    assert response.is_success, (response.request.url, response.text)
    return response


def held(api: Api) -> Counter[str]:
    """Return how many objects of each kind the replica holds."""
    gc.collect()
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == lucid_compute.__name__}
    return Counter(type(one).__qualname__ for one in _reachable([api.app, *map(vars, modules.values())]))


def _reachable(left: list[object]) -> Iterable[object]:
    seen: dict[int, object] = {}
    while left:
        one = left.pop()
        if id(one) in seen or _is_left_out(one):
            continue
        seen[id(one)] = one
        if isinstance(one, FunctionType):  # its globals are those of a module
            left += [one.__closure__, one.__defaults__, one.__kwdefaults__]
        else:
            left += gc.get_referents(one)
    return seen.values()


def _is_left_out(one: object) -> bool:
    if isinstance(one, type):
        return not one.__module__.startswith(lucid_compute.__name__)
    if isinstance(one, _lru_cache_wrapper):
        return one.cache_parameters()["maxsize"] is not None
    return isinstance(one, BOUNDED + OUTSIDE)


async def test_nodes_that_come_and_go_leave_nothing_behind(api: Api) -> None:
    """Nor do their models, keys, owners and webhooks: a table that keeps them grows by twelve each round."""
    growth: dict[str, int] = {}
    async with FaultNode(Behaviour(answer=chat_answer())) as node:
        await come_and_go(api, node, ROUND // 2)  # fills what is filled once
        before = held(api)
        for _ in range(ROUNDS):
            await come_and_go(api, node, ROUND)
            after = held(api)
            growth = {kind: count for kind, count in (after - before).items() if count >= ROUND - 2}
            if not growth:
                break
            before = after
    assert growth == {}
