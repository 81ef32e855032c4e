"""Traces across gateway and node: a real OTLP exporter, a collector on a real socket, and nodes that fail."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from pydantic import ValidationError

from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, open_api
from tests.fault_answers import chat_stream, respond
from tests.fault_node import Behaviour, Ending, FaultNode, Request

USAGE = b'{"choices":[{"message":{"content":"hello"}}],"usage":{"prompt_tokens":3,"completion_tokens":5}}'
SENDER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def serve_a_model(api: Api, *urls: str) -> None:
    """Make a model that nodes at `urls` serve; the first is asked first, for the others say that they are busy."""
    await api.add_model("m", "gguf")
    for url in urls:
        load = 0.0 if url == urls[0] else 1.0
        node_id = await api.register(f"node at {url}", {"inferenceUrl": url, "runtimes": ["llama.cpp"]})
        await api.beat(node_id, availableModels=["m"], load=load)


async def ask(api: Api, *, stream: bool = False, model: str = "m", **headers: str) -> Any:
    """Send one chat completion; return the response."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": stream}
    return await api.http.post("/v1/chat/completions", json=body, headers=headers)


def spans_of(requests: list[Request]) -> list[Span]:
    """Every span that a collector got, in the order of their beginnings."""
    sent = [ExportTraceServiceRequest.FromString(request.body) for request in requests]
    scopes = [scope for each in sent for resource in each.resource_spans for scope in resource.scope_spans]
    return sorted((span for scope in scopes for span in scope.spans), key=lambda span: span.start_time_unix_nano)


def facts_of(span: Span) -> dict[str, Any]:
    """The attributes of a span, as plain values."""
    return {fact.key: getattr(fact.value, fact.value.WhichOneof("value") or "") for fact in span.attributes}


def traced(collector: FaultNode, share: float = 1.0) -> Settings:
    """Settings that send traces to a collector."""
    return Settings(bootstrap_admin_key=ADMIN_KEY, otlp_endpoint=collector.url, trace_share=share)


async def test_a_request_is_one_trace_from_its_sender_to_its_node(database_url: str) -> None:
    """Request, choice and attempt; the node is told to join in, and the client's own trace goes on."""
    async with FaultNode() as collector, FaultNode(Behaviour(answer=respond(USAGE))) as node:
        async with open_api(database_url, traced(collector)) as api:
            await serve_a_model(api, node.url)
            assert (await ask(api, traceparent=SENDER)).status_code == 200
        request, choice, attempt = spans_of(collector.requests)
        assert [span.name for span in (request, choice, attempt)] == ["POST /v1/chat/completions", "choose", "attempt"]
        assert {span.trace_id.hex() for span in (request, choice, attempt)} == {SENDER.split("-")[1]}
        assert request.parent_span_id.hex() == SENDER.split("-")[2]
        assert choice.parent_span_id == attempt.parent_span_id == request.span_id
        joined = f"00-{attempt.trace_id.hex()}-{attempt.span_id.hex()}-01"
        assert node.requests[-1].headers["traceparent"] == joined
        facts = facts_of(attempt)
        assert (facts["gen_ai.request.model"], facts["lucid.outcome"]) == ("m", "completed")
        assert (facts["gen_ai.usage.input_tokens"], facts["gen_ai.usage.output_tokens"]) == (3, 5)
        assert facts_of(choice)["lucid.node.id"] == facts["lucid.node.id"]
        assert collector.requests[0].path == "/v1/traces"


async def test_a_node_that_fails_is_an_attempt_of_its_own(database_url: str) -> None:
    """Its span says why; the request's own is well when the next node served it."""
    async with FaultNode() as collector, FaultNode(Behaviour(answer=respond(status=500))) as bad, FaultNode() as good:
        good.behaviour = Behaviour(answer=chat_stream("hello"))
        async with open_api(database_url, traced(collector)) as api:
            await serve_a_model(api, bad.url, good.url)
            assert (await ask(api, stream=True)).status_code == 200
            assert (await ask(api, model="unknown")).status_code == 404
        spans = spans_of(collector.requests)
        failed = [span for span in spans if span.status.code == Status.STATUS_CODE_ERROR]
        assert [(span.name, facts_of(span)["error.type"]) for span in failed] == [("attempt", "http_500")]
        refused = facts_of(spans[-1])  # a client's own error is none of a server's span, by the conventions
        assert (refused["lucid.outcome"], refused["http.response.status_code"]) == ("MODEL_NOT_FOUND", 404)
        assert "error.type" not in refused
        siblings = [span for span in spans if span.parent_span_id == failed[0].parent_span_id]
        assert [span.name for span in siblings] == ["choose", "attempt", "choose", "attempt"]


