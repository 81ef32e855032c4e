"""Responses that a node has stored: read, cancelled, deleted and continued at that node, by their owner alone.

The nodes answer as vLLM does with `VLLM_ENABLE_RESPONSES_API_STORE=1`.
"""

from __future__ import annotations

import asyncio
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from lucid_compute.server.settings import Settings
from tests.api import Api, error_code, open_api
from tests.express_client import Entrance
from tests.fault_answers import respond, respond_in_chunks
from tests.fault_node import Behaviour, FaultNode
from tests.integration.gateway.test_endpoints import jobs_of
from tests.lucid_serve import eventually

OWN = "resp_94c26d5bd2e6478ea92ab08d2ad6d1a7"  # as vLLM makes them
USAGE = {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11}
TEXT = [{"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello!"}]}]


def response(own: str = OWN, status: str = "completed", **fields: Any) -> dict[str, Any]:
    """Return a response as a node has it."""
    ended = status == "completed"
    return {
        "id": own,
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": status,
        "background": False,
        "output": TEXT if ended else [],
        "previous_response_id": None,
        "usage": USAGE if ended else None,
        **fields,
    }


def answering(value: Any, status: int = 200) -> Behaviour:
    """Return a behaviour that answers with JSON."""
    return Behaviour(answer=respond(json.dumps(value).encode(), status=status))


def not_found(own: str) -> Behaviour:
    """Return vLLM's refusal of an id."""
    error = {"message": f"Response with id '{own}' not found.", "type": "invalid_request_error", "code": 404}
    return answering({"error": error}, 404)


@asynccontextmanager
async def nodes_of(api: Api, count: int = 1, price: str = "1") -> AsyncIterator[list[FaultNode]]:
    """Run nodes that serve `m`. The first is idle, and the others are busier."""
    await api.add_model("m", "gguf")
    nodes = [FaultNode(answering(response())) for _ in range(count)]
    try:
        for number, node in enumerate(nodes):
            await node.start()
            known = {"runtimes": ["vllm", "llama.cpp"], "pricePer1kTokens": price, "inferenceUrl": f"{node.url}/v1"}
            node_id = await api.register(f"node-{number}", known)
            assert (await api.beat(node_id, load=number / count, availableModels=["m"])).status_code == 200
        yield nodes
    finally:
        for node in nodes:
            await node.stop()


async def create(api: Api, **fields: Any) -> httpx.Response:
    """Ask for a response."""
    answer = await api.http.post("/v1/responses", json={"model": "m", "input": "Say hello.", **fields})
    assert answer.status_code == 200, answer.text
    return answer


def asked_of(*nodes: FaultNode) -> list[list[str]]:
    """Return what each node was asked for, without the requests that create responses."""
    return [[f"{each.method} {each.path}" for each in node.requests if each.path != "/v1/responses"] for node in nodes]


async def test_a_response_is_read_cancelled_and_deleted_at_the_node_that_has_it(api: Api, entrance: Entrance) -> None:
    """Under an id of this service, which the node never sees; the node's own id is shown nowhere."""
    async with nodes_of(api, 3) as nodes:
        client = entrance(api)
        made = await create(client)
        shown = made.json()["id"]
        assert made.json() == response(shown)
        home = next(node for node in nodes if node.requests)
        for method, path, asked, value in (
            ("GET", f"/v1/responses/{shown}", f"GET /v1/responses/{OWN}", response()),
            ("POST", f"/v1/responses/{shown}/cancel", f"POST /v1/responses/{OWN}/cancel", response()),
            ("DELETE", f"/v1/responses/{shown}", f"DELETE /v1/responses/{OWN}", {"id": OWN, "deleted": True}),
        ):
            home.requests.clear()
            home.behaviour = answering(value)
            answer = await client.http.request(method, path)
            assert (answer.status_code, answer.json()) == (200, {**value, "id": shown}), answer.text
            assert answer.headers["x-lucid-node"] == made.headers["x-lucid-node"]
            assert [f"{each.method} {each.path}" for each in home.requests] == [asked]
            assert "content-type" not in home.requests[0].headers
        assert sum(len(node.requests) for node in nodes) == 1
        jobs = await jobs_of(api, 4)
        assert sorted((job["endpoint"], job["tokensIn"], job["tokensOut"]) for job in jobs) == [
            ("responses", 9, 2),
            ("responses/{response_id}", 0, 0),
            ("responses/{response_id}", 0, 0),
            ("responses/{response_id}/cancel", 0, 0),
        ]


