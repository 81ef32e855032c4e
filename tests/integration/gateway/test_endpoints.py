"""Each endpoint, at nodes that answer as the documentation of vLLM, SGLang, llama.cpp and Ollama says that they do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.parser import BytesParser
from typing import Any, NamedTuple

import httpx
import pytest

from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.usage import count_tokens
from tests.api import Api, error_code
from tests.express_client import Entrance
from tests.fault_answers import Answer, respond, respond_in_chunks
from tests.fault_node import Behaviour, FaultNode
from tests.lucid_serve import eventually


class Recorded(NamedTuple):
    """A node's answer to a request, and the tokens of its job; `path` is the one that the node is asked at."""

    endpoint: str
    path: str
    body: dict[str, Any]
    answer: Any
    tokens: tuple[int | None, int, bool]  # in and out, and whether they were counted here; None: of the body


SAY_HELLO = [{"role": "user", "content": "Say hello."}]
QUERY = {"query": "a node?", "documents": ["a GPU", "a bird"]}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "Hello there!"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 9, "output_tokens": 2},
}
RECORDED = {
    "a message of vLLM": Recorded("messages", "/v1/messages", {"messages": SAY_HELLO}, MESSAGE, (9, 2, False)),
    "a message of llama.cpp, whose cached input is told apart": Recorded(
        "messages",
        "/v1/messages",
        {"messages": SAY_HELLO},
        {**MESSAGE, "usage": {"cache_read_input_tokens": 8, "input_tokens": 1, "output_tokens": 2}},
        (9, 2, False),
    ),
    "a message without a usage": Recorded(
        "messages", "/v1/messages", {"messages": SAY_HELLO}, {**MESSAGE, "usage": None}, (None, 3, True)
    ),
    "a message with a usage that can't be": Recorded(
        "messages",
        "/v1/messages",
        {"messages": SAY_HELLO},
        {**MESSAGE, "usage": {"input_tokens": 9, "cache_read_input_tokens": 90_000, "output_tokens": 2}},
        (None, 3, True),
    ),
    "a count of tokens": Recorded(
        "messages/count_tokens",
        "/v1/messages/count_tokens",
        {"messages": SAY_HELLO},
        {"input_tokens": 11},
        (0, 0, False),
    ),
    "ranks of vLLM": Recorded(
        "rerank",
        "/v1/rerank",
        QUERY,
        {
            "id": "rerank-1",
            "model": "m",
            "usage": {"total_tokens": 12},
            "results": [{"index": 0, "document": {"text": "a GPU"}, "relevance_score": 0.9}],
        },
        (None, 0, True),
    ),
    "ranks of llama.cpp": Recorded(
        "rerank",
        "/v1/rerank",
        QUERY,
        {"object": "list", "usage": {"prompt_tokens": 12}, "results": [{"index": 0, "relevance_score": 0.9}]},
        (12, 0, False),
    ),
    "ranks of SGLang, a list": Recorded(
        "rerank",
        "/v1/rerank",
        QUERY,
        [{"score": 0.9, "document": "a GPU", "index": 0, "meta_info": {}}],
        (None, 0, True),
    ),
    "ranks as Cohere's second version has them": Recorded(
        "/v2/rerank",
        "/v2/rerank",
        QUERY,
        {"results": [{"index": 1, "relevance_score": 0.1}], "usage": {"prompt_tokens": 12, "total_tokens": 12}},
        (12, 0, False),
    ),
    "scores of vLLM": Recorded(
        "score",
        "/v1/score",
        {"text_1": "a node?", "text_2": "a GPU"},
        {
            "object": "list",
            "data": [{"index": 0, "object": "score", "score": 0.9}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 0},
        },
        (7, 0, False),
    ),
    "scores of SGLang": Recorded(
        "score",
        "/v1/score",
        {"query": "a node?", "items": ["a GPU"], "label_token_ids": [1, 2]},
        {"scores": [[0.9, 0.1]], "model": "m", "usage": {"prompt_tokens": 7}, "object": "scoring"},
        (7, 0, False),
    ),
    "tokens of vLLM": Recorded(
        "/tokenize", "/tokenize", {"prompt": "hi"}, {"count": 1, "max_model_len": 8, "tokens": [5]}, (0, 0, False)
    ),
    "text of vLLM": Recorded("/detokenize", "/detokenize", {"tokens": [5]}, {"prompt": "hi"}, (0, 0, False)),
    "text of llama.cpp": Recorded("/detokenize", "/detokenize", {"tokens": [5]}, {"content": "hi"}, (0, 0, False)),
    "text of SGLang": Recorded("/detokenize", "/detokenize", {"tokens": [5]}, {"text": "hi"}, (0, 0, False)),
}
WRONG: dict[str, Any] = {
    "messages": {"type": "message", "content": "Hello"},
    "messages/count_tokens": {"tokens": 3},
    "rerank": {"results": [{"relevance_score": 1}]},
    "/v2/rerank": ["a list of nothing"],
    "score": {"object": "list"},
    "/tokenize": {"count": 3},
    "/detokenize": {},
}


