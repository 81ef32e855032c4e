"""Tenancy: another owner's thing is answered exactly as a missing one; models are public but for what is not."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import event

from tests.api import Api, error_code
from tests.express_client import Entrance

MISSING = "7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11"
ALL_SCOPES_BUT_ADMIN = ["compute", "passports:read", "passports:write", "inference:run"]
AGENT = {"name": "agent", "type": "agent", "metadata": {"plan": "secret"}}


async def as_seen(api: Api, method: str, path: str, passport_id: str, body: Any = None) -> tuple[Any, ...]:
    """An answer without what may differ: the id that was asked for, and the request's own id."""
    if isinstance(body, dict) and "passportId" in body:
        body = {**body, "passportId": passport_id}
    answer = await api.http.request(method, path.format(passport_id), json=body)
    headers = {name: value for name, value in answer.headers.items() if name not in {"x-request-id", "date"}}
    return answer.status_code, headers, answer.text.replace(passport_id, "…")


def node_calls() -> list[tuple[str, str, Any]]:
    """Every call that names a node."""
    beat: dict[str, Any] = {
        "passportId": "",
        "status": "healthy",
        "load": None,
        "availableModels": [],
        "queueDepth": None,
    }
    return [
        ("GET", "/passports/{}", None),
        ("PATCH", "/passports/{}", {"description": "mine now"}),
        ("PATCH", "/passports/{}", {"owner": "rival"}),
        ("PATCH", "/passports/{}", {"nonsense": 1}),
        ("DELETE", "/passports/{}", None),
        ("POST", "/compute/heartbeat", beat),
        ("POST", "/compute/heartbeat", {**beat, "load": 9}),
        ("GET", "/compute/health/{}", None),
        ("GET", "/compute/models/{}", None),
        ("PUT", "/compute/models/{}", {"models": [{"id": "m"}]}),
        ("POST", "/compute/drain/{}", None),
        ("POST", "/compute/resume/{}", None),
        ("POST", "/compute/probe/{}", None),
        ("POST", "/compute/deregister/{}", None),
        ("POST", "/compute/deregister/{}?force=true", None),
        ("GET", "/compute/events/{}", None),
        ("GET", "/compute?search={}", None),
        ("GET", "/compute?model={}", None),
        ("GET", "/passports?search={}", None),
    ]


