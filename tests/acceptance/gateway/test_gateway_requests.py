"""What of a client's request reaches which node: its body, none of its credentials, and the policy that it brings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fault_answers import chat_stream
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, Gateway, chat_answer

pytestmark = pytest.mark.asyncio(loop_scope="session")

NODE_KEY = "the-nodes-own-bearer"
SENT_TO_A_NODE = {
    "accept",
    "accept-encoding",
    "content-length",
    "content-type",
    "host",
    "user-agent",
    "x-lucid-replica",
    "x-request-id",
}
STEADY_SECONDS = 0.02  # a node that always takes so long; waits of less are mostly noise
TOOLS: list[Any] = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


async def test_a_request_arrives_as_it_was_sent(gateway: Gateway, recorder: FaultNode) -> None:
    """Byte for byte, but for the model's name: options old and unknown, numbers as written, the order of keys."""
    model = await gateway.add_model(aliases=["known/at:the-node"])
    await gateway.add_node(f"{recorder.url}/v1/", "known/at:the-node")
    sent = (
        '{ "seed":7,"model" : "MODEL" ,\t"temperature":0.10, "big":12345678901234567890,"e":1e3,'
        '"messages":[{"role":"user","content":"caf\\u00e9 \\ud83d\\ude00 é \\"model\\": \\"MODEL\\""}],'
        '"unknown":{"deep":[1,2.50,null,{"model":"inner"}]},"stream":false }\n'
    )
    plain = sent.replace('{"model":"inner"}', "{}").replace('\\"model\\": \\"MODEL\\"', "")
    answer = await gateway.raw.post("/v1/chat/completions", content=plain.replace("MODEL", model).encode())
    assert answer.status_code == 200, answer.text
    assert recorder.requests[-1].path == "/v1/chat/completions"
    assert recorder.requests[-1].body == plain.replace("MODEL", "known/at:the-node").encode()
    answer = await gateway.raw.post("/v1/chat/completions", content=sent.replace("MODEL", model).encode())
    arrived = json.loads(recorder.requests[-1].body)
    assert arrived == {**json.loads(sent.replace("MODEL", model)), "model": "known/at:the-node"}


async def test_openais_options_arrive(gateway: Gateway, recorder: FaultNode) -> None:
    """Tools, a response format, a seed, logprobs and what comes next year: none of them is ours to judge."""
    model = await gateway.add_model()
    await gateway.add_node(recorder.url, model)
    options: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
        "seed": 42,
        "logprobs": True,
        "n": 2,
    }
    extra = {"next_year": {"a": [1, None]}, "min_p": 0.05}
    await gateway.openai.chat.completions.create(model=model, messages=QUESTION, **options, extra_body=extra)
    assert json.loads(recorder.requests[-1].body) == {"model": model, "messages": QUESTION, **options, **extra}


async def test_a_model_may_be_asked_for_by_name_alias_and_id(gateway: Gateway, recorder: FaultNode) -> None:
    """Whatever the client calls it, the node is asked for what the node calls it: as declared, else as reported."""
    model = await gateway.add_model(aliases=["org/alias with spaces", "as-declared"])
    node = await gateway.add_node(recorder.url, "org/alias with spaces")
    for name in (model, "org/alias with spaces", "as-declared", await gateway.id_of(model)):
        assert (await gateway.chat(name)).status_code == 200
    assert {json.loads(request.body)["model"] for request in recorder.requests} == {"org/alias with spaces"}
    declared = {"models": [{"id": "as-declared", "maxTokens": None, "quantization": None}]}
    assert (await gateway.admin.put(f"/compute/models/{node}", json=declared)).status_code == 200
    assert (await gateway.chat(model)).status_code == 200
    assert json.loads(recorder.requests[-1].body)["model"] == "as-declared"
    assert {job["model"] for job in await gateway.jobs(model, 5)} == {model}