@asynccontextmanager
async def a_node(api: Api, *answers: Answer, **metadata: Any) -> AsyncIterator[list[FaultNode]]:
    """Run a node for each answer, the first of which is asked first, and which has a price."""
    await api.add_model("m", "gguf", **metadata)
    nodes: list[FaultNode] = []
    try:
        for number, answer in enumerate(answers):
            node = FaultNode(Behaviour(answer=answer))
            await node.start()
            nodes.append(node)
            known = {"runtimes": ["llama.cpp"], "pricePer1kTokens": "1", "inferenceUrl": f"{node.url}/v1"}
            node_id = await api.register(f"node-{number}", known)
            assert (await api.beat(node_id, load=number / 2, availableModels=["m"])).status_code == 200
        yield nodes
    finally:
        for node in nodes:
            await node.stop()


async def jobs_of(api: Api, count: int = 1) -> list[dict[str, Any]]:
    """Return the jobs once so many have ended, in the order of their attempts."""
    jobs: list[dict[str, Any]] = []

    async def have_ended() -> bool:
        listed = (await api.http.get("/compute/jobs", params={"perPage": 100})).json()["jobs"]
        jobs[:] = [job for job in listed if job["outcome"] != "running"]
        return len(jobs) >= count

    await eventually(have_ended)
    return sorted(jobs, key=lambda job: job["attempt"])


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
async def test_an_answer_is_passed_on_and_billed_by_the_endpoints_row(
    api: Api, entrance: Entrance, recorded: Recorded
) -> None:
    """The node is asked below its base URL, or at its top; the bytes go on as they are."""
    body = json.dumps(recorded.answer).encode()
    async with a_node(api, respond(body)) as (node,):
        endpoint = ENDPOINTS[recorded.endpoint]
        answer = await entrance(api).http.post(endpoint.path, json={"model": "m", **recorded.body})
        assert (answer.status_code, answer.content) == (200, body)
        assert [request.path for request in node.requests] == [recorded.path]
        (job,) = await jobs_of(api)
        assert (job["endpoint"], job["outcome"]) == (recorded.endpoint, "completed")
        tokens_in, *others = recorded.tokens
        tokens_in = count_tokens(node.requests[0].body) if tokens_in is None else tokens_in
        assert [job["tokensIn"], job["tokensOut"], job["tokensCounted"]] == [tokens_in, *others]
        assert float(job["priceUsd"] or 0) == pytest.approx((job["tokensIn"] + job["tokensOut"]) / 1000)


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_no_answer_of_the_endpoint_is_replaced_by_another_node(api: Api, name: str) -> None:
    """Before the client has a byte of it, and the endpoint is what the second node is asked for."""
    right = next(each for each in RECORDED.values() if each.endpoint == name)
    answers = (respond(json.dumps(each).encode()) for each in (WRONG[name], right.answer))
    async with a_node(api, *answers) as (wrong, _):
        answer = await api.http.post(ENDPOINTS[name].path, json={"model": "m", **right.body})
        assert (answer.status_code, answer.json(), len(wrong.requests)) == (200, right.answer, 1)
        assert answer.headers["x-lucid-attempts"] == "2"
        first, second = await jobs_of(api, 2)
        assert (first["reason"], first["priceUsd"], second["outcome"]) == ("bad_response", None, "completed")