async def test_somebody_elses_response_is_as_one_that_is_missing(api: Api, entrance: Entrance) -> None:
    """And so is one that the node has no longer, one that was changed, and one that nobody ever had."""
    async with nodes_of(api) as (node,):
        acme, other = [await entrance(api).new_key(owner, ["inference:run"]) for owner in ("acme", "other")]
        shown = (await create(acme)).json()["id"]
        mine = (await create(other)).json()["id"]
        assert mine != shown
        node.requests.clear()
        node.behaviour = not_found(OWN)
        refused = [
            await client.http.request(method, f"/v1/responses/{id_}{rest}")
            for method, rest in (("GET", ""), ("POST", "/cancel"), ("DELETE", ""))
            for client, id_ in (
                (other, shown),
                (acme, shown),
                (acme, OWN),
                (acme, shown[:-1] + ("A" if shown[-1] != "A" else "B")),
                (acme, "resp_" + "A" * 120),
                (acme, shown[:40] + mine[40:]),
            )
        ]
        assert len(node.requests) == 3  # for the one that is acme's own
        for answer in refused:
            error = answer.json()["error"]
            id_ = error["details"]["responseId"]
            assert (answer.status_code, error["code"]) == (404, "RESPONSE_NOT_FOUND")
            assert error["message"].replace(id_, "ID") == refused[0].json()["error"]["message"].replace(shown, "ID")
            assert answer.headers["content-type"] == "application/json"
        assert not (await api.health(await only_node(api)))["errorRate"]


async def only_node(api: Api) -> str:
    """Return the id of the only node."""
    return str((await api.http.get("/compute")).json()["nodes"][0]["id"])


