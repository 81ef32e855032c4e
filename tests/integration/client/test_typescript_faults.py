"""The TypeScript client in Node against a server that misbehaves, on a real socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fault_answers import Answer, redirect, respond
from tests.fault_node import Behaviour, FaultNode
from tests.node_js import run_node

KEY = "lk_live_not-to-be-seen"
HEALTH = respond(b'{"status":"healthy"}')


def refusal(status: int, code: str, *headers: str) -> Answer:
    """A refusal in the contract's shape."""
    error = {"code": code, "message": "Do this instead.", "status": status, "details": {"resetsAt": "later"}}
    return respond(json.dumps({"error": error}).encode(), "X-Request-Id: r-1", *headers, status=status)


async def outcome(node: FaultNode, folder: Path, call: str, options: str = "") -> dict[str, Any]:
    """Return what a call comes to: its result, or the error that it ends in; and how long it took."""
    program = f"""
        import {{ Lucid, LucidError }} from "./lucid.ts";
        const lucid = new Lucid({{ baseUrl: "{node.url}", apiKey: "{KEY}", {options} }});
        const began = performance.now();
        let found: object;
        try {{
          found = {{ result: (await {call}) ?? null }};
        }} catch (error) {{
          const e = error as LucidError;
          found = {{ name: e.name, code: e.code, status: e.status, message: e.message, requestId: e.requestId,
            details: e.details, retryAfter: e.retryAfterSeconds, is: e instanceof LucidError }};
        }}
        console.log(JSON.stringify({{ ...found, ms: performance.now() - began }}));
    """
    ran = await run_node(program, folder)
    assert (ran.status, ran.errors) == (0, ""), ran
    assert KEY not in ran.out
    found: dict[str, Any] = json.loads(ran.out)
    return found


async def test_a_call_that_may_be_repeated_is_repeated(tmp_path: Path) -> None:
    """After 429 and 503, and as late as the service asks."""
    async with FaultNode(Behaviour(answer=HEALTH)) as node:
        node.script = [
            Behaviour(answer=refusal(503, "OVERLOADED")),
            Behaviour(answer=refusal(429, "RATE_LIMITED", "Retry-After: 1")),
        ]
        found = await outcome(node, tmp_path, 'lucid.compute.health("n")')
        assert found["result"] == {"status": "healthy"}
        assert found["ms"] >= 1000
        assert [request.headers["authorization"] for request in node.requests] == [f"Bearer {KEY}"] * 3


async def test_a_registration_is_repeated_under_one_idempotency_key(tmp_path: Path) -> None:
    async with FaultNode(Behaviour(answer=respond(b'{"id":"n"}', status=201))) as node:
        node.script = [Behaviour(answer=refusal(503, "DATABASE_UNAVAILABLE")), Behaviour(cut_head_after=3)]
        node.script[1] = Behaviour(answer=refusal(503, "OVERLOADED"))
        found = await outcome(node, tmp_path, 'lucid.passports.create({ name: "n", type: "tool" })')
        assert found["result"] == {"id": "n"}
        assert len(node.requests) == 3
        assert len({request.headers["idempotency-key"] for request in node.requests}) == 1


async def test_a_key_is_never_created_twice(tmp_path: Path) -> None:
    async with FaultNode(Behaviour(answer=refusal(503, "OVERLOADED", "Retry-After: 0"))) as node:
        found = await outcome(node, tmp_path, 'lucid.keys.create({ name: "k", owner: "o", scopes: ["compute"] })')
        assert (found["name"], found["code"], found["status"], found["is"]) == ("Unavailable", "OVERLOADED", 503, True)
        assert (found["requestId"], found["details"], found["retryAfter"]) == ("r-1", {"resetsAt": "later"}, 0)
        assert len(node.requests) == 1


async def test_what_can_not_succeed_soon_is_not_repeated(tmp_path: Path) -> None:
    """A budget that is spent, a wait of an hour, a request that is wrong."""
    for answer, name in (
        (refusal(429, "BUDGET_EXCEEDED", "Retry-After: 5"), "BudgetExceeded"),
        (refusal(503, "OVERLOADED", "Retry-After: 3600"), "Unavailable"),
        (refusal(422, "INVALID_REQUEST"), "InvalidRequest"),
        (refusal(410, "NODE_DEREGISTERED"), "NodeDeregistered"),
    ):
        async with FaultNode(Behaviour(answer=answer)) as node:
            found = await outcome(node, tmp_path, 'lucid.compute.health("n")')
            assert (found["name"], len(node.requests)) == (name, 1)


async def test_retries_end(tmp_path: Path) -> None:
    async with FaultNode(Behaviour(answer=refusal(429, "RATE_LIMITED"))) as node:
        found = await outcome(node, tmp_path, 'lucid.compute.health("n")', "retries: 2")
        assert (found["name"], found["message"], len(node.requests)) == ("RateLimited", "Do this instead.", 3)