async def test_what_a_node_lacks_is_learnt_for_the_endpoint_alone(api: Api) -> None:
    """A node of Ollama ranks nothing and still gets messages; the refusal names the path as clients call it."""
    not_found = respond(b"404 page not found", status=404, content_type="text/plain")
    async with a_node(api, not_found) as (node,):
        for path in ("/v2/rerank", "/v1/rerank"):
            refused = await api.http.post(path, json={"model": "m", **QUERY})
            assert refused.status_code == 503
            assert f"not offered at {path} by 1 of them" in refused.json()["error"]["message"]
        node.behaviour = Behaviour(answer=respond(json.dumps(MESSAGE).encode()))
        assert (await api.http.post("/v1/messages", json={"model": "m", "messages": SAY_HELLO})).status_code == 200
        assert (await api.http.post("/v1/rerank", json={"model": "m", **QUERY})).status_code == 503
        assert [request.path for request in node.requests] == ["/v2/rerank", "/v1/rerank", "/v1/messages"]


def event(kind: str, **fields: Any) -> bytes:
    """Return an event of a message's stream."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, separators=(',', ':'))}\n\n".encode()


START = event("message_start", message={**MESSAGE, "content": [], "usage": {"input_tokens": 9, "output_tokens": 1}})
OPEN = event("content_block_start", index=0, content_block={"type": "text", "text": ""}) + event("ping")
HELLO = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hello"})
THERE = event("content_block_delta", index=0, delta={"type": "text_delta", "text": " message_stop [DONE]"})
CLOSE = event("content_block_stop", index=0)
DELTA = event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 7})
STOP = event("message_stop")
STREAM = (START, OPEN, HELLO, THERE, CLOSE, DELTA, STOP)
OVERLOADED = event("error", error={"type": "overloaded_error", "message": "Overloaded"})


async def ask_for_stream(api: Api) -> bytes:
    """Return a message's stream as the client got it."""
    body = {"model": "m", "max_tokens": 64, "messages": SAY_HELLO, "stream": True}
    answer = await api.http.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    return answer.content


async def test_a_messages_stream_ends_with_message_stop(api: Api, entrance: Entrance) -> None:
    """Its input is told first and its output last; what vLLM sends after its end is left out."""
    done = b"data: [DONE]\n\n"
    async with a_node(api, respond_in_chunks(*STREAM, done)) as (node,):
        assert (await ask_for_stream(entrance(api))).removesuffix(done) == b"".join(STREAM)
        assert b"stream_options" not in node.requests[0].body
        (job,) = await jobs_of(api)
        assert (job["tokensIn"], job["tokensOut"], job["tokensCounted"]) == (9, 7, False)


async def test_a_messages_stream_that_fails_before_its_content_is_replaced(api: Api) -> None:
    """Who only announced a message has begun none."""
    async with a_node(api, respond_in_chunks(START, OPEN, OVERLOADED), respond_in_chunks(*STREAM)):
        assert await ask_for_stream(api) == b"".join(STREAM)
        assert [job["outcome"] for job in await jobs_of(api, 2)] == ["failed", "completed"]


@pytest.mark.parametrize("last", [OVERLOADED, DELTA, b"data: [DONE]\n\n", b""], ids=["error", "delta", "done", "none"])
async def test_a_messages_stream_that_breaks_ends_with_anthropics_error(api: Api, last: bytes) -> None:
    """Nothing but message_stop is its end; what was delivered is billed."""
    async with a_node(api, respond_in_chunks(START, OPEN, HELLO, THERE, last)):
        stream = await ask_for_stream(api)
        assert stream.startswith(START + OPEN + HELLO + THERE)
        assert STOP not in stream
        told = json.loads(stream.rsplit(b"event: error\ndata: ", 1)[1])
        assert (told["type"], told["error"]["type"], told["error"]["code"]) == ("error", "api_error", "NODE_FAILED")
        (job,) = await jobs_of(api)
        counted = (9, 7, False) if last == DELTA else (9, 2, True)
        assert (job["outcome"], job["tokensIn"], job["tokensOut"], job["tokensCounted"]) == ("failed", *counted)


