"""Both clients of the SDK against a server that misbehaves, on a real socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from lucid_compute.client import AsyncLucid, errors
from lucid_compute.client.transport import MAX_ANSWER_BYTES
from tests.fault_answers import BROKEN, Answer, endless_body, endless_header, endless_headers, redirect, respond
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.sdk import KINDS, Kind, speaker

ALIVE = respond(b'{"status":"ok"}')
KEY = "lk_live_not-to-be-seen"


def refusal(status: int, code: str, *headers: str, **details: Any) -> Answer:
    """A refusal in the contract's shape."""
    error = {"code": code, "message": "Do this instead.", "status": status, "details": details}
    return respond(json.dumps({"error": error}).encode(), "X-Request-Id: r-1", *headers, status=status)


def alive(lucid: Any) -> Any:
    """A call that may be repeated."""
    return lucid.healthz()


def get_model(name: str, lucid: Any) -> Any:
    """A call with a name in its path."""
    return lucid.models.get(name)


def new_key(lucid: Any) -> Any:
    """A call that may not."""
    return lucid.keys.create(name="k", owner="o", scopes=["compute"])


async def fault_of(kind: Kind, url: str, question: Callable[[Any], Any] = alive, **options: Any) -> Any:
    """What the question ends in; its text never holds the key."""
    async with speaker(kind, url, KEY, **options) as client:
        with pytest.raises(errors.LucidClientError) as raised:
            await client.ask(question)
    told = [str(raised.value), repr(raised.value), repr(raised.value.__dict__), repr(client.lucid)]
    assert not [text for text in told if KEY in text]
    return raised.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_service_that_is_away_for_a_moment_is_asked_again(kind: Kind, status: int) -> None:
    """A refusal for now is repeated, under the same request id, over the same connection."""
    async with FaultNode(Behaviour(answer=ALIVE)) as node, speaker(kind, node.url, retries=2) as client:
        node.script = [Behaviour(answer=refusal(status, "OVERLOADED"))] * 2
        assert (await client.ask(alive)).status == "ok"
        assert len(node.requests) == 3
        assert len({request.headers["x-request-id"] for request in node.requests}) == 1
        assert node.connections == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_what_the_service_asks_to_wait_is_waited(kind: Kind) -> None:
    """A `Retry-After` of a second is a pause of at least one."""
    async with FaultNode(Behaviour(answer=ALIVE)) as node, speaker(kind, node.url, retries=1) as client:
        node.script = [Behaviour(answer=refusal(429, "RATE_LIMITED", "Retry-After: 1"))]
        began = time.monotonic()
        await client.ask(alive)
        assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_wait_longer_than_the_call_ends_the_call_at_once(kind: Kind) -> None:
    """Nobody sleeps for an hour inside a call of seconds; who calls learns how long to stay away."""
    async with FaultNode(Behaviour(answer=refusal(503, "OVERLOADED", "Retry-After: 3600"))) as node:
        began = time.monotonic()
        error = await fault_of(kind, node.url, retries=5)
        assert time.monotonic() - began < 3
        assert isinstance(error, errors.Unavailable)
        assert error.retry_after_seconds == 3600
        assert len(node.requests) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_not_safe_to_repeat_is_sent_once(kind: Kind) -> None:
    """A key whose making was begun and whose answer was lost is not made a second time."""
    for behaviour in (
        Behaviour(cut_head_after=0, ending=Ending.RESET),
        Behaviour(cut_body_after=3, ending=Ending.CLOSE),
        Behaviour(answer=refusal(503, "DATABASE_UNAVAILABLE", "Retry-After: 0")),
        Behaviour(answer=respond(b"<html>", status=502, content_type="text/html")),
    ):
        async with FaultNode(behaviour) as node:
            assert (await fault_of(kind, node.url, new_key, retries=3)).is_transient
            assert len(node.requests) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_certainly_not_begun_is_sent_again(kind: Kind) -> None:
    """Refused for its rate, or for load, nothing was made: the next attempt is safe for every call."""
    for code, status in (("RATE_LIMITED", 429), ("OVERLOADED", 503)):
        async with FaultNode(Behaviour(answer=refusal(403, "FORBIDDEN"))) as node:
            node.script = [Behaviour(answer=refusal(status, code))]
            assert isinstance(await fault_of(kind, node.url, new_key, retries=1), errors.Forbidden)
            assert len(node.requests) == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_a_registration_is_repeated_under_one_idempotency_key(kind: Kind) -> None:
    """The service makes one passport of both, and the next registration is another."""

    def register(lucid: Any) -> Any:
        return lucid.passports.create(name="n", type="tool")

    async with FaultNode(Behaviour(answer=refusal(409, "PASSPORT_EXISTS", passportId="p"))) as node:
        node.script = [Behaviour(cut_head_after=0, ending=Ending.RESET)]
        error = await fault_of(kind, node.url, register, retries=1)
        assert error.passport_id == "p"
        await fault_of(kind, node.url, register)
        first, again, other = (request.headers["idempotency-key"] for request in node.requests)
        assert first == again != other


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_that_a_lost_attempt_revoked_is_revoked(kind: Kind) -> None:
    """The repetition finds no key, and that is what was asked for; at the first attempt it is a mistake."""
    async with FaultNode(Behaviour(answer=refusal(404, "KEY_NOT_FOUND"))) as node:
        async with speaker(kind, node.url, retries=1) as client:
            node.script = [Behaviour(cut_head_after=0, ending=Ending.RESET)]
            assert await client.ask(lambda lucid: lucid.keys.revoke("k")) is None
        error = await fault_of(kind, node.url, lambda lucid: lucid.keys.revoke("k"), retries=1)
        assert isinstance(error, errors.KeyNotFound)