async def test_a_stream_is_asked_for_its_usage(gateway: Gateway, recorder: FaultNode) -> None:
    """Added where the client said nothing of it, merged where it said something else, left where it asked itself."""
    model = await gateway.add_model()
    await gateway.add_node(recorder.url, model)
    recorder.behaviour = Behaviour(answer=chat_stream("a"))
    for options, expected in (
        ({}, {"include_usage": True}),
        ({"stream_options": None}, {"include_usage": True}),
        ({"stream_options": {"include_usage": False, "other": 1}}, {"include_usage": True, "other": 1}),
        ({"stream_options": {"include_usage": True}}, {"include_usage": True}),
    ):
        answer = await gateway.chat(model, stream=True, **options)
        assert (answer.status_code, answer.text.count("[DONE]")) == (200, 1)
        assert json.loads(recorder.requests[-1].body)["stream_options"] == expected


async def test_a_clients_credentials_never_reach_a_node(gateway: Gateway, recorder: FaultNode) -> None:
    """Nothing of its head does. The node's own key is sent as its bearer, and shown to nobody."""
    model = await gateway.add_model()
    node = await gateway.add_node(recorder.url, model, inferenceKey=NODE_KEY)
    headers = {
        "Cookie": "session=a-cookie",
        "X-Api-Key": "another-secret",
        "X-Forwarded-For": "198.51.100.7",
        "X-Forwarded-Host": "inner.example",
        "Forwarded": "for=198.51.100.7",
        "OpenAI-Organization": "org-of-the-client",
        "X-Lucid-Session": "a-session-of-the-client",
        "X-Request-Id": "the-clients-id",
    }
    answer = await gateway.raw.post("/v1/chat/completions", json={"model": model, "messages": []}, headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "the-clients-id")
    (request,) = recorder.requests
    assert set(request.headers) == {*SENT_TO_A_NODE, "authorization"}
    assert request.headers["authorization"] == f"Bearer {NODE_KEY}"
    assert request.headers["x-request-id"] == answer.headers["x-lucid-job"]
    for secret in (gateway.key, "a-cookie", "another-secret", "198.51", "inner.example", "of-the-client"):
        assert secret.encode() not in request.head + request.body
    shown = [answer, *[await gateway.admin.get(path) for path in (f"/passports/{node}", "/compute", "/compute/jobs")]]
    shown += [await gateway.admin.get(f"/models/{model}/availability"), await gateway.admin.get("/audit?perPage=100")]
    shown += [await gateway.raw.post("/match", json={"model": model})]
    for told in shown:
        assert told.status_code == 200
        assert NODE_KEY not in told.text + str(told.headers)


async def test_a_model_of_format_api_goes_to_its_upstream(gateway: Gateway, recorder: FaultNode) -> None:
    """With the upstream's key and its name for the model; the job has no node. Its faults are not replaced."""
    upstream = {"url": f"{recorder.url}/base", "model": "theirs", "apiKey": NODE_KEY}
    model = await gateway.add_model(format="api", upstream=upstream)
    raw = await gateway.openai.chat.completions.with_raw_response.create(model=model, messages=QUESTION)
    assert "x-lucid-node" not in raw.headers
    (request,) = recorder.requests
    assert (request.path, request.headers["authorization"]) == ("/base/v1/chat/completions", f"Bearer {NODE_KEY}")
    assert json.loads(request.body)["model"] == "theirs"
    (job,) = await gateway.jobs(model)
    assert (job["outcome"], job["passportId"], job["tokensIn"], job["tokensOut"]) == ("completed", None, 3, 2)
    assert NODE_KEY not in (await gateway.admin.get(f"/models/{model}")).text
    assert NODE_KEY not in (await gateway.admin.get(f"/passports/{await gateway.id_of(model)}")).text
    await recorder.stop()
    failed = await gateway.chat(model)
    assert (failed.status_code, failed.json()["error"]["code"]) == (502, "NODE_FAILED")
    assert NODE_KEY not in failed.text
    bare = await gateway.add_model(format="api")
    assert (await gateway.chat(bare)).json()["error"]["code"] == "MODEL_UNAVAILABLE"