async def test_refusals_below_messages_have_anthropics_shape(api: Api, entrance: Entrance) -> None:
    """Of the lane, of FastAPI and of the guard; the other endpoints keep OpenAI's shape."""
    http = entrance(api).http
    refused = [
        await http.post("/v1/messages", json={"model": "unknown", "messages": []}),
        await http.post("/v1/messages", content=b"{"),
        await http.post("/v1/messages", json={}, headers={"authorization": "Bearer lk_live_no"}),
        await http.get("/v1/messages/batches"),
        await http.get("/v1/messages"),
    ]
    kinds = ["not_found_error", "invalid_request_error", "authentication_error", "not_found_error"]
    assert [each.json()["error"]["type"] for each in refused] == [*kinds, "invalid_request_error"]
    assert {each.json()["type"] for each in refused} == {"error"}
    assert [each.json()["error"]["status"] for each in refused] == [each.status_code for each in refused]
    for path in ("/v1/rerank", "/tokenize"):
        error = (await http.post(path, json={"model": "unknown"})).json()["error"]
        assert (error["code"], error["type"], error["param"]) == ("MODEL_NOT_FOUND", "not_found_error", None)


async def test_an_upstream_of_anthropic_gets_its_key_and_version(api: Api) -> None:
    """It reads the key in x-api-key, and wants a version; other endpoints don't send these."""
    async with FaultNode(Behaviour(answer=respond(json.dumps(MESSAGE).encode()))) as node:
        await api.add_model("claude", "api", upstream={"url": f"{node.url}/v1", "model": "c", "apiKey": "sk-their-own"})
        body = {"model": "claude", "max_tokens": 9, "messages": SAY_HELLO}
        assert (await api.http.post("/v1/messages", json=body)).status_code == 200
        await api.http.post("/v1/chat/completions", json=body)
        first, second = (request.headers for request in node.requests)
        assert (first["x-api-key"], first["anthropic-version"]) == ("sk-their-own", "2023-06-01")
        assert "x-api-key" not in second


async def test_speech_is_passed_on_as_bytes_with_its_own_type(api: Api, entrance: Entrance) -> None:
    """It has no usage: the text is counted. JSON in its place is no answer, whatever its type says."""
    sound = bytes(range(256)) * 400
    answers = [
        respond(b'{"choices":[]}'),
        respond(b' {"error":"Unexpected endpoint or method."}', content_type="audio/mpeg"),
        respond(sound, content_type="audio/mpeg"),
    ]
    async with a_node(api, *answers) as (_, __, node):
        body = {"model": "m", "input": "Say hello.", "voice": "af", "stream": True}
        answer = await entrance(api).http.post("/v1/audio/speech", json=body)
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, sound, "audio/mpeg")
        assert [request.path for request in node.requests] == ["/v1/audio/speech"]
        *failed, job = await jobs_of(api, 3)
        assert [each["reason"] for each in failed] == ["bad_response", "bad_response"]
        assert (job["tokensIn"], job["tokensOut"]) == (count_tokens(node.requests[0].body), 0)


@pytest.mark.parametrize(
    ("usage", "tokens"), [({"input_tokens": 5, "output_tokens": 900}, (5, 900)), (None, (None, 0))], ids=["said", "not"]
)
async def test_the_tokens_of_an_image_are_those_that_the_node_tells(api: Api, usage: Any, tokens: Any) -> None:
    """Its bytes are no text, so without a usage the request's text alone is counted."""
    image = {"created": 1, "data": [{"b64_json": "iVBORw0KGgo" * 40_000}], "usage": usage}
    async with a_node(api, respond(json.dumps(image).encode())) as (node,):
        answer = await api.http.post("/v1/images/generations", json={"model": "m", "prompt": "a node", "n": 1})
        assert answer.json() == image
        (job,) = await jobs_of(api)
        tokens_in = tokens[0] or count_tokens(node.requests[0].body)
        assert (job["tokensIn"], job["tokensOut"]) == (tokens_in, tokens[1])