DRIPS = {
    "silence": Behaviour(cut_head_after=0),
    "a late answer": Behaviour(answer=ALIVE, delay_seconds=30),
    "a head that drips": Behaviour(answer=ALIVE, drip_head_seconds=0.05),
    "a body that drips": Behaviour(answer=respond(b" " * 999 + b"{}"), drip_body_seconds=0.05),
    "half a body": Behaviour(answer=ALIVE, cut_body_after=5),
    "a body without an end": Behaviour(answer=respond(b"{", length=9)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behaviour", DRIPS.values(), ids=DRIPS)
async def test_an_attempt_ends_in_its_time_however_the_peer_drips(kind: Kind, behaviour: Behaviour) -> None:
    """Httpx bounds each read alone; here the whole attempt is bounded, and its connection is let go."""
    async with FaultNode(behaviour) as node:
        began = time.monotonic()
        error = await fault_of(kind, node.url, timeout_seconds=0.3)
        assert time.monotonic() - began < 3
        assert isinstance(error, errors.TimedOut)
        assert error.request_id == node.requests[0].headers["x-request-id"]
        await node.until(lambda node: not node.open_connections)


@pytest.mark.parametrize("kind", KINDS)
async def test_all_attempts_together_end_in_the_calls_time(kind: Kind) -> None:
    """Ten retries of a silent service are cut off by the bound of the whole call."""
    async with FaultNode(Behaviour(cut_head_after=0)) as node:
        began = time.monotonic()
        error = await fault_of(kind, node.url, retries=10, timeout_seconds=0.3, total_timeout_seconds=0.8)
        assert isinstance(error, errors.TimedOut)
        assert time.monotonic() - began < 3
        assert 2 <= len(node.requests) <= 4


@pytest.mark.parametrize("kind", KINDS)
async def test_a_wait_that_was_asked_for_is_not_cut_off(kind: Kind) -> None:
    """`wait_seconds` of a deregistration is on top of the timeouts."""
    done = respond(b'{"passportId":"p","status":"deregistered"}')
    async with FaultNode(Behaviour(answer=done, delay_seconds=0.6)) as node:
        async with speaker(kind, node.url, timeout_seconds=0.3, total_timeout_seconds=0.3) as client:
            answer = await client.ask(lambda lucid: lucid.compute.deregister("p", wait_seconds=20))
        assert answer.status == "deregistered"
        assert node.requests[0].path == "/compute/deregister/p?waitSeconds=20"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
async def test_what_is_no_answer_is_never_a_success(kind: Kind, broken: bytes) -> None:
    """Garbage of every kind ends in an exception of ours, never in another's and never in a wait without end."""
    async with FaultNode(Behaviour(answer=Answer(broken), ending=Ending.CLOSE)) as node:
        await fault_of(kind, node.url)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "endless", [endless_body(), endless_header(), endless_headers()], ids=["body", "header", "headers"]
)
async def test_an_answer_without_an_end_is_left(kind: Kind, endless: Answer) -> None:
    """No more than the largest answer is read."""
    assert MAX_ANSWER_BYTES < 100_000_000
    async with FaultNode(Behaviour(answer=endless)) as node:
        assert isinstance(await fault_of(kind, node.url, timeout_seconds=30.0), errors.UnexpectedAnswer)
        await node.until(lambda node: not node.open_connections)


FOREIGN: dict[str, tuple[Answer, type[errors.LucidClientError], str]] = {
    "a login page": (respond(b"<html>", content_type="text/html"), errors.UnexpectedAnswer, "HTML page"),
    "another service": (respond(b'{"hello": 1}'), errors.UnexpectedAnswer, "does not fit this client at status"),
    "a list": (respond(b"[]"), errors.UnexpectedAnswer, "does not fit this client at the top level"),
    "text": (respond(b"ok", content_type="text/plain"), errors.UnexpectedAnswer, "text/plain"),
    "nothing": (respond(b"", status=204), errors.UnexpectedAnswer, "answers 204 with nothing"),
    "no UTF-8": (respond(b'{"status":"\xff"}'), errors.UnexpectedAnswer, "which is not this service's"),
    "brackets": (respond(b"[" * 100_000), errors.UnexpectedAnswer, "which is not this service's"),
    "compressed": (respond(b"\x1f\x8b", "Content-Encoding: gzip"), errors.UnexpectedAnswer, "not this service's"),
    "a proxy's 502": (respond(b"<html>", status=502, content_type="text/html"), errors.Unavailable, "proxy"),
    "a proxy's 403": (respond(b"<html>", status=403, content_type="text/html"), errors.UnexpectedAnswer, "HTML page"),
    "another's 404": (respond(b'{"detail":"Not Found"}', status=404), errors.UnexpectedAnswer, "JSON of another kind"),
    "HTTPS alone": (
        respond(b"The plain HTTP request was sent to HTTPS port", status=400, content_type="text/html"),
        errors.UnexpectedAnswer,
        "https://",
    ),
    "TLS": (Answer(b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n"), errors.UnexpectedAnswer, "https:// meant"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("answer", "error", "sentence"), FOREIGN.values(), ids=FOREIGN)
async def test_what_another_answers_is_told_apart(
    kind: Kind, answer: Answer, error: type[errors.LucidClientError], sentence: str
) -> None:
    """The sentence says what answers there."""
    async with FaultNode(Behaviour(answer=answer)) as node:
        raised = await fault_of(kind, node.url)
        assert type(raised) is error
        assert sentence in str(raised)
        assert "\n" not in str(raised)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_with_the_key(kind: Kind, status: int) -> None:
    """Where it leads to hears nothing."""
    async with FaultNode() as elsewhere, FaultNode(Behaviour(answer=redirect(f"{elsewhere.url}/x", status))) as node:
        error = await fault_of(kind, node.url, retries=2)
        assert isinstance(error, errors.Redirected)
        assert elsewhere.url in str(error)
        assert (len(node.requests), elsewhere.connections) == (1, 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_who_does_not_listen_is_named_with_what_to_look_at(kind: Kind) -> None:
    """Refused, unknown, silent: each has its code and its sentence, and nothing was done for certain."""
    async with FaultNode() as node:
        url = node.url
    refused = await fault_of(kind, url)
    assert (type(refused), refused.code) == (errors.ConnectionFailed, "CONNECTION_REFUSED")
    assert "lucid serve" in str(refused)
    unknown = await fault_of(kind, "http://no-such-host.invalid")
    assert (type(unknown), unknown.code) == (errors.ConnectionFailed, "NAME_NOT_FOUND")
    async with FaultNode(accepts=False) as silent:
        error = await fault_of(kind, silent.url, timeout_seconds=0.2)
    assert isinstance(error, errors.ConnectionFailed | errors.TimedOut)
    assert refused.is_certainly_undone
    assert unknown.is_certainly_undone


@pytest.mark.parametrize("kind", KINDS)
async def test_a_service_that_comes_back_is_reached_again(kind: Kind) -> None:
    """Connections that died with it cost an attempt, not the client."""
    async with FaultNode(Behaviour(answer=ALIVE)) as node, speaker(kind, node.url, retries=1) as client:
        await client.ask(alive)
        await node.stop()
        with pytest.raises(errors.ConnectionFailed):
            await client.ask(alive)
        await node.start()
        assert (await client.ask(alive)).status == "ok"


@pytest.mark.parametrize("kind", KINDS)
async def test_connections_are_used_again_and_closed_in_the_end(kind: Kind) -> None:
    """Twenty calls in a row share one; a closed client leaves none."""
    async with FaultNode(Behaviour(answer=ALIVE)) as node:
        async with speaker(kind, node.url) as client:
            for _ in range(20):
                await client.ask(alive)
            assert node.connections == 1
        await node.until(lambda node: not node.open_connections)


async def test_a_call_that_is_cancelled_lets_its_connection_go() -> None:
    """The next call of the client is not disturbed by what was left of it."""
    async with FaultNode(Behaviour(answer=ALIVE)) as node, AsyncLucid(node.url) as lucid:
        node.script = [Behaviour(cut_body_after=3)]
        call = asyncio.create_task(lucid.healthz())
        await node.until(lambda node: bool(node.requests))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await node.until(lambda node: not node.open_connections)
        assert (await lucid.healthz()).status == "ok"


@pytest.mark.parametrize("kind", KINDS)
async def test_one_client_serves_many_at_a_time(kind: Kind) -> None:
    """Threads, or tasks, do not wait for each other nor read each other's answers."""

    def answer_of(number: int) -> Behaviour:
        found = {"passportId": f"p{number}", "models": []}
        return Behaviour(answer=respond(json.dumps(found).encode()), delay_seconds=0.02)

    async with FaultNode() as node, speaker(kind, node.url) as client:
        node.by_path = {f"/compute/models/p{number}": answer_of(number) for number in range(40)}

        async def ask(number: int) -> str:
            answer = await client.ask(lambda lucid: lucid.compute.declared_models(f"p{number}"))
            return str(answer.passport_id)

        assert await asyncio.gather(*map(ask, range(40))) == [f"p{number}" for number in range(40)]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_goes_in_the_header_and_nowhere_else(kind: Kind) -> None:
    """Without a key there is no header; a 401 then says how to pass one. The agent is named with its version."""
    async with FaultNode(Behaviour(answer=refusal(401, "UNAUTHORIZED"))) as node:
        with_key = await fault_of(kind, node.url)
        async with speaker(kind, node.url, "") as client:
            with pytest.raises(errors.Unauthorized, match="LUCID_API_KEY"):
                await client.ask(alive)
        first, second = node.requests
        assert first.headers["authorization"] == f"Bearer {KEY}"
        assert first.headers["user-agent"].startswith("lucid-compute/0.")
        assert "authorization" not in second.headers
        assert (with_key.status, with_key.request_id, str(with_key)) == (
            401,
            "r-1",
            "Do this instead. (UNAUTHORIZED, 401, request r-1)",
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_names_with_slashes_and_dots_stay_one_part_of_the_path(kind: Kind) -> None:
    """What is asked for is a name, whatever it looks like."""
    paths = {
        "meta-llama/Llama-3-70B": "/models/meta-llama%2FLlama-3-70B",
        "../keys": "/models/..%2Fkeys",
        "..": "/models/%2E%2E",
        "a?b#c%2F": "/models/a%3Fb%23c%252F",
        "größe 3": "/models/gr%C3%B6%C3%9Fe%203",
    }
    async with FaultNode(Behaviour(answer=refusal(404, "MODEL_NOT_FOUND"))) as node:
        for name in paths:
            await fault_of(kind, node.url, partial(get_model, name))
        assert [request.path for request in node.requests] == list(paths.values())