async def test_another_owners_node_is_answered_as_a_missing_one_on_every_endpoint(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    rival = await api.new_key("rival", ALL_SCOPES_BUT_ADMIN)
    for method, path, body in node_calls():
        foreign = await as_seen(rival, method, path, node, body)
        missing = await as_seen(rival, method, path, MISSING, body)
        assert foreign == missing, f"{method} {path}"
        if "?search" not in path and "?model" not in path:
            assert foreign[0] in {404, 422}, f"{method} {path}"
    assert (await api.health(node))["drained"] is False


async def test_another_owners_ended_node_is_answered_as_a_missing_one(api: Api) -> None:
    """Not as 410, which would tell that it was there."""
    rival = await api.new_key("rival", ALL_SCOPES_BUT_ADMIN)
    deregistered, revoked = await api.register("one"), await api.register("two")
    await api.http.post(f"/compute/deregister/{deregistered}")
    await api.http.delete(f"/passports/{revoked}")
    for node in (deregistered, revoked):
        for method, path, body in node_calls():
            assert await as_seen(rival, method, path, node, body) == await as_seen(rival, method, path, MISSING, body)


async def test_another_owners_opaque_passport_is_answered_as_a_missing_one(api: Api) -> None:
    rival = await api.new_key("rival", ALL_SCOPES_BUT_ADMIN)
    for type_ in ("agent", "tool", "dataset"):
        made = (await api.http.post("/passports", json={**AGENT, "type": type_})).json()["id"]
        for method, path, body in node_calls():
            assert await as_seen(rival, method, path, made, body) == await as_seen(rival, method, path, MISSING, body)


async def test_a_passport_of_another_type_is_no_node(api: Api) -> None:
    agent = (await api.http.post("/passports", json=AGENT)).json()["id"]
    model = await api.add_model("m")
    for passport_id in (agent, model):
        for method, path, body in node_calls():
            if path.startswith("/compute/"):
                answer = await as_seen(api, method, path, passport_id, body)
                assert answer == await as_seen(api, method, path, MISSING, body), path


async def test_lists_hold_ones_own(api: Api) -> None:
    acme = await api.new_key("acme", ALL_SCOPES_BUT_ADMIN)
    rival = await api.new_key("rival", ALL_SCOPES_BUT_ADMIN)
    own = {}
    for caller in (acme, rival):
        node = await caller.register()
        agent = (await caller.http.post("/passports", json=AGENT)).json()["id"]
        own[caller] = {node, agent}
        assert {found["id"] for found in (await caller.http.get("/passports")).json()["passports"]} == own[caller]
        (listed,) = (await caller.http.get("/compute")).json()["nodes"]
        assert listed["id"] == node
    everything = (await api.http.get("/passports")).json()
    assert {found["id"] for found in everything["passports"]} == own[acme] | own[rival]
    for path in ("/passports", "/compute"):
        total = (await api.http.get(f"{path}?owner=acme")).json()["pagination"]["total"]
        assert total == (2 if path == "/passports" else 1)
        assert (await acme.http.get(f"{path}?owner=acme")).json()["pagination"]["total"] == total
        refused = await rival.http.get(f"{path}?owner=acme")
        assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")


async def test_what_a_list_refuses_does_not_tell_whether_the_owner_exists(api: Api) -> None:
    await api.new_key("acme", ["compute"])
    rival = await api.new_key("rival", ALL_SCOPES_BUT_ADMIN)
    for path in ("/passports?owner={}", "/compute?owner={}"):
        assert await as_seen(rival, "GET", path, "acme") == await as_seen(rival, "GET", path, "nobody")


async def test_a_model_is_public_but_for_its_upstream_and_unknown_metadata(api: Api) -> None:
    known = {"format": "api", "contextLength": 8192, "aliases": ["alias"], "minVramGb": 4, "runtimes": ["vllm"]}
    hidden = {"upstream": {"url": "https://api.example"}, "margin": 0.4, "vramGb": 3}
    body = {"name": "org/m", "type": "model", "owner": "acme", "tags": ["t"], "metadata": {**known, **hidden}}
    model = (await api.http.post("/passports", json=body)).json()["id"]
    acme = await api.new_key("acme", ALL_SCOPES_BUT_ADMIN)
    rival = await api.new_key("rival", ALL_SCOPES_BUT_ADMIN)
    paths = (f"/models/{model}", "/models/org/m", f"/passports/{model}", "/models", "/passports?type=model")
    for viewer, shown in ((api, {**known, **hidden}), (acme, {**known, **hidden}), (rival, known)):
        for path in paths:
            assert metadata_of((await viewer.http.get(path)).json()) == shown, (path, viewer.key)
    for path in (path for path in paths if path.startswith("/models")):
        assert metadata_of((await api.with_key(None).http.get(path)).json()) == known


async def test_only_its_owner_or_an_admin_changes_a_model(api: Api) -> None:
    body = {"name": "m", "type": "model", "owner": "acme", "metadata": {"format": "gguf"}}
    model = (await api.http.post("/passports", json=body)).json()["id"]
    rival = await api.new_key("rival", ALL_SCOPES_BUT_ADMIN)
    acme = await api.new_key("acme", ALL_SCOPES_BUT_ADMIN)
    for answer in (
        await rival.http.patch(f"/passports/{model}", json={"description": "mine"}),
        await rival.http.delete(f"/passports/{model}"),
    ):
        assert (answer.status_code, error_code(answer)) == (403, "FORBIDDEN")
    assert (await acme.http.patch(f"/passports/{model}", json={"description": "ours"})).status_code == 200
    assert (await api.http.patch(f"/passports/{model}", json={"description": "theirs"})).status_code == 200
    assert (await acme.http.delete(f"/passports/{model}")).status_code == 204


async def test_a_models_availability_names_only_the_callers_nodes_and_counts_all(api: Api) -> None:
    acme, rival = await api.new_key("acme", ["compute"]), await api.new_key("rival", ["compute"])
    ours, theirs = await acme.register(), await rival.register()
    await api.add_model("m")
    for viewer, nodes in ((acme, {ours}), (rival, {theirs}), (api, {ours, theirs}), (api.with_key(None), set())):
        seen = (await viewer.http.get("/models/m/availability")).json()
        assert {node["passportId"] for node in seen["nodes"]} == nodes
        assert seen["summary"]["HEARTBEAT_MISSING"] == 2


def metadata_of(answer: dict[str, Any]) -> Any:
    """The metadata of a passport, or of the one passport of a list."""
    (passport,) = answer.get("models") or answer.get("passports") or [answer]
    return passport["metadata"]


async def test_another_owners_node_costs_the_reads_of_a_missing_one_on_every_endpoint(
    api: Api, entrance: Entrance
) -> None:
    """The same statements and the same waits for the feed, so time tells nothing; also of an ended node."""
    node, ended = await api.register(), await api.register("ended")
    await api.beat(node)
    assert (await api.http.post(f"/compute/deregister/{ended}")).status_code == 200
    rival = entrance(await api.new_key("rival", ALL_SCOPES_BUT_ADMIN))
    for call in node_calls():
        missing = await reads_of(rival, MISSING, *call)
        assert missing == await reads_of(rival, node, *call) == await reads_of(rival, ended, *call), call
        if "{}" in call[1] and "?" not in call[1] and call[1].startswith("/compute/"):
            assert missing[0], f"{call} reads nothing"


async def reads_of(api: Api, passport_id: str, method: str, path: str, body: Any) -> tuple[list[str], bool]:
    """Return the statements that a call makes, and whether it waits for the feed."""
    replica, statements = api.replica, list[str]()
    engine = replica.database._engine.sync_engine

    def record(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if asyncio.current_task() is task:
            statements.append(statement)

    before = replica.feed._last_catch_up
    event.listen(engine, "before_cursor_execute", record)
    try:
        task: object = asyncio.current_task()
        await as_seen(api, method, path, passport_id, body)
    finally:
        event.remove(engine, "before_cursor_execute", record)
    return statements, replica.feed._last_catch_up != before
