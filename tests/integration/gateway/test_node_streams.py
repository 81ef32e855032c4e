"""A node's stream: what begins an answer, what ends it, and what the client sees of a node that fails."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lucid_compute.gateway.breakers import RetryBudgets
from lucid_compute.gateway.event_stream import MAX_HELD_BYTES, EventStream
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, open_api
from tests.fault_answers import EVENTS, JSON, OK_BODY, OK_STREAM, respond, respond_in_chunks, respond_until_close
from tests.fault_node import Behaviour, Ending
from tests.integration.gateway.test_node_responses import Pair, a_pair, ask, jobs_of

DONE = b"data: [DONE]\n\n"
SECONDS = 1.0  # that a node may take for the first byte, and between two


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    """A replica with short deadlines and small limits."""
    settings = Settings(
        bootstrap_admin_key=ADMIN_KEY,
        first_byte_timeout_seconds=SECONDS,
        between_bytes_timeout_seconds=SECONDS,
        answer_max_mib=1,
        stream_max_mib=3,
        event_max_mib=1,
    )
    async with open_api(database_url, settings) as opened:
        yield opened


def event(**fields: Any) -> bytes:
    """Return an event of a chat."""
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **fields}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def piece(text: str | None = None, finish: str | None = None, **fields: Any) -> bytes:
    """Return an event with a piece of text, or with a reason to finish."""
    delta = {} if text is None else {"content": text}
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}], **fields)


ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
USED = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
STOP = piece(finish="stop")
USAGE = event(choices=[], usage=USED)
ERROR = b'data: {"error":{"message":"engine died","code":500}}\n\n'
LATE_ERROR = event(choices=[], error={"code": 502, "message": "limit reached"})
FILTERED = event(choices=[], prompt_filter_results=[{"prompt_index": 0, "content_filter_results": {}}])
COMMENT = b": PROCESSING\n\n"
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


async def ask_badly(pair: Pair, *blocks: bytes, path: str = "chat/completions", **behaviour: Any) -> Any:
    """Return the response to a stream that the bad node answers in these blocks."""
    gateway = pair.api.replica.gateway
    gateway.context.stats.nodes.clear()
    gateway.context.stats._kinds.clear()
    gateway._retries = RetryBudgets()
    answer = behaviour.pop("answer", None) or respond_in_chunks(*blocks)
    pair.bad.behaviour = Behaviour(answer=answer, **behaviour)
    return await ask(pair.api, path, stream=True)


def require_replaced(response: Any) -> None:
    """Require that the client sees nothing of the bad node."""
    assert (response.status_code, response.content) == (200, OK_STREAM), response.text
    assert response.headers["x-lucid-attempts"] == "2"


def require_broken(response: Any, begins: bytes, code: str = "NODE_FAILED") -> dict[str, Any]:
    """Require that the stream begins so and then ends with one error event; return the error."""
    assert response.content.startswith(begins)
    rest = response.content[len(begins) :].split(b"\n\n")
    assert (len(rest), rest[1]) == (2, b""), response.text
    error: dict[str, Any] = json.loads(rest[0].split(b"data: ")[1])["error"]
    assert error["code"] == code
    return error


BEFORE = {
    "nothing": b"",
    "comments": COMMENT * 3,
    "a ping": PING,
    "a role": ROLE,
    "filter results": FILTERED,
    "an id": b"id: 5\nretry: 3000\n\n",
    "a usage": event(usage=USED),
    "an empty piece": piece(""),
    "everything": COMMENT + PING + FILTERED + ROLE + piece("") + COMMENT,
}


async def test_what_is_no_content_begins_no_answer(api: Api) -> None:
    """An error behind it, an end, or a broken connection is replaced by another node's answer."""
    asked = 0
    async with a_pair(api) as pair:
        for name, before in BEFORE.items():
            for after in (ERROR, LATE_ERROR, LATE_ERROR + DONE, DONE, b"") if name == "everything" else (LATE_ERROR,):
                for blocks in ([before + after], [before, after]):
                    require_replaced(await ask_badly(pair, *filter(None, blocks)))
                    asked += 1
        require_replaced(await ask_badly(pair, answer=respond_until_close(ROLE), ending=Ending.RESET))
        jobs = await jobs_of(api, 2 * (asked + 1))
        assert {job["reason"] for job in jobs} == {"broken_stream", "connection_lost", None}