async def test_a_policy_chooses_among_nodes(gateway: Gateway, recorder: FaultNode) -> None:
    """Regions, a price, named nodes: in a request and in /match alike, which name the rules that failed."""
    model = await gateway.add_model()
    dear = await gateway.add_node(recorder.url, model, region="eu", pricePer1kTokens="0.02")
    cheap = await gateway.add_node(recorder.url, model, region="us", pricePer1kTokens="0.01")
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"allowRegions": ["eu", "asia"]}, dear, "REGION_NOT_ALLOWED"),
        ({"maxPricePer1kTokens": 0.015}, cheap, "PRICE_TOO_HIGH"),
        ({"maxPricePer1kTokens": "0.01"}, cheap, "PRICE_TOO_HIGH"),
        ({"nodeIds": [dear]}, dear, "MODEL_NOT_SERVED"),
    ]
    for policy, wanted, reason in cases:
        for _ in range(5):
            answer = await gateway.chat(model, lucid=policy)
            assert answer.headers["x-lucid-node"] == wanted, policy
        matched = await gateway.match(model, lucid=policy)
        assert matched["chosen"]["passportId"] == wanted
        reasons = {entry["passportId"]: [why["code"] for why in entry["reasons"]] for entry in matched["rejected"]}
        assert reasons[cheap if wanted == dear else dear] == [reason]
    nobody = await gateway.chat(model, lucid={"allowRegions": ["mars"], "maxPricePer1kTokens": 0})
    assert nobody.status_code == 503
    assert nobody.json()["error"]["details"]["rejections"]["REGION_NOT_ALLOWED"] >= 2
    assert not any(b"lucid" in request.body for request in recorder.requests)


async def test_a_stale_node_serves_only_when_no_fresh_one_can(gateway: Gateway, recorder: FaultNode) -> None:
    """And never who says routeStale false; a node silent for longer than 120 s serves nobody."""
    model = await gateway.add_model()
    stale = await gateway.add_node(recorder.url, model)
    fresh = await gateway.add_node(recorder.url, model, beat={"load": 1})
    await gateway.served.fall_silent(stale, 60)
    await gateway.comes_to(model, lambda matched: [node["fresh"] for node in matched["shortlist"]] == [True, False])
    assert {(await gateway.chat(model)).headers["x-lucid-node"] for _ in range(5)} == {fresh}
    await gateway.beat(fresh, model, status="draining")
    assert (await gateway.chat(model)).headers["x-lucid-node"] == stale
    refused = await gateway.chat(model, lucid={"routeStale": False})
    assert refused.json()["error"]["details"]["rejections"]["HEARTBEAT_STALE"] >= 1
    await gateway.served.fall_silent(stale, 200)
    await gateway.comes_to(model, lambda matched: not matched["shortlist"])
    assert (await gateway.chat(model)).status_code == 503


@pytest.mark.parametrize("way", ["user", "prompt_cache_key", "header"])
async def test_a_session_stays_on_one_node(gateway: Gateway, recorder: FaultNode, way: str) -> None:
    """Until that node can't; then on another."""
    recorder.behaviour = Behaviour(answer=chat_answer(), delay_seconds=STEADY_SECONDS)
    model = await gateway.add_model()
    nodes = {await gateway.add_node(recorder.url, model) for _ in range(3)}

    async def place_of(session: str) -> str:
        headers = {"X-Lucid-Session": session} if way == "header" else {}
        body = {"model": model, "messages": [], **({} if headers else {way: session})}
        answer = await gateway.raw.post("/v1/chat/completions", json=body, headers=headers)
        return str(answer.headers["x-lucid-node"])

    places = {session: {await place_of(session) for _ in range(5)} for session in ("one", "two", "three")}
    assert all(len(seen) == 1 for seen in places.values()), places
    (first,) = places["one"]
    await gateway.beat(first, model, status="draining")
    (second,) = {await place_of("one") for _ in range(3)}
    assert second in nodes - {first}


async def test_sessions_spread_over_nodes_and_match_knows_where(gateway: Gateway, recorder: FaultNode) -> None:
    """/match answers for a user what a request of that user then meets."""
    model = await gateway.add_model()
    for _ in range(6):
        await gateway.add_node(recorder.url, model)
    places = {user: (await gateway.match(model, user=user))["chosen"]["passportId"] for user in map(str, range(40))}
    assert len(set(places.values())) > 1
    assert (await gateway.chat(model, user="7")).headers["x-lucid-node"] == places["7"]
