"""Requests that were refused before a node was asked: summed in memory, flushed once, and shown as losses."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from lucid_compute.accounting.exactly_once import ExactlyOnceFlushes
from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.refusals import MAX_KINDS, NO_MODEL, NOBODY, RefusalRecorder
from lucid_compute.accounting.retention import JobRetention
from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.gateway.upstreams import HOP_HEADER
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.server.settings import Settings
from lucid_compute.web.lanes import IncomingRequest
from tests import needs_sources
from tests.api import ADMIN_KEY, Api, open_api
from tests.express_client import Client
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.gateway import chat_answer
from tests.integration.accounting.test_gauges import KILL
from tests.integration.accounting.test_losses import losses
from tests.integration.accounting.test_payouts import tell
from tests.integration.gateway.test_inference_limits import BODY, add_node, ask
from tests.ledger import ended, new_job, read

Recorder = Callable[..., RefusalRecorder]


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    """Makes replicas' recorders, whose tasks do not run."""
    made: list[RefusalRecorder] = []

    def make(url: str, clock: DatabaseClock | None = None) -> RefusalRecorder:
        made.append(RefusalRecorder(url, clock or DatabaseClock()))
        return made[-1]

    yield make
    for one in made:
        one._flushes.close()


async def refused(api: Api, **query: Any) -> dict[tuple[str, str], int]:
    """What was refused, by cause and side."""
    await api.replica.refusals.flush()
    report = await losses(api, **query)
    assert sum(each["refused"] for each in report["losses"]) == sum(each["refused"] for each in report["sides"])
    return {(each["cause"], each["side"]): each["refused"] for each in report["losses"] if each["refused"]}


async def rows(url: str) -> Counter[tuple[str, str, str]]:
    """What is kept, by cause, who asked and model."""
    kept: Counter[tuple[str, str, str]] = Counter()
    for row in await read(url, "SELECT * FROM refusals"):
        kept[row["cause"], row["consumer"], str(row["model_id"])] += row["requests"]
    return kept


async def test_no_refusal_counts_twice_or_is_lost_while_connections_are_killed(
    database_url: str, recorder: Recorder
) -> None:
    """Two replicas refuse requests of the same owners in turn."""
    chance = random.Random(5)
    models = [str(uuid4()) for _ in range(3)]
    replicas = [recorder(database_url) for _ in range(2)]
    told: Counter[tuple[str, str, str]] = Counter()
    for turn in range(60):
        for _ in range(20):
            kind = (chance.choice(["overloaded", "no_node"]), chance.choice(["acme", NOBODY]), chance.choice(models))
            chance.choice(replicas).count(*kind)
            told[kind] += 1
        flushing = [asyncio.create_task(replica.flush()) for replica in replicas]
        await asyncio.sleep(chance.uniform(0, 0.01))
        if turn % 2:
            await read(database_url, KILL)
        await asyncio.gather(*flushing)
    for replica in replicas:
        await replica.flush()
        while replica._flushes:
            await replica.flush()
        await replica.flush()
    assert await rows(database_url) == told