async def test_the_time_for_the_first_byte_runs_until_there_is_content(api: Api) -> None:
    """However often a node says that it is alive."""
    pings = Behaviour(answer=respond_in_chunks(*[COMMENT] * 200), drip_body_seconds=0.05, drip_bytes=len(COMMENT))
    async with a_pair(api) as pair:
        pair.bad.behaviour = pings
        require_replaced(await ask(api, stream=True))
        assert [job["reason"] for job in await jobs_of(api, 2)] == ["first_byte_timeout", None]


CONTENTS = {
    "chat/completions": [
        piece("a"),
        piece(" "),
        event(choices=[{"index": 0, "delta": {"reasoning_content": "hm"}}]),
        event(choices=[{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}}]),
        event(choices=[{"index": 1, "delta": {"role": "assistant", "refusal": "no"}}]),
        STOP,
    ],
    "completions": [event(choices=[{"index": 0, "text": "a"}]), event(choices=[{"text": "", "finish_reason": "stop"}])],
    "responses": [
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n',
        b'data: {"type":"response.completed","response":{}}\n\n',
    ],
}


@pytest.mark.parametrize("path", CONTENTS)
def test_the_first_content_is_passed_on_at_once_with_what_was_held_back(path: str) -> None:
    """Before the node says anything else, and nothing is lost."""
    held = {"responses": b'data: {"type":"response.created","response":{"error":null}}\n\n'}.get(path, ROLE)
    for content in CONTENTS[path]:
        stream = EventStream(path, withholds_usage=True)
        assert (stream.feed(COMMENT + held), stream.feed(held), stream.has_begun) == (b"", b"", False)
        assert (stream.feed(content), stream.has_begun) == (COMMENT + held + held + content, True)
        assert stream.feed(COMMENT) == COMMENT


def test_what_is_held_back_is_bounded() -> None:
    """Comments are dropped, and an announcement that repeats a long request begins the answer."""
    stream = EventStream("chat/completions", withholds_usage=True)
    for _ in range(1000):
        assert stream.feed(COMMENT * 100) == b""
        assert len(stream._held) <= MAX_HELD_BYTES
    assert stream.feed(piece("a")).endswith(piece("a"))
    created = b'data: {"type":"response.created","response":{"instructions":"' + b"x" * MAX_HELD_BYTES + b'"}}\n\n'
    assert EventStream("responses", withholds_usage=False).feed(created) == created


TEXT = ROLE + piece("all of it")
TEXT_STOP = TEXT + STOP
COMPLETION = event(choices=[{"index": 0, "text": "all", "finish_reason": None}])
COMPLETION_STOP = event(choices=[{"index": 0, "text": "", "finish_reason": "length"}])


async def test_a_stream_that_has_finished_is_complete_however_it_ends(api: Api) -> None:
    """Without [DONE], by a reset, by silence: the client gets the whole of it with its end, and it is billed."""
    async with a_pair(api) as pair:
        ends: list[dict[str, Any]] = [
            {"answer": respond_in_chunks(TEXT_STOP)},
            {"answer": respond_in_chunks(TEXT_STOP, USAGE)},
            {"answer": respond_until_close(TEXT_STOP), "ending": Ending.CLOSE},
            {"answer": respond_until_close(TEXT_STOP + USAGE), "ending": Ending.CLOSE},
            {"answer": respond_in_chunks(TEXT_STOP + USAGE[:-9], ends=False), "ending": Ending.CLOSE},
            {"answer": respond_in_chunks(TEXT_STOP, USAGE, ends=False), "surplus_after_seconds": math.inf},
        ]
        for behaviour in ends:
            response = await ask_badly(pair, **behaviour)
            assert response.content == TEXT_STOP + DONE
        with_usage = TEXT + piece(finish="stop", usage=USED)
        assert (await ask_badly(pair, with_usage)).content == with_usage + DONE
        completion = COMPLETION + COMPLETION_STOP
        assert (await ask_badly(pair, completion, USAGE, path="completions")).content == completion + DONE
        assert not pair.good.requests
        jobs = await jobs_of(api, len(ends) + 2)
        assert {(job["outcome"], job["reason"]) for job in jobs} == {("completed", None)}
        assert sum(not job["tokensCounted"] for job in jobs) == 5
        assert (await api.health(pair.bad_id))["errorRate"] == 0


