"""What the lane of inference refuses before a node is asked: too many at once, too fast, too large, not JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
import pytest

from lucid_compute.gateway.ranking import Ranking, rank
from lucid_compute.server.settings import Settings
from tests import needs_sources
from tests.api import ADMIN_KEY, Api, open_api
from tests.express_client import Entrance, FastPath
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import chat_answer
from tests.other_replicas import until

INFERENCE_BYTES = 32 * 1024 * 1024  # of a body below /v1, unless the setting says otherwise
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Say hello."}]}


@pytest.fixture
async def api(database_url: str, settings: Settings, entrance: Entrance) -> AsyncIterator[Api]:
    """A replica that is asked at either entrance of the lane."""
    async with open_api(database_url, settings) as opened:
        yield entrance(opened)


@pytest.fixture
async def small_api(database_url: str, entrance: Entrance) -> AsyncIterator[Api]:
    """The same; it serves two inference requests at a time."""
    async with open_api(database_url, Settings(bootstrap_admin_key=ADMIN_KEY, inference_max_concurrency=2)) as opened:
        yield entrance(opened)


async def add_node(api: Api, node: FaultNode) -> str:
    """Register a node that serves `tiny`, and let it beat."""
    await api.add_model("tiny", "gguf")
    passport_id = await api.register("slow", {"inferenceUrl": node.url, "runtimes": ["llama.cpp"]})
    assert (await api.beat(passport_id, availableModels=["tiny"])).status_code == 200
    return passport_id


async def ask(api: Api, **changes: object) -> httpx.Response:
    """Send a chat completion."""
    return await api.http.post("/v1/chat/completions", json={**BODY, **changes}, timeout=30)


async def test_more_than_it_takes_is_refused_at_once_while_heartbeats_get_through(small_api: Api) -> None:
    """The third request is 503 with Retry-After before its key is looked at; a heartbeat is 200; the two are served."""
    async with FaultNode(Behaviour(delay_seconds=0.5)) as node:
        passport_id = await add_node(small_api, node)
        running = [asyncio.create_task(ask(small_api)) for _ in range(2)]
        while len(node.requests) < 2:  # noqa: ASYNC110 - the node is another server's state
            await asyncio.sleep(0.01)
        refused = await ask(small_api.with_key("nobody's key"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "OVERLOADED")
        assert int(refused.headers["retry-after"]) >= 1
        named = await small_api.http.post("/v1/chat/completions", headers={"X-Request-Id": "mine"})
        unfit = await small_api.http.post("/v1/chat/completions", headers={"X-Request-Id": "not fit"})
        assert (named.status_code, named.headers["x-request-id"], named.content) == (503, "mine", refused.content)
        assert unfit.headers["x-request-id"] not in {"mine", "not fit"}
        assert small_api.app.inference.outcomes["OVERLOADED"] == 3
        assert (await small_api.beat(passport_id, availableModels=["tiny"])).status_code == 200
        assert [(await answer).status_code for answer in running] == [200, 200]
        assert (await ask(small_api)).status_code == 200


async def test_both_entrances_refuse_alike(api: Api) -> None:
    """Status, headers except the request's id, body and count are the same; the fast path refuses without a task."""
    fast, lane = FastPath(api.app), api.app.inference
    await api.add_model("tiny", "gguf")
    asked = (
        (api.key, b"{"),
        (api.key, b"[]"),
        (api.key, b'{"model": "tiny", "stream": 1}'),
        ((await api.new_key("acme", ["compute"])).key, b"{}"),
    )
    for key, content in asked:
        told = []
        for each in (Api(api.app, key), Api(api.app, key, fast)):
            outcomes = lane.outcomes.copy()
            answer = await each.http.post("/v1/chat/completions", content=content)
            headers = {**answer.headers, "x-request-id": ""}
            told.append((answer.status_code, headers, answer.content, lane.outcomes - outcomes))
        assert told[0] == told[1]
    assert (fast.responses, fast.tasks) == (len(asked), 0)


async def test_a_request_refused_for_tokens_costs_none_of_the_requests(api: Api) -> None:
    """Neither entrance takes it off."""
    async with FaultNode(Behaviour(answer=chat_answer(tokens_out=1000))) as node:
        await add_node(api, node)
        limited = await api.new_key("acme", ["inference:run"], limits={"requestsPerMinute": 100, "tokensPerMinute": 20})
        answers = [await ask(limited) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 429, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["99", "99", "99"]


async def test_a_keys_limits_are_told_in_headers_and_in_a_429(api: Api) -> None:
    """Remaining falls with each request; the one too many says which limit it was, and when to come again."""
    async with FaultNode(Behaviour()) as node:
        await add_node(api, node)
        limited = await api.new_key(
            "acme", ["inference:run"], limits={"requestsPerMinute": 3, "tokensPerMinute": 10**6}
        )
        answers = [await ask(limited) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        told = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:3]]
        assert told == ["2", "1", "0"]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
        assert answers[0].headers["x-ratelimit-limit-tokens"] == "1000000"
        assert '"requests";q=3;w=60' in answers[0].headers["ratelimit-policy"]
        error = answers[3].json()["error"]
        assert (error["code"], error["type"], error["details"]["unit"]) == (
            "RATE_LIMITED",
            "rate_limit_error",
            "requests",
        )
        seconds = int(answers[3].headers["retry-after"])
        assert 50 <= seconds <= 64
        assert error["message"] == (
            f"This key's limit of 3 requests a minute is reached: 3 are spent. Retry in {seconds} s."
        )