async def test_a_flush_that_was_committed_unheard_is_not_added_again(
    database_url: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lost = ExactlyOnceFlushes._write, 2

    async def commit_and_lose_the_answer(self: ExactlyOnceFlushes, number: int, text: str) -> bool:
        nonlocal lost
        is_done = await write(self, number, text)
        lost -= 1
        return is_done and lost < 0

    monkeypatch.setattr(ExactlyOnceFlushes, "_write", commit_and_lose_the_answer)
    refusals = recorder(database_url)
    for _ in range(4):
        refusals.count("overloaded")
        await refusals.flush()
    await refusals.flush()
    assert lost < 0
    assert sum((await rows(database_url)).values()) == 4


async def test_each_hour_keeps_its_own_and_tells_only_so_many_kinds_apart(
    database_url: str, recorder: Recorder
) -> None:
    """Whoever asks for one model after another makes no rows without end."""
    clock = DatabaseClock(monotonic=lambda: 0.0)
    clock.set(datetime(2026, 1, 1, 10, 59, 58, tzinfo=UTC))
    refusals = recorder(database_url, clock)
    await refusals.flush()
    for _ in range(MAX_KINDS + 100):
        refusals.count("no_node", "acme", str(uuid4()))
    await refusals.flush()
    refusals.count("no_node", "acme", str(uuid4()))
    assert refusals._pause_seconds() == 2
    clock.set(clock.now() + timedelta(seconds=2))
    await refusals.flush()
    known = str(uuid4())
    refusals.count("no_node", "acme", known)
    await refusals.flush()
    kept = await read(database_url, "SELECT hour, count(*), sum(requests) FROM refusals GROUP BY 1 ORDER BY 1")
    assert [(row[0].hour, row[1], row[2]) for row in kept] == [(10, MAX_KINDS + 1, MAX_KINDS + 101), (11, 1, 1)]
    others = ("no_node", NOBODY, NO_MODEL)
    assert (await rows(database_url))[others] == 101


async def test_refusals_wait_for_a_database_that_is_away_without_filling_memory_and_are_flushed_at_the_end(
    database_url: str, recorder: Recorder
) -> None:
    away = recorder("postgresql://nobody@127.0.0.1:1/none")
    for _ in range(5):
        away.count("overloaded")
        await away.flush()
    assert len(away._flushes) == 1
    there = recorder(database_url)
    task = asyncio.create_task(there.run())
    await asyncio.sleep(0)
    there.count("overloaded")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sum((await rows(database_url)).values()) == 1


@needs_sources
async def test_each_refusal_has_one_cause_and_one_side_and_is_one_outcome(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Prometheus counts as not served is what was refused and what failed on a node, neither more nor less."""
    busy, full = await api.register("busy", {"maxConcurrency": 1}), await api.register("dear", {"pricePer1kTokens": 9})
    await api.add_model("busy")
    await api.add_model("dear")
    await api.add_model("nowhere")
    await api.add_model("silent")
    await api.add_model("upstream", "api")
    await api.beat(busy, availableModels=["busy"])
    await api.beat(full, availableModels=["dear"])
    await api.beat(await api.register("ill", {}), availableModels=["silent"], status="unhealthy")
    api.replica.fleet.replicas.begin(busy)
    limited = await api.new_key("acme", ["inference:run"], limits={"requestsPerMinute": 1})
    for model, policy in {
        "busy": {},
        "dear": {"maxPricePer1kTokens": 1},
        "nowhere": {},
        "silent": {},
        "upstream": {},
        "unknown": {},
    }.items():
        await ask(api, model=model, lucid=policy)
    await ask(api, model="busy", stream="perhaps")
    await ask(api.with_key("lk_live_nobody's"))
    await ask(await api.new_key("acme", ["compute"]))
    await api.http.get("/v1/chat/completions")
    await api.http.post("/v1/chat/completions", content=b"x" * (32 * 1024 * 1024 + 1))
    await ask(limited, model="nowhere")
    await ask(limited, model="nowhere")

    async def away(_: ChangeFeed) -> None:
        raise DatabaseUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(ChangeFeed, "catch_up", away)
        await ask(api, model="not heard of")

    def break_down(_: str) -> None:
        raise KeyError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(api.replica.fleet, "find_model", break_down)
        await ask(api)
    assert await refused(api) == {
        ("nodes_busy", "provider"): 1,
        ("no_node_suits", "client"): 1,
        ("no_node", "provider"): 2,
        ("no_healthy_node", "provider"): 1,
        ("no_upstream", "us"): 1,
        ("model_not_found", "client"): 1,
        ("invalid_request", "client"): 1,
        ("unauthorized", "client"): 1,
        ("forbidden", "client"): 1,
        ("method_not_allowed", "client"): 1,
        ("payload_too_large", "client"): 1,
        ("rate_limited", "client"): 1,
        ("database_unavailable", "us"): 1,
        ("internal", "us"): 1,
    }
    assert sum(api.app.inference.outcomes.values()) == 15
    assert await refused(api, owner="acme") == {
        ("no_node", "provider"): 1,
        ("forbidden", "client"): 1,
        ("rate_limited", "client"): 1,
    }


async def test_what_failed_on_a_node_is_not_refused_as_well(api: Api) -> None:
    """Nor is what was served, or came back to us from a node, which is a part of the one that was sent there."""
    async with FaultNode(Behaviour(cut_head_after=0, ending=Ending.CLOSE)) as node:
        await add_node(api, node)
        assert (await ask(api)).status_code == 502
        node.behaviour = Behaviour(answer=chat_answer())
        assert (await ask(api)).status_code == 200
        await api.replica.feed.catch_up()
        hop = {HOP_HEADER: api.replica.feed.replica_id}
        assert (await api.http.post("/v1/chat/completions", json=BODY, headers=hop)).status_code == 508
    assert await refused(api) == {}
    assert sum(each["requests"] for each in (await losses(api))["losses"]) == 1


async def test_what_is_refused_because_too_much_runs_is_ours_in_both_lanes(database_url: str) -> None:
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, inference_max_concurrency=1)
    async with open_api(database_url, settings) as api:
        api.app.inference.running_count = 1
        assert (await ask(api)).status_code == 503
        assert api.app.inference.accept(client := Client(), IncomingRequest("/v1/chat/completions", {}, b"{}")) is None
        assert await client.told == 503
        assert await refused(api) == {("overloaded", "us"): 2}
        assert await rows(database_url) == {("overloaded", NOBODY, NO_MODEL): 2}


async def test_a_refusal_is_worth_what_such_a_request_typically_earns(api: Api) -> None:
    """Nothing when it was not in order, or its model has an upstream; unknown when nothing is known."""
    model, upstream, other = await api.add_model("m"), await api.add_model("u", "api"), await api.add_model("other")
    jobs = [ended(new_job(model_id=model), tokens_in=100, tokens_out=300, price_usd=Decimal("0.04")) for _ in range(4)]
    await tell(api, jobs)
    for cause, of in (
        *[("nodes_busy", model)] * 3,
        ("no_node", other),
        ("overloaded", NO_MODEL),
        ("invalid_request", model),
        ("no_upstream", upstream),
    ):
        api.replica.refusals.count(cause, "consumer", of)
    await refused(api)
    found = {each["cause"]: each for each in (await losses(api))["losses"]}
    assert {cause: (Decimal(each["unearnedUsd"]), each["unestimated"]) for cause, each in found.items()} == {
        "nodes_busy": (Decimal("0.12"), 0),
        "no_node": (0, 1),
        "overloaded": (0, 1),
        "invalid_request": (0, 0),
        "no_upstream": (0, 0),
    }
    assert {(each["requests"], each["retried"]) for each in found.values()} == {(0, 0)}


async def test_a_cause_that_failed_and_refused_requests_is_one_line(api: Api) -> None:
    """In both it is the same side's fault."""
    await tell(api, [ended(new_job(), Outcome.CANCELLED, reason="client_left", price_usd=None)])
    api.replica.refusals.count("client_left", "acme")
    await refused(api)
    (line,) = (await losses(api))["losses"]
    assert (line["cause"], line["requests"], line["refused"]) == ("client_left", 1, 1)


async def test_an_owner_sees_its_own_refused_requests_and_those_for_its_models_and_no_others(api: Api) -> None:
    consumer, maker, stranger = [await api.new_key(owner, ["compute", "passports:write"]) for owner in "cms"]
    model = await maker.add_model("m")
    api.replica.refusals.count("nodes_busy", "c", model)
    api.replica.refusals.count("overloaded")
    assert await refused(consumer) == await refused(maker) == {("nodes_busy", "provider"): 1}
    assert await refused(stranger) == {}
    assert await refused(api) == {("nodes_busy", "provider"): 1, ("overloaded", "us"): 1}


async def test_refusals_leave_with_the_jobs_of_their_days(api: Api) -> None:
    statement = "INSERT INTO refusals SELECT now() - $1 * interval '1 hour', '', $2, 'no_node', 1"
    for hours in (*range(47, 50), *range(500, 520)):
        await read(api.replica.database.url, statement, hours, NO_MODEL)
    await JobRetention(api.replica.database, days=2).remove_all(batch=5)
    assert sum((await rows(api.replica.database.url)).values()) == 1