SPEECH = b"RIFF\r\n--\r\n" + bytes(range(256)) * 8000  # two megabytes
TEXT = {"text": "Hello there, this is a node."}
TRANSCRIPTIONS = "/v1/audio/transcriptions"


async def transcribe(api: Api, path: str = TRANSCRIPTIONS, **fields: str) -> httpx.Response:
    """Send a recording."""
    files = {"file": ('a "quoted" name.wav', SPEECH, "audio/wav")}
    return await api.http.post(path, data={"model": "m/alias", **fields}, files=files)


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, "/v1/audio/translations"])
async def test_a_recording_goes_on_with_the_nodes_own_name_of_the_model(
    api: Api, entrance: Entrance, path: str
) -> None:
    """Every other byte stays, `lucid` is taken out, and the second node gets the same as the first."""
    answers = respond(b'{"segments":[]}'), respond(json.dumps(TEXT).encode())
    async with a_node(api, *answers, aliases=["m/alias"]) as nodes:
        answer = await transcribe(
            entrance(api), path, lucid='{"routeStale": false}', prompt="A node says", language="en"
        )
        assert (answer.status_code, answer.json()) == (200, TEXT), answer.text
        for node in nodes:
            (request,) = node.requests
            assert request.path == path
            form = BytesParser().parsebytes(
                b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n" + request.body
            )
            parts = {part.get_param("name", header="content-disposition"): part for part in form.walk()}
            assert {
                name: part.get_payload(decode=True) for name, part in parts.items() if name not in {None, "file"}
            } == {
                "model": b"m",
                "prompt": b"A node says",
                "language": b"en",
            }
            assert request.body.count(SPEECH) == 1
        job = (await jobs_of(api, 2))[1]
        assert (job["tokensIn"], job["tokensOut"]) == (3, count_tokens(TEXT["text"].encode()))


async def test_a_page_in_place_of_speech_is_no_answer(api: Api, entrance: Entrance) -> None:
    """Nothing that a browser could run is passed on."""
    async with a_node(api, respond(b"<script>", content_type="text/html")):
        body = {"model": "m", "input": "Say hello.", "voice": "af"}
        assert error_code(await entrance(api).http.post("/v1/audio/speech", json=body)) == "NODE_FAILED"