async def test_a_stream_is_complete_when_every_choice_has_finished(api: Api) -> None:
    """Of three choices, the end of one says nothing of the others."""
    stops = [event(choices=[{"index": number, "delta": {}, "finish_reason": "stop"}]) for number in range(3)]
    async with a_pair(api, has_good=False) as pair:
        pair.bad.behaviour = Behaviour(answer=respond_in_chunks(TEXT, *stops))
        assert (await ask(api, stream=True, n=3)).content == TEXT + b"".join(stops) + DONE
        pair.bad.behaviour = Behaviour(answer=respond_in_chunks(TEXT, stops[0], stops[0], stops[2]))
        require_broken(await ask(api, stream=True, n=3), TEXT + stops[0] + stops[0] + stops[2])
        pair.bad.behaviour = Behaviour(answer=respond_in_chunks(TEXT, *stops[:2]))
        prompts = {"prompt": ["a", "b"], "stream": True}
        assert (await ask(api, "completions", **prompts)).content.endswith(DONE)


async def test_an_error_anywhere_in_an_event_ends_a_stream_and_is_not_completed(api: Api) -> None:
    """Behind the id, inside a choice, as a reason to finish: the client is told, and pays what was delivered."""
    errors = [
        LATE_ERROR,
        event(choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]),
        event(choices=[{"index": 0, "delta": {}, "error": {"code": 502}}]),
        event(choices=[{"index": 0, "delta": {"content": ""}}], error="limit reached"),
        b'data: {"id":1,\ndata: "error":{"code":500}}\n\n',
    ]
    async with a_pair(api) as pair:
        for error in errors:
            require_broken(await ask_badly(pair, TEXT, error, DONE), TEXT)
        for job in await jobs_of(api, len(errors)):
            assert (job["outcome"], job["reason"], job["tokensOut"]) == ("failed", "broken_stream", 1)
        harmless = piece('"error": {"code": 500}') + piece("error", error=None, metadata={"error": {"code": 1}})
        assert (await ask_badly(pair, TEXT, harmless, STOP, DONE)).content == TEXT + harmless + STOP + DONE


DELTA = b'data: {"type":"response.output_text.delta","delta":"Hello"}\n\n'
LARGE = "x" * 100_000


async def test_a_response_ends_with_the_events_own_type(api: Api) -> None:
    """Not with what it repeats of the request; in whatever order the fields of a large event stand."""
    echo = b'data: {"type":"response.in_progress","response":{"metadata":{"type":"response.completed"}}}\n\n'
    end = {"type": "response.completed", "response": {"output": LARGE, "usage": {"input_tokens": 3}}}
    named = b"event: response.completed\ndata: " + json.dumps({"response": end["response"]}).encode() + b"\n\n"
    last = b"data: " + json.dumps(dict(reversed(end.items()))).encode() + b"\n\n"
    async with a_pair(api, has_good=False) as pair:
        for each in (b"data: " + json.dumps(end).encode() + b"\n\n", named, last):
            response = await ask_badly(pair, echo, DELTA, each, path="responses")
            assert response.content == echo + DELTA + each
        require_broken(await ask_badly(pair, echo, DELTA, path="responses"), echo + DELTA)
        failed = b'data: {"type":"response.failed","response":{"error":{"code":"server_error"}}}\n\n'
        require_broken(await ask_badly(pair, DELTA, failed, path="responses"), DELTA)