async def test_each_bit_of_an_id_counts(api: Api) -> None:
    async with nodes_of(api) as (node,):
        shown = (await create(api)).json()["id"]
        text = shown.removeprefix("resp_")
        whole = bytearray(urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        node.requests.clear()
        for at in range(len(whole)):
            whole[at] ^= 1
            forged = "resp_" + urlsafe_b64encode(whole).decode().rstrip("=")
            assert (await api.http.get(f"/v1/responses/{forged}")).status_code == 404, at
            whole[at] ^= 1
        assert not node.requests


async def test_a_stream_shows_the_same_id_as_what_is_read_later(api: Api, entrance: Entrance) -> None:
    """Streamed when it was made, and again when it is read, from where the client stopped."""
    told: list[dict[str, Any]] = [
        {"type": "response.created", "response": response(status="in_progress"), "sequence_number": 0},
        {"type": "response.output_text.delta", "delta": "Hello!", "item_id": "msg_1", "sequence_number": 4},
        {"type": "response.completed", "response": response(), "sequence_number": 9},
    ]
    events = [b"event: %b\ndata: %b\n\n" % (each["type"].encode(), json.dumps(each).encode()) for each in told]
    async with nodes_of(api, 2) as nodes:
        for node in nodes:
            node.behaviour = Behaviour(answer=respond_in_chunks(*events))
        client = entrance(api)
        streamed = (await create(client, stream=True)).content
        assert OWN.encode() not in streamed
        shown = json.loads(streamed.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
        assert streamed == b"".join(events).replace(OWN.encode(), shown.encode())
        again = await client.http.get(f"/v1/responses/{shown}", params={"stream": "true", "starting_after": 0})
        assert again.content == streamed
        assert again.headers["content-type"].startswith("text/event-stream")
        asked = next(node for node in nodes if node.requests).requests[-1]
        assert asked.path == f"/v1/responses/{OWN}?stream=true&starting_after=0"
        jobs = await jobs_of(api, 2)
        assert sorted((job["stream"], job["tokensOut"]) for job in jobs) == [(True, 0), (True, 2)]


async def test_what_continues_a_response_goes_to_its_node(api: Api, entrance: Entrance) -> None:
    """With the node's own id, whatever the choice would be otherwise; large bodies too. The answer shows ours."""
    async with nodes_of(api, 3) as nodes:
        client = entrance(api)
        first = await create(client)
        shown = first.json()["id"]
        home = next(node for node in nodes if node.requests)
        home.behaviour = answering(response("resp_2", previous_response_id=OWN))
        for _ in range(6):
            for text in ("go on", "go on" * 40_000):
                again = await create(client, input=text, previous_response_id=shown)
                assert again.headers["x-lucid-node"] == first.headers["x-lucid-node"]
                assert again.json()["previous_response_id"] == shown
                assert again.json()["id"].startswith("resp_")
                assert again.json()["id"] not in {"resp_2", shown}
                asked = json.loads(home.requests[-1].body)
                assert (asked["previous_response_id"], asked["input"], asked["model"]) == (OWN, text, "m")
        elsewhere = [node for node in nodes if node is not home]
        assert asked_of(*elsewhere) == [[], []]
        assert sum(len(node.requests) for node in elsewhere) == 0
        home.behaviour = not_found(OWN)
        refused = await client.http.post(
            "/v1/responses", json={"model": "m", "input": "x", "previous_response_id": shown}
        )
        assert (refused.status_code, error_code(refused)) == (404, "RESPONSE_NOT_FOUND")
        assert OWN not in refused.text
        other = await client.new_key("other", ["inference:run"])
        for node in nodes:
            node.behaviour = not_found(shown)
        stolen = await other.http.post(
            "/v1/responses", json={"model": "m", "input": "x", "previous_response_id": shown}
        )
        assert stolen.status_code == 404
        assert OWN.encode() not in b"".join(node.requests[-1].body for node in nodes if node.requests)


async def test_a_response_in_the_background_is_billed_once_when_its_end_is_seen(
    api: Api, entrance: Entrance, database_url: str, settings: Settings
) -> None:
    """Not when it is asked for, not while it runs, and not again when it is read again, on another replica too."""
    async with nodes_of(api) as (node,), open_api(database_url, settings) as another:
        client = entrance(api)
        node.behaviour = answering(response(status="queued", background=True))
        shown = (await create(client, background=True)).json()["id"]
        node.behaviour = answering(response(status="in_progress", background=True))
        assert (await client.http.get(f"/v1/responses/{shown}")).json()["status"] == "in_progress"
        node.behaviour = answering(response(background=True))
        for _ in range(3):
            assert (await client.http.get(f"/v1/responses/{shown}")).json()["usage"] == USAGE
        for _ in range(2):
            assert (await another.http.get(f"/v1/responses/{shown}")).json()["status"] == "completed"
        jobs = await jobs_of(api, 8)
        billed = [(job["endpoint"], job["tokensIn"], job["tokensOut"]) for job in jobs if job["tokensIn"]]
        assert (len(jobs), billed) == (8, [("responses", 9, 2)])
        assert sum(float(job["priceUsd"] or 0) for job in jobs) == pytest.approx(0.011)


async def test_a_response_is_read_while_its_node_is_full_drained_or_failing(api: Api, entrance: Entrance) -> None:
    """It is nobody else's to serve. When the node has left, it is gone."""
    async with nodes_of(api) as (node,):
        client, node_id = entrance(api), await only_node(api)
        shown = (await create(client)).json()["id"]
        assert (await api.http.patch(f"/passports/{node_id}", json={"metadata": {"maxConcurrency": 1}})).is_success
        node.behaviour = Behaviour(delay_seconds=60.0)
        running = asyncio.create_task(client.http.post("/v1/responses", json={"model": "m", "input": "x"}))

        async def is_full() -> bool:
            return bool((await api.health(node_id))["inFlight"] == 1)

        await eventually(is_full)
        node.behaviour = answering(response())
        assert (await client.http.get(f"/v1/responses/{shown}")).status_code == 200
        running.cancel()
        assert (await api.http.post(f"/compute/drain/{node_id}")).status_code == 202
        assert (await client.http.get(f"/v1/responses/{shown}")).status_code == 200
        node.behaviour = answering({"detail": "Method Not Allowed"}, 405)
        refused = await client.http.delete(f"/v1/responses/{shown}")
        assert (refused.status_code, error_code(refused)) == (405, "INVALID_REQUEST")
        node.behaviour = answering({"error": {"message": "Cannot cancel a synchronous response."}}, 400)
        refused = await client.http.post(f"/v1/responses/{shown}/cancel")
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            400,
            "Cannot cancel a synchronous response.",
        )
        await node.stop()
        refused = await client.http.get(f"/v1/responses/{shown}")
        assert (refused.status_code, error_code(refused)) == (502, "NODE_FAILED")
        assert (await api.http.post(f"/compute/deregister/{node_id}", params={"force": True})).status_code == 200
        for path in ("", "/cancel"):
            refused = await client.http.request("POST" if path else "GET", f"/v1/responses/{shown}{path}")
            assert (refused.status_code, error_code(refused)) == (404, "RESPONSE_NOT_FOUND")
        body = {"model": "m", "input": "x", "previous_response_id": shown}
        refused = await client.http.post("/v1/responses", json=body)
        assert (refused.status_code, error_code(refused)) == (404, "RESPONSE_NOT_FOUND")


async def test_another_replica_reads_it_too_and_so_does_one_after_a_restart(
    database_url: str, settings: Settings
) -> None:
    async with open_api(database_url, settings) as one, open_api(database_url, settings) as two, nodes_of(one):
        shown = (await create(one)).json()["id"]
        assert (await two.http.get(f"/v1/responses/{shown}")).json() == response(shown)
        async with open_api(database_url, settings) as later:
            assert (await later.http.get(f"/v1/responses/{shown}")).json() == response(shown)


UNSOUND = ("x" * 401, "a%2Fb", "..", "resp_%0d%0aX-Evil:1", "resp_\u00e9", "resp_" + "-" * 380)


@pytest.mark.parametrize("name", UNSOUND)
async def test_an_id_that_is_none_is_refused(api: Api, entrance: Entrance, name: str) -> None:
    refused = await entrance(api).http.get(f"/v1/responses/{name}")
    assert (refused.status_code, error_code(refused)) in {(404, "RESPONSE_NOT_FOUND"), (404, "ROUTE_NOT_FOUND")}


async def test_path_method_key_and_query_are_judged_in_this_order(api: Api, entrance: Entrance) -> None:
    async with nodes_of(api) as (node,):
        client = entrance(api)
        shown = (await create(client)).json()["id"]
        stranger = client.with_key("lk_live_wrong")
        node.requests.clear()
        for method, path, allowed in (
            ("PUT", f"/v1/responses/{shown}", "DELETE, GET"),
            ("GET", f"/v1/responses/{shown}/cancel", "POST"),
        ):
            refused = await stranger.http.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        assert (await stranger.http.get(f"/v1/responses/{shown}")).status_code == 401
        assert (await client.http.get(f"/v1/responses/{shown}/cancel/x")).status_code == 404
        for query in ("x=" + "y" * 1100, "a=%0d%0a&b=<>", 'a="'):
            refused = await client.http.get(httpx.URL(f"/v1/responses/{shown}").copy_with(query=query.encode()))
            assert refused.status_code in {200, 422}, query
        heads = b"".join(each.head for each in node.requests)
        assert b"<" not in heads
        assert b'"' not in heads


async def test_ids_that_can_not_be_sent_back_to_the_node_are_left_as_they_are(api: Api) -> None:
    async with nodes_of(api) as (node,):
        for own in ("resp_a/../b", "resp_\r\nX: 1", "resp_" + "x" * 300, "", 7, None, "123"):
            node.behaviour = answering(response(own))  # type: ignore[arg-type]
            assert (await create(api)).json()["id"] == own
        assert len(node.requests) == 7