@pytest.mark.parametrize(("tokens_in", "is_believed"), [(len(SPEECH) // 20, True), (len(SPEECH), False)])
async def test_a_recording_has_fewer_tokens_than_bytes(api: Api, tokens_in: int, is_believed: bool) -> None:
    """A node can't bill a token for each byte of sound; what it says beyond that is counted here instead."""
    answer = TEXT | {"usage": {"input_tokens": tokens_in, "output_tokens": 7}}
    async with a_node(api, respond(json.dumps(answer).encode()), aliases=["m/alias"]):
        assert (await transcribe(api)).status_code == 200
        (job,) = await jobs_of(api)
        assert job["tokensCounted"] is not is_believed
        assert job["tokensIn"] == (tokens_in if is_believed else 0)


async def test_a_transcript_may_be_text_or_a_stream(api: Api) -> None:
    """Subtitles have their own type. vLLM streams the chunks of a chat, OpenAI events of its own."""
    subtitles = b"1\n00:00:00,000 --> 00:00:01,000\nHello there\n"
    as_text = respond(subtitles, content_type="text/plain; charset=utf-8")
    async with a_node(api, as_text, aliases=["m/alias"]) as (node,):
        answer = await transcribe(api, response_format="srt")
        assert (answer.content, answer.headers["content-type"]) == (subtitles, "text/plain; charset=utf-8")
        chunk = b'data: {"id":"t","choices":[{"index":0,"delta":{"content":" Hello"},"finish_reason":null}]}\n\n'
        delta = b'event: transcript.text.delta\ndata: {"type":"transcript.text.delta","delta":"Hello"}\n\n'
        last = b'data: {"type":"transcript.text.done","text":"Hello"}\n\n'
        for stream in ((chunk, b"data: [DONE]\n\n"), (delta, last)):
            node.behaviour = Behaviour(answer=respond_in_chunks(*stream))
            answer = await transcribe(api, stream="true")
            assert answer.content == b"".join(stream)
        jobs = await jobs_of(api, 3)
        assert sorted(job["stream"] for job in jobs) == [False, True, True]
        assert {job["outcome"] for job in jobs} == {"completed"}


def form_of(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    """Return a form of parts with these headers and values."""
    return b"".join(b"--b\r\n%b\r\n\r\n%b\r\n" % (head.encode(), value) for head, value in parts) + end


def named(name: str) -> str:
    """Return the header of a part."""
    return f'Content-Disposition: form-data; name="{name}"'


MODEL_PART = (named("model"), b"m")
BROKEN_FORMS = {
    "nothing": (b"", 400),
    "no boundary": (b"model=m", 400),
    "no model": (form_of((named("file"), b"x")), 422),
    "an empty model": (form_of((named("model"), b"")), 422),
    "a model that is no text": (form_of((named("model"), b"\xff")), 422),
    "two models": (form_of(MODEL_PART, MODEL_PART), 422),
    "a long model": (form_of((named("model"), b"m" * 40_000)), 422),
    "two names of one part": (form_of(('Content-Disposition: form-data; name="a"; name="model"', b"m")), 400),
    "a name inside of a file's name": (
        form_of(('Content-Disposition: form-data; filename="a\\"; name="model"; x="', b"m")),
        400,
    ),
    "a part without headers": (b"--b\r\nmodel\r\n--b--\r\n", 400),
    "no end": (form_of(MODEL_PART, end=b""), 400),
    "half an end": (form_of(MODEL_PART, end=b"--b-"), 400),
    "text after a boundary": (form_of(MODEL_PART, end=b"--bad--\r\n"), 400),
    "too many parts": (form_of(*[MODEL_PART] * 101), 400),
    "headers without an end": (b"--b\r\n" + b"x" * 100_000, 400),
    "a policy that is none": (form_of(MODEL_PART, (named("lucid"), b'{"nodeIds": 7}')), 422),
    "near boundaries for two megabytes": (form_of(MODEL_PART, (named("file"), b"\r\n--" * 500_000), end=b""), 400),
}


@pytest.mark.parametrize("name", BROKEN_FORMS)
async def test_a_broken_form_is_refused_with_what_is_wrong(api: Api, entrance: Entrance, name: str) -> None:
    """And no node gets it."""
    body, status = BROKEN_FORMS[name]
    async with a_node(api, respond(json.dumps(TEXT).encode())) as (node,):
        headers = {"content-type": "multipart/form-data; boundary=b"}
        refused = await entrance(api).http.post(TRANSCRIPTIONS, content=body, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, "INVALID_REQUEST"), refused.text
        assert not node.requests


async def test_a_form_is_taken_where_a_form_belongs_and_json_where_json_does(api: Api, entrance: Entrance) -> None:
    """A size beyond the limit is refused as for every body."""
    http = entrance(api).http
    refused = await http.post(TRANSCRIPTIONS, json={"model": "m"})
    assert (refused.status_code, refused.json()["error"]["details"]) == (415, {"types": ["multipart/form-data"]})
    refused = await http.post("/v1/chat/completions", data={"model": "m"}, files={"file": b"x" * 100_000})
    assert (refused.status_code, refused.json()["error"]["details"]) == (415, {"types": ["application/json"]})
    headers = {"content-type": "multipart/form-data; boundary=b", "content-length": str(64 * 1024 * 1024)}
    assert (await http.post(TRANSCRIPTIONS, content=b"", headers=headers)).status_code in {400, 413}