async def test_a_stream_is_known_by_its_bytes(api: Api) -> None:
    """Whatever it is labelled, and however its first bytes are cut."""
    stream = TEXT + STOP + USAGE + DONE
    shown = TEXT + STOP + DONE
    async with a_pair(api, has_good=False) as pair:
        for content_type in ("application/json", "application/x-ndjson", "", "Text/Event-Stream"):
            for start in (b"", b"\xef\xbb\xbf", b"\n", COMMENT, b"event: message\n"):
                whole = start + stream
                for blocks in ([whole], [whole[:1], whole[1:3], whole[3:]]):
                    answer = respond_in_chunks(*blocks, content_type=content_type)
                    response = await ask_badly(pair, answer=answer)
                    assert response.content == start.removeprefix(b"\xef\xbb\xbf") + shown, (content_type, start)
                    assert response.headers["content-type"].startswith(EVENTS)


RESPONSE = b"".join(CONTENTS["responses"])


async def test_one_json_object_is_no_stream(api: Api) -> None:
    """Whatever its label: the next node is asked; without one the client gets an error, and pays nothing."""
    async with a_pair(api) as pair:
        pair.good.by_path["/v1/responses"] = Behaviour(answer=respond_in_chunks(RESPONSE))
        for path in ("chat/completions", "completions", "responses"):
            for content_type in (JSON, "text/plain", ""):
                response = await ask_badly(pair, answer=respond(OK_BODY, content_type=content_type), path=path)
                assert response.content == (RESPONSE if path == "responses" else OK_STREAM)
                assert response.headers["x-lucid-attempts"] == "2"
                assert response.headers["content-type"].startswith(EVENTS)
        jobs = await jobs_of(api, 18)
        assert {job["reason"] for job in jobs if job["attempt"] == 1} == {"bad_response"}
        pair.good.by_path["/v1/chat/completions"] = Behaviour(answer=respond(OK_BODY))
        response = await ask_badly(pair, answer=respond(OK_BODY))
        assert (response.status_code, response.json()["error"]["code"]) == (502, "NODE_FAILED")
        assert {job["priceUsd"] for job in await jobs_of(api, 20) if job["outcome"] != "completed"} == {None}


async def test_json_that_answers_a_stream_with_a_refusal_or_has_none_is_passed_on(api: Api) -> None:
    """A refusal is the client's own, and an endpoint without streams answers as it does."""
    refusal = b'{"error":{"message":"too long","code":400}}'
    async with a_pair(api, has_good=False) as pair:
        for status in (400, 413, 422):
            response = await ask_badly(pair, answer=respond(refusal, status=status))
            assert (response.status_code, response.content) == (status, refusal)
        assert (await ask_badly(pair, answer=respond(refusal))).content == refusal
        response = await ask_badly(pair, answer=respond(OK_BODY), path="embeddings")
        assert (response.status_code, response.content) == (200, OK_BODY)


async def test_lone_returns_end_lines_and_blocks_may_follow_the_end(api: Api) -> None:
    """As the rules of event streams say. [DONE] is the end, whatever comes behind it and in however many blocks."""
    async with a_pair(api, has_good=False) as pair:
        returns = (TEXT + STOP + USAGE + DONE).replace(b"\n", b"\r")
        for blocks in ([returns], [returns[:200], returns[200:]], [returns[at : at + 1] for at in range(len(returns))]):
            assert (await ask_badly(pair, *blocks)).content == TEXT + STOP + DONE
        for blocks in ([TEXT, DONE + COMMENT, COMMENT], [TEXT + DONE + COMMENT * 9]):
            assert (await ask_badly(pair, *blocks)).content.startswith(TEXT + DONE)


async def test_the_usage_that_we_ask_for_is_withheld_in_every_shape(api: Api) -> None:
    """Without choices, with null, with none, and with an empty one behind the end; not from a client that asked."""
    empty = [{"index": 0, "delta": {"content": ""}, "finish_reason": None}]
    shapes = [
        event(usage=USED),
        event(choices=None, usage=USED),
        event(choices=[], usage=USED),
        event(usage=USED, choices=[], timings={"prompt_n": 3}),
        event(choices=empty, usage=USED),
    ]
    async with a_pair(api, has_good=False) as pair:
        for usage in shapes:
            for blocks in ([TEXT, STOP, usage, DONE], [TEXT + STOP + usage + DONE]):
                assert (await ask_badly(pair, *blocks)).content == TEXT + STOP + DONE
            response = await ask(api, stream=True, stream_options={"include_usage": True})
            assert response.content == TEXT + STOP + usage + DONE
        every = piece("a", usage=USED) + piece("b", usage=USED)
        assert (await ask_badly(pair, ROLE, every, STOP, USAGE, DONE)).content == ROLE + every + STOP + DONE
        jobs = await jobs_of(api, 3 * len(shapes) + 1)
        assert {(job["tokensIn"], job["tokensOut"], job["tokensCounted"]) for job in jobs} == {(5, 2, False)}