async def test_two_replicas_share_a_keys_limit(database_url: str, settings: Settings, entrance: Entrance) -> None:
    """A client of one of them may use all of it at once; then the other one refuses too, on every path."""
    async with (
        open_api(database_url, settings) as first,
        open_api(database_url, settings) as second,
        FaultNode(Behaviour()) as node,
    ):
        await add_node(first, node)
        key = (await first.new_key("acme", ["inference:run"], limits={"requestsPerMinute": 20})).key
        for api in (first, second):
            await until(partial(knows_two, api))
        asked = [entrance(api).with_key(key) for api in (first, second)]
        for _ in range(5):  # the node takes no more than eight at a time
            answers = await asyncio.gather(*(ask(asked[0]) for _ in range(4)))
            assert [answer.status_code for answer in answers] == [200] * 4
        for api in asked:
            assert (await ask(api)).status_code == 429
            refused = await api.http.post("/match", json={"model": "tiny"})
            assert "limit of 20 requests a minute is reached: 20 are spent" in refused.json()["error"]["message"]


async def knows_two(api: Api) -> bool:
    """Return whether the replica knows that there are two."""
    return api.replica.fleet.replicas.count() == 2


@pytest.mark.parametrize(
    ("content", "status", "code", "param"),
    [
        (b"{", 400, "INVALID_REQUEST", None),
        (b"", 400, "INVALID_REQUEST", None),
        (b"[]", 422, "INVALID_REQUEST", None),
        (b'{"messages": []}', 422, "INVALID_REQUEST", "model"),
        (b'{"model": 7}', 422, "INVALID_REQUEST", "model"),
        (b'{"model": "tiny", "stream": "yes"}', 422, "INVALID_REQUEST", "stream"),
        (b'{"model": "tiny", "model": "other"}', 422, "INVALID_REQUEST", "model"),
        (b'{"model": "tiny", "lucid": {"nodeIDs": []}}', 422, "INVALID_REQUEST", "lucid.nodeIDs"),
        (b'{"model": "none"}', 404, "MODEL_NOT_FOUND", None),
        (b'{"model": "' + b"x" * INFERENCE_BYTES + b'"}', 413, "PAYLOAD_TOO_LARGE", None),
    ],
)
async def test_a_bad_request_is_refused_in_openais_shape(
    api: Api, content: bytes, status: int, code: str, param: str | None
) -> None:
    """What is wrong stands in `code`, where in `param`; nothing was sent anywhere."""
    await api.add_model("tiny", "gguf")
    answer = await api.http.post("/v1/chat/completions", content=content)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["message"]
    assert answer.headers["x-request-id"]


async def test_only_a_key_for_inference_gets_in(api: Api) -> None:
    """401 without a key, 403 without the scope, and 405 for what is not a POST; GET /v1/models alike."""
    assert (await ask(api.with_key(None))).status_code == 401
    provider = await api.new_key("acme", ["compute"])
    refused = await ask(provider)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert (await provider.http.get("/v1/models")).status_code == 403
    assert (await provider.http.post("/match", json={"model": "tiny"})).status_code == 403
    wrong = await api.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"], wrong.json()["error"]["code"]) == (
        405,
        "POST",
        "METHOD_NOT_ALLOWED",
    )
    nowhere = await api.http.post("/v1/audio/voices", json={})
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "not_found_error")


async def test_a_model_that_nobody_serves_is_unavailable_with_the_reasons(api: Api) -> None:
    """503 with Retry-After; `rejections` counts nodes by reason."""
    await api.add_model("tiny", "gguf")
    passport_id = await api.register("other", {"runtimes": ["llama.cpp"]})
    await api.beat(passport_id, availableModels=["another"])
    answer = await ask(api)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], answer.headers["retry-after"]) == (503, "MODEL_UNAVAILABLE", "5")
    assert error["details"]["rejections"] == {"MODEL_NOT_SERVED": 1}


@needs_sources
async def test_requests_that_no_node_can_serve_share_one_ranking_of_the_fleet(api: Api) -> None:
    """Forty at once, one of which leaves, get the same response; another endpoint or policy needs another."""
    rankings = 0

    async def counted(*arguments: Any) -> Ranking:
        nonlocal rankings
        rankings += 1
        await asyncio.sleep(0.05)
        return await rank(*arguments)

    api.replica.gateway.rank = counted
    await api.add_model("tiny", "gguf")
    await api.beat(await api.register("other", {"runtimes": ["llama.cpp"]}), availableModels=["another"])
    asked = [asyncio.create_task(ask(api)) for _ in range(40)]
    await asyncio.sleep(0.02)
    asked.pop(0).cancel()
    answers = [await answer for answer in asked]
    assert {answer.status_code for answer in answers} == {503}
    told = [answer.json()["error"]["details"]["rejections"] for answer in answers]
    assert told == [{"MODEL_NOT_SERVED": 1}] * 39
    assert rankings == 1
    assert (await api.http.post("/v1/embeddings", json=BODY)).status_code == 503
    assert (await ask(api, lucid={"allowRegions": ["eu"]})).status_code == 503
    assert rankings == 3