async def test_spans_have_the_names_of_the_semantic_conventions(database_url: str) -> None:
    """A backend can filter by route, status, operation and model; of a route's name both models are told."""
    async with FaultNode() as collector, FaultNode(Behaviour(answer=respond(status=500))) as bad, FaultNode() as good:
        good.behaviour = Behaviour(answer=respond(USAGE))
        async with open_api(database_url, traced(collector)) as api:
            await serve_a_model(api, bad.url, good.url)
            await api.add_model("chat", "gguf", route={"weights": {"m": 1}})
            assert (await ask(api, model="chat")).status_code == 200
            good.behaviour = bad.behaviour
            assert (await ask(api, model="chat")).status_code == 502
        request, _, _, _, attempt, failed, *_ = spans_of(collector.requests)
        assert (request.kind, attempt.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
        generated = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "lucid_compute",
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 5,
        }
        assert facts_of(request) == {
            **generated,
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "url.path": "/v1/chat/completions",
            "url.scheme": "http",
            "http.response.status_code": 200,
            "gen_ai.request.model": "chat",
            "gen_ai.response.model": "m",
            "lucid.outcome": "served",
        }
        port = int(good.url.split(":")[2].split("/")[0])
        sent = {
            **generated,
            "http.request.method": "POST",
            "http.request.resend_count": 1,
            "http.response.status_code": 200,
            "server.address": "127.0.0.1",
            "server.port": port,
            "url.full": f"http://127.0.0.1:{port}/v1/chat/completions",
            "gen_ai.request.model": "m",
            "lucid.attempt": 2,
        }
        assert sent.items() <= facts_of(attempt).items()
        facts = facts_of(failed)
        assert (failed.status.code, facts["http.response.status_code"]) == (Status.STATUS_CODE_ERROR, 502)
        assert (facts["error.type"], facts["lucid.outcome"]) == ("NODE_FAILED", "NODE_FAILED")


async def test_the_span_of_a_stream_lasts_until_its_end(database_url: str) -> None:
    """Not until its first event, of which it says when it came."""
    slow = Behaviour(answer=chat_stream("a", "b", "c"), drip_bytes=100, drip_body_seconds=0.1)
    async with FaultNode() as collector, FaultNode(slow) as node:
        async with open_api(database_url, traced(collector)) as api:
            await serve_a_model(api, node.url)
            assert (await ask(api, stream=True)).status_code == 200
        request, _, attempt = spans_of(collector.requests)
        for span in (request, attempt):
            assert span.end_time_unix_nano - span.start_time_unix_nano > 200_000_000
        assert request.end_time_unix_nano >= attempt.end_time_unix_nano
        assert facts_of(attempt)["lucid.first_byte_ms"] < 200


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(answer=respond(status=500)),
        Behaviour(answer=respond(status=429)),
        Behaviour(ending=Ending.RESET, cut_head_after=0),
    ],
)
async def test_a_collector_that_fails_loses_spans_and_nothing_else(database_url: str, behaviour: Behaviour) -> None:
    async with FaultNode(behaviour) as collector, FaultNode(Behaviour(answer=respond(USAGE))) as node:
        async with open_api(database_url, traced(collector)) as api:
            await serve_a_model(api, node.url)
            assert {(await ask(api)).status_code for _ in range(50)} == {200}
        assert collector.requests


async def test_without_a_collector_nothing_is_traced_and_no_node_is_told(api: Api) -> None:
    """Off unless it is asked for: a client's own header goes no further, as no header of a client's does."""
    async with FaultNode(Behaviour(answer=respond(USAGE))) as node:
        await serve_a_model(api, node.url)
        assert (await ask(api, traceparent=SENDER)).status_code == 200
        assert "traceparent" not in node.requests[-1].headers
    assert api.replica.gateway.context.tracer is None


async def test_a_share_is_traced_and_a_collector_that_is_away_holds_nobody_up(database_url: str) -> None:
    """None of the requests at a share of 0; and with a collector that never answers all is served, and ends."""
    async with FaultNode() as collector, FaultNode(Behaviour(answer=respond(USAGE))) as node:
        async with open_api(database_url, traced(collector, share=0)) as api:
            await serve_a_model(api, node.url)
            assert (await ask(api)).status_code == 200
        assert spans_of(collector.requests) == []
        collector.behaviour = Behaviour(delay_seconds=60)
        async with open_api(database_url, traced(collector)) as api:
            node_id = (await api.http.get("/compute")).json()["nodes"][0]["id"]
            await api.beat(node_id, availableModels=["m"])
            assert (await ask(api)).status_code == 200


def test_traces_without_the_packages_are_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)  # as if it were not installed
    with pytest.raises(ValidationError, match=r"Install lucid-compute\[tracing\]"):
        Settings(otlp_endpoint="http://127.0.0.1:4318")