async def test_a_node_that_refuses_our_question_is_asked_without_it_from_then_on(api: Api) -> None:
    """The client did not send the field, so it sees nothing of the refusal."""
    refusal = Behaviour(answer=respond(b'{"detail":[{"loc":["body","stream_options"],"msg":"extra"}]}', status=422))
    stream = Behaviour(answer=respond_in_chunks(TEXT + STOP + DONE))
    async with a_pair(api, has_good=False) as pair:
        pair.bad.script += [refusal, stream, stream]
        for _ in range(2):
            assert (await ask(api, stream=True)).content == TEXT + STOP + DONE
        bodies = [json.loads(request.body) for request in pair.bad.requests]
        assert ["stream_options" in body for body in bodies] == [True, False, False]
        asked = {"include_usage": False, "x": 1}
        pair.bad.script.append(stream)
        assert (await ask(api, stream=True, stream_options=asked)).status_code == 200
        assert json.loads(pair.bad.requests[-1].body)["stream_options"] == asked
        assert {job["outcome"] for job in await jobs_of(api, 3)} == {"completed"}


async def test_a_client_can_not_make_us_believe_that_a_node_refuses_our_question(api: Api) -> None:
    """A refusal that names the field, and comes again without it, is about the client's request."""
    refusal = Behaviour(answer=respond(b'{"error":"no tool named stream_options"}', status=400))
    async with a_pair(api, has_good=False) as pair:
        pair.bad.script += [refusal, refusal]
        assert (await ask(api, stream=True)).status_code == 400
        pair.bad.script.append(Behaviour(answer=respond_in_chunks(TEXT + STOP + DONE)))
        assert (await ask(api, stream=True)).status_code == 200
        bodies = [json.loads(request.body) for request in pair.bad.requests]
        assert ["stream_options" in body for body in bodies] == [True, False, True]


async def test_a_limit_of_ours_blames_no_node_and_is_not_tried_again(api: Api) -> None:
    """A whole answer, an event and a stream: the client is told which settings there are."""
    async with a_pair(api) as pair:
        whole = await ask_badly(
            pair, answer=respond(b'{"choices":[{"message":{"content":"' + b"x" * 1_100_000 + b'"}}]}')
        )
        assert whole.status_code == 502
        assert "LUCID_ANSWER_MAX_MIB" in whole.json()["error"]["message"]
        large = piece("x" * 1_100_000)
        assert (await ask_badly(pair, large)).status_code == 502
        require_broken(await ask_badly(pair, TEXT, large), TEXT)
        endless = await ask_badly(pair, *[piece("y" * 400_000)] * 9)
        assert b"LUCID_STREAM_MAX_MIB" in endless.content
        fits = piece("z" * 900_000)
        assert (await ask_badly(pair, TEXT, fits, DONE)).content == TEXT + fits + DONE
        assert not pair.good.requests
        jobs = await jobs_of(api, 5)
        endings = sorted((job["outcome"], job["reason"] or "") for job in jobs)
        assert endings == [("completed", ""), *[("rejected", "response_too_large")] * 4]
        assert (await api.health(pair.bad_id))["errorRate"] == 0


async def test_a_node_that_falls_silent_after_text_is_told_as_that(api: Api) -> None:
    """Something was delivered, and the message says so."""
    async with a_pair(api) as pair:
        behaviour = Behaviour(answer=respond_in_chunks(TEXT, ends=False), surplus_after_seconds=math.inf)
        pair.bad.behaviour = behaviour
        error = require_broken(await ask(api, stream=True), TEXT, "NODE_TIMEOUT")
        assert "Nothing was delivered" not in error["message"]
        assert "began its answer" in error["message"]