async def test_a_revocation_whose_response_was_lost_has_succeeded(tmp_path: Path) -> None:
    async with FaultNode(Behaviour(answer=refusal(404, "KEY_NOT_FOUND"))) as node:
        assert (await outcome(node, tmp_path, 'lucid.keys.revoke("k")'))["name"] == "NotFound"
        node.script = [Behaviour(answer=refusal(503, "DATABASE_UNAVAILABLE"))]
        assert (await outcome(node, tmp_path, 'lucid.keys.revoke("k")'))["result"] is None


async def test_a_service_that_says_nothing_is_left_in_time(tmp_path: Path) -> None:
    """Before the response and within it; a caller's signal ends the call at once, and its pauses."""
    silent = Behaviour(answer=HEALTH, delay_seconds=60)
    for behaviour in (silent, Behaviour(answer=HEALTH, cut_body_after=5)):
        async with FaultNode(behaviour) as node:
            found = await outcome(node, tmp_path, 'lucid.compute.health("n")', "timeoutMs: 2000, retries: 1")
            assert (found["name"], found["code"], len(node.requests)) == ("TimedOut", "TIMED_OUT", 2)
    async with FaultNode(silent) as node:
        signal = "{ signal: AbortSignal.timeout(2500) }"
        found = await outcome(node, tmp_path, f'lucid.compute.health("n", {signal})')
        assert (found["name"], found["is"], len(node.requests)) == ("TimeoutError", False, 1)
        node.behaviour = Behaviour(answer=refusal(503, "OVERLOADED", "Retry-After: 30"))
        found = await outcome(node, tmp_path, f'lucid.compute.health("n", {signal})')
        assert (found["name"], len(node.requests)) == ("TimeoutError", 2)


async def test_nobody_at_the_address_is_said_so(tmp_path: Path) -> None:
    async with FaultNode() as node:
        pass
    found = await outcome(node, tmp_path, 'lucid.compute.health("n")', "retries: 0")
    assert (found["name"], found["code"]) == ("ConnectionFailed", "CONNECTION_FAILED")
    assert node.url in found["message"]


async def test_what_is_not_the_services_answer_is_said_so(tmp_path: Path) -> None:
    """A proxy's page, a redirect that would take the key along, JSON of another shape."""
    for answer, code in (
        (respond(b"<html>", content_type="text/html"), "UNEXPECTED_ANSWER"),
        (respond(b"<html>", content_type="text/html", status=404), "UNEXPECTED_ANSWER"),
        (respond(b"null", status=404), "UNEXPECTED_ANSWER"),
        (respond(b'{"error":"no"}', status=500), "UNEXPECTED_ANSWER"),
        (respond(b"<html>", status=502), "UNAVAILABLE"),
        (redirect("http://127.0.0.1:9/"), "REDIRECTED"),
    ):
        async with FaultNode(Behaviour(answer=answer)) as node:
            found = await outcome(node, tmp_path, 'lucid.compute.health("n")', "retries: 0")
            assert (found["code"], len(node.requests)) == (code, 1)


async def test_names_are_quoted_and_empty_ones_refused(tmp_path: Path) -> None:
    async with FaultNode(Behaviour(answer=HEALTH)) as node:
        await outcome(node, tmp_path, 'lucid.models.availability("org/a b?#ä")')
        await outcome(node, tmp_path, 'lucid.passports.list({ tags: ["a&b", "c"], owner: undefined }).page(2)')
        assert [request.path for request in node.requests] == [
            "/models/org%2Fa%20b%3F%23%C3%A4/availability",
            "/passports?tags=a%26b&tags=c&page=2&perPage=100",
        ]
        for name in ("", ".", ".."):
            found = await outcome(node, tmp_path, f"(async () => lucid.models.get({json.dumps(name)}))()")
            assert (found["code"], len(node.requests)) == ("INVALID_REQUEST", 2)


async def test_a_client_that_can_not_work_is_refused(tmp_path: Path) -> None:
    """Before anything is sent; no message has the key."""
    program = f"""
        import {{ Lucid }} from "./lucid.ts";
        const codes: string[] = [];
        for (const options of [
          {{ baseUrl: "lucid" }}, {{ baseUrl: "ftp://lucid" }}, {{ baseUrl: "http://user:{KEY}@lucid" }},
          {{ apiKey: "{KEY} ä" }}, {{ timeoutMs: 0 }}, {{ baseUrl: "http://lucid?key={KEY}" }},
        ]) {{
          try {{ new Lucid(options); }} catch (error) {{ codes.push((error as any).code, String(error)); }}
        }}
        console.log(codes.length, codes.join(" "), new Lucid({{ baseUrl: "https://lucid/a/b//" }}).baseUrl);
    """
    ran = await run_node(program, tmp_path)
    assert ran.out.startswith("12 CONFIGURATION"), ran
    assert ran.out.endswith("https://lucid/a/b\n")
    assert KEY not in ran.out
