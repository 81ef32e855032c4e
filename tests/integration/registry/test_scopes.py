"""Who may do what: the contract's table of scopes, row by row."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from lucid_compute.gateway.endpoints import PATHS
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, error_code

SCOPES = ("compute", "passports:read", "passports:write", "inference:run", "admin")
EVERYONE = {None, *SCOPES}
NEW_NODE = {"name": "new", "type": "compute", "metadata": {"vram": 8, "inferenceUrl": "http://gpu"}}
NEW_AGENT = {"name": "new", "type": "agent"}
BEAT: dict[str, object] = {
    "passportId": "{node}",
    "status": "healthy",
    "load": None,
    "availableModels": [],
    "queueDepth": None,
}


class Call(NamedTuple):
    """One call of the table, and the scopes that may make it; None is no key at all."""

    method: str
    path: str
    allowed: set[str | None]
    body: object = None


READERS: set[str | None] = {"passports:read", "compute", "admin"}
COMPUTE: set[str | None] = {"compute", "admin"}
PASSPORTS: set[str | None] = {"passports:write", "admin"}
INFERRERS: set[str | None] = {"inference:run", "admin"}
ADMINS: set[str | None] = {"admin"}
TABLE = [
    *[Call("GET", path, EVERYONE) for path in ("/models", "/models/m", "/models/m/availability")],
    *[Call("GET", path, EVERYONE) for path in ("/healthz", "/readyz", "/docs", "/openapi.json")],
    *[Call("GET", path, READERS) for path in ("/passports", "/passports/{node}", "/passports/{agent}")],
    *[Call("GET", path, READERS) for path in ("/compute", "/compute/health/{node}", "/compute/models/{node}")],
    Call("GET", "/compute/events", READERS),
    Call("GET", "/compute/events/{node}", READERS),
    Call("GET", "/compute/routing/{node}", READERS),
    Call("GET", "/me", {*SCOPES}),
    Call("GET", "/compute/jobs", {*READERS, "inference:run"}),
    Call("GET", "/compute/jobs?consumer=acme", INFERRERS),
    Call("GET", "/usage", INFERRERS),
    *[Call("GET", path, READERS) for path in ("/compute/metrics", "/compute/metrics/{node}")],
    *[Call("GET", path, READERS) for path in ("/compute/uptime", "/compute/uptime/{node}")],
    *[Call("GET", path, READERS) for path in ("/compute/overview",)],
    *[Call("GET", path, READERS) for path in ("/payouts", "/payouts/losses")],
    *[Call("GET", path, READERS) for path in ("/payouts/periods", "/payouts/periods/unknown")],
    Call("POST", "/payouts/periods", ADMINS, {"from": "2020-01-01", "to": "2020-02-01"}),
    Call("POST", "/payouts/periods/unknown/corrections", ADMINS, {"reason": "x", "lines": []}),
    *[Call("GET", path, ADMINS) for path in ("/keys", "/audit", "/metrics", "/service")],
    Call("POST", "/passports", COMPUTE, NEW_NODE),
    Call("POST", "/passports:batchCreate", COMPUTE | PASSPORTS, {"passports": [{**NEW_NODE, "name": "one of many"}]}),
    Call("PATCH", "/passports/{node}", COMPUTE, {"description": "x"}),
    Call("POST", "/compute/heartbeat", COMPUTE, BEAT),
    Call("PUT", "/compute/models/{node}", COMPUTE, {"models": []}),
    Call("POST", "/compute/drain/{node}", COMPUTE),
    Call("POST", "/compute/resume/{node}", COMPUTE),
    Call("POST", "/compute/probe/{node}", COMPUTE),
    Call("GET", "/compute/connect?passportId={node}&bootId=1", COMPUTE),
    Call("POST", "/compute/deregister/{node}", COMPUTE),
    Call("GET", "/webhooks", COMPUTE),
    Call("POST", "/webhooks", COMPUTE, {"url": "https://ops.example.com/lucid"}),
    Call("GET", "/webhooks/unknown/deliveries", COMPUTE),
    Call("POST", "/webhooks/unknown/test", COMPUTE),
    Call("POST", "/webhooks/unknown/rotate", COMPUTE),
    Call("DELETE", "/webhooks/unknown", COMPUTE),
    Call("DELETE", "/passports/{node}", COMPUTE),
    Call("POST", "/passports", PASSPORTS, NEW_AGENT),
    Call("PATCH", "/passports/{agent}", PASSPORTS, {"description": "x"}),
    Call("PATCH", "/passports/{model}", PASSPORTS, {"description": "x"}),
    Call("DELETE", "/passports/{agent}", PASSPORTS),
    Call("DELETE", "/passports/{model}", PASSPORTS),
    Call("POST", "/keys", ADMINS, {"name": "k", "owner": "acme", "scopes": ["compute"]}),
    Call("POST", "/keys/unknown/rotate", ADMINS),
    Call("PATCH", "/keys/unknown", ADMINS, {"name": "k"}),
    Call("DELETE", "/keys/unknown", ADMINS),
]


async def make_what_the_table_names(api: Api) -> dict[str, str]:
    """Create acme's node, agent and model; return their ids by those words."""
    node = {**NEW_NODE, "name": "node", "owner": "acme"}
    agent = {"name": "agent", "type": "agent", "owner": "acme"}
    model = {"name": "m", "type": "model", "owner": "acme", "metadata": {"format": "gguf"}}
    made = {"node": node, "agent": agent, "model": model}
    return {word: (await api.http.post("/passports", json=body)).json()["id"] for word, body in made.items()}


@pytest.mark.parametrize("scope", [*SCOPES, None])
async def test_each_scope_may_do_what_the_table_says_and_nothing_else(api: Api, scope: str | None) -> None:
    """Refused with 403, or 401 without a key, whatever else the call would meet."""
    ids = await make_what_the_table_names(api)
    caller = await api.new_key("acme", [scope]) if scope else api.with_key(None)
    for call in TABLE:
        body = {**BEAT, "passportId": ids["node"]} if call.body is BEAT else call.body
        answer = await caller.http.request(call.method, call.path.format(**ids), json=body)
        where = f"{scope} {call.method} {call.path}: {answer.text}"
        if scope in call.allowed:
            assert answer.status_code not in {401, 403, 500, 503}, where
        else:
            refusal = (403, "FORBIDDEN") if scope else (401, "UNAUTHORIZED")
            assert (answer.status_code, error_code(answer)) == refusal, where


async def test_every_route_is_in_the_table(api: Api) -> None:
    """The scope of a route without a row here would not be tested."""

    def shape(path: str) -> str:
        return "/".join(
            "*" if part[:1] == "{" or part in {"m", "unknown"} else part for part in path.partition("?")[0].split("/")
        )

    document = (await api.http.get("/openapi.json")).json()
    there = {(method.upper(), shape(path)) for path, item in document["paths"].items() for method in item}
    known = {(call.method, shape(call.path)) for call in TABLE}
    outside = {(method, path) for method, path in there if path.startswith(("/v1", "/match")) or path in PATHS}
    assert there - outside <= known


async def test_scopes_add_up(api: Api) -> None:
    both = await api.new_key("acme", ["passports:read", "passports:write"])
    assert (await both.http.get("/passports")).status_code == 200
    assert (await both.http.post("/passports", json=NEW_AGENT)).status_code == 201
    assert error_code(await both.http.post("/passports", json=NEW_NODE)) == "FORBIDDEN"


async def test_a_wrong_key_is_refused_where_none_is_needed(api: Api) -> None:
    for path in ("/models", "/models/m", "/models/m/availability"):
        answer = await api.with_key("lk_live_wrong").http.get(path)
        assert (answer.status_code, error_code(answer)) == (401, "UNAUTHORIZED")


@pytest.fixture
def settings() -> Settings:
    """The tests' settings; one node may send all the heartbeats of the table."""
    return Settings(bootstrap_admin_key=ADMIN_KEY, heartbeat_max_per_second=0)
