"""Webhooks: who may create one, which events it gets, their signatures and order."""

from __future__ import annotations

import json

import pytest

from lucid_compute.errors import LucidError
from lucid_compute.registry.domain.event_types import EventType
from lucid_compute.registry.domain.node_state import ReportedStatus
from lucid_compute.registry.events import record_event
from lucid_compute.webhooks.outbox import WebhookOutbox
from lucid_compute.webhooks.rules import BadSignature
from tests.api import Adjust, Api, error_code
from tests.fault_node import FaultNode
from tests.lucid_serve import eventually
from tests.other_replicas import run_sql
from tests.webhooks import (
    QUICK,
    deliveries_of,
    find_webhook,
    make_node,
    make_webhook,
    read,
    say,
    sweep,
    types_at,
    with_limits,
)

URL = "https://ops.example.com/lucid"
ALL = ["model.available", "model.unavailable", "node.deregistered", "node.drained", "node.recovered", "node.unhealthy"]


@pytest.fixture
def adjust() -> Adjust:
    """No delivery waits long, an owner may have four webhooks, and the tests sweep themselves."""
    return with_limits(QUICK._replace(per_owner=4))


async def test_a_webhook_is_created_listed_and_deleted(api: Api) -> None:
    """Its secret is in the first answer and nowhere else, not even in the audit trail."""
    made = await make_webhook(api, URL)
    secret = made.pop("secret")
    assert secret.startswith("whsec_")
    assert len(secret) > 40
    assert made.pop("notice")  # of a key whose owner has no node: it is in the first answer alone, too
    assert made == await find_webhook(api, made["id"])
    assert (made["events"], made["status"], made["owner"], made["passportIds"]) == (ALL, "active", "admin", None)
    for path in ("/webhooks", f"/webhooks/{made['id']}/deliveries", "/audit"):
        assert secret not in (await api.http.get(path)).text
    assert (await api.http.delete(f"/webhooks/{made['id']}")).status_code == 204
    assert error_code(await api.http.delete(f"/webhooks/{made['id']}")) == "WEBHOOK_NOT_FOUND"
    assert (await api.http.get("/webhooks")).json()["webhooks"] == []
    actions = [event["action"] for event in (await api.http.get("/audit")).json()["events"]]
    assert actions[:2] == ["webhook.delete", "webhook.create"]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"url": "https://169.254.169.254/latest"}, "url"),
        ({"url": "https://10.0.0.1/x"}, "url"),
        ({"url": "https://user:password@host/"}, "url"),
        ({"url": "https://host/?token=x#y"}, "url"),
        ({"url": "https://host/?token={x}"}, "url"),
        ({"url": "https://host?@169.254.169.254/\\x"}, "url"),
        ({"url": "https://169.254.169.254?x"}, "url"),
        ({"url": "https://user@host?x"}, "url"),
        ({"url": "https://host:22/"}, "url"),
        ({"url": "ftp://host/"}, "url"),
        ({"url": "https://host/ x"}, "url"),
        ({"url": URL, "events": []}, "events"),
        ({"url": URL, "events": ["node.exploded"]}, "events.0"),
        ({"url": URL, "passportIds": ["unknown"]}, "passportIds.0"),
        ({"url": URL, "passportIds": []}, "passportIds"),
        ({"url": URL, "passportIds": ["x"] * 101}, "passportIds"),
        ({"url": URL, "allOwners": "yes"}, "allOwners"),
        ({"url": URL, "secret": "mine"}, "secret"),
    ],
)
async def test_a_webhook_that_can_not_be_is_refused(api: Api, body: dict[str, object], path: str) -> None:
    answer = await api.http.post("/webhooks", json=body)
    assert (answer.status_code, error_code(answer)) == (422, "INVALID_REQUEST")
    assert [fault["path"] for fault in answer.json()["error"]["details"]["fields"]] == [path]


async def test_an_owner_has_a_limited_number_of_webhooks(api: Api) -> None:
    for _ in range(4):
        await make_webhook(api, URL)
    refused = await api.http.post("/webhooks", json={"url": URL})
    assert "Delete one first" in refused.text
    await make_webhook(api, URL, owner="acme")


async def test_a_node_that_becomes_silent_and_comes_back_gives_two_events(api: Api) -> None:
    """Each is sent once and signed with this webhook's secret; a first heartbeat gives no event."""
    async with FaultNode() as receiver:
        webhook = await make_webhook(api, f"{receiver.url}/hooks/v1/")
        node_id = await make_node(api)
        for seconds in (121, 0):
            await say(api, node_id, seconds_ago=seconds)
        await receiver.until(lambda receiver: len(receiver.requests) == 2)
        fell, came_back = (read(request, webhook["secret"]) for request in receiver.requests)
        first = receiver.requests[0]
    assert (first.method, first.path) == ("POST", "/hooks/v1/")
    assert first.headers["content-type"] == "application/json"
    assert fell.keys() == {"id", "type", "occurredAt", "passportId", "owner", "name", "reason", "details"}
    assert (fell["type"], fell["passportId"], fell["owner"]) == ("node.unhealthy", node_id, "admin")
    assert fell["name"] == "my-gpu-node"
    assert (fell["reason"], fell["details"]) == ("no heartbeat for 121 s", {"from": "healthy"})
    assert (came_back["type"], came_back["reason"]) == ("node.recovered", None)

    async def are_recorded() -> bool:
        return {delivery["state"] for delivery in await deliveries_of(api, webhook["id"])} == {"delivered"}

    await eventually(are_recorded)
    deliveries = await deliveries_of(api, webhook["id"])
    assert [delivery["id"] for delivery in deliveries] == [fell["id"], came_back["id"]]
    assert {(delivery["state"], delivery["attempts"], delivery["nextAttemptAt"]) for delivery in deliveries} == {
        ("delivered", 1, None)
    }
    assert [attempt["result"] for delivery in deliveries for attempt in delivery["lastAttempts"]] == ["2xx", "2xx"]


async def test_staleness_is_no_news_and_hides_no_recovery(api: Api) -> None:
    """A node that was called unhealthy, then stale, and is healthy again has recovered; one that was stale has not."""
    webhook, node_id = await make_webhook(api, URL), await make_node(api)
    for seconds in (36, 0):
        await say(api, node_id, seconds_ago=seconds)
    assert await deliveries_of(api, webhook["id"]) == []
    await run_sql(api, "UPDATE node_events SET at = at - interval '1 hour'")
    for state in ("unhealthy", "stale"):
        async with api.replica.database.transaction() as connection:
            await record_event(connection, node_id, EventType(state))
    stale = "recorded_state = 'stale', revision = revision + 1, changed_xid = pg_current_xact_id()"
    await run_sql(api, f"UPDATE nodes SET {stale}")
    await api.replica.feed.catch_up()
    await say(api, node_id, seconds_ago=0)
    assert [delivery["type"] for delivery in await deliveries_of(api, webhook["id"])] == ["node.recovered"]


async def test_a_drain_and_a_deregistration_give_events(api: Api) -> None:
    """Drained once nothing runs on it; deregistered and revoked nodes both as deregistered, for they are gone."""
    async with FaultNode() as receiver:
        await make_webhook(api, receiver.url)
        leaves, is_revoked = await make_node(api), await make_node(api, "other")
        await api.http.post(f"/compute/drain/{leaves}")
        await sweep(api)
        await api.http.post(f"/compute/deregister/{leaves}")
        await api.http.delete(f"/passports/{is_revoked}")
        await receiver.until(lambda receiver: len(receiver.requests) == 3)
        assert sorted(types_at(receiver)) == ["node.deregistered", "node.deregistered", "node.drained"]


async def test_a_planned_stop_raises_no_alarm_and_a_vanished_node_does(api: Api) -> None:
    """Drained as it said, and nothing further; the other one is unhealthy."""
    webhook, stops, vanishes = await make_webhook(api, URL), await make_node(api), await make_node(api, "other")
    for node, status in ((stops, ReportedStatus.DRAINING), (vanishes, ReportedStatus.HEALTHY)):
        for seconds in (0, 121, 300):
            await say(api, node, status=status, seconds_ago=seconds)
    told = sorted((delivery["passportId"], delivery["type"]) for delivery in await deliveries_of(api, webhook["id"]))
    assert told == sorted([(stops, "node.drained"), (vanishes, "node.unhealthy")])


async def test_a_webhook_gets_only_the_events_that_it_names(api: Api) -> None:
    """By events, by node, and never of another owner's."""
    async with FaultNode() as receiver:
        node_id, other = await make_node(api), await make_node(api, "other")
        acme = await api.new_key("acme", ["compute"])
        wanted = await make_webhook(api, receiver.url, events=["node.recovered"], passportIds=[node_id])
        others = await make_webhook(acme, receiver.url)
        for node in (node_id, other):
            for seconds in (121, 0):
                await say(api, node, seconds_ago=seconds)
        await receiver.until(lambda receiver: bool(receiver.requests))
        assert [delivery["type"] for delivery in await deliveries_of(api, wanted["id"])] == ["node.recovered"]
        assert await deliveries_of(api, others["id"]) == []
        assert json.loads(receiver.requests[0].body)["passportId"] == node_id


async def test_two_webhooks_get_one_event_with_the_same_id(api: Api) -> None:
    """A receiver that gets both can tell."""
    one, other = await make_webhook(api, URL), await make_webhook(api, URL)
    await say(api, await make_node(api), seconds_ago=121)
    ids = {delivery["id"] for webhook in (one, other) for delivery in await deliveries_of(api, webhook["id"])}
    assert len(ids) == 1


async def test_an_event_that_is_rolled_back_is_not_sent(api: Api) -> None:
    """The outbox is written in the event's own transaction."""
    webhook, node_id = await make_webhook(api, URL), await make_node(api)

    async def fail() -> None:
        async with api.replica.database.transaction() as connection:
            await record_event(connection, node_id, EventType.DEREGISTERED)
            raise LucidError("rolled back")

    with pytest.raises(LucidError):
        await fail()
    assert await deliveries_of(api, webhook["id"]) == []


async def test_webhooks_are_their_owners(api: Api) -> None:
    """Another owner's is not found, whatever is asked of it; an admin sees all and makes them for others."""
    acme, globex = await api.new_key("acme", ["compute"]), await api.new_key("globex", ["compute"])
    webhook = await make_webhook(acme, URL)
    path = f"/webhooks/{webhook['id']}"
    for method, of in (("DELETE", path), ("POST", f"{path}/test"), ("GET", f"{path}/deliveries")):
        for missing in (await globex.http.request(method, of), await acme.http.request(method, of[:-1])):
            assert missing.status_code in {404, 405}
    assert (await globex.http.get("/webhooks")).json()["webhooks"] == []
    assert error_code(await globex.http.get("/webhooks?owner=acme")) == "FORBIDDEN"
    assert error_code(await globex.http.post("/webhooks", json={"url": URL, "owner": "acme"})) == "FORBIDDEN"
    made = await make_webhook(api, URL, owner="globex")
    assert [shown["id"] for shown in (await globex.http.get("/webhooks")).json()["webhooks"]] == [made["id"]]
    assert len((await api.http.get("/webhooks")).json()["webhooks"]) == 2


async def test_a_key_that_is_bound_to_a_node_has_nothing_to_do_with_webhooks(api: Api) -> None:
    """It leaks with a node more easily than others, and webhooks tell of all nodes."""
    node_id = (
        await api.http.post(
            "/passports",
            json={
                "name": "n",
                "type": "compute",
                "owner": "acme",
                "metadata": {"vram": 8, "inferenceUrl": "http://gpu"},
            },
        )
    ).json()["id"]
    bound = await api.new_key("acme", ["compute"], passportId=node_id)
    assert error_code(await bound.http.post("/webhooks", json={"url": URL})) == "FORBIDDEN"
    assert error_code(await bound.http.get("/webhooks")) == "FORBIDDEN"


async def test_a_token_in_the_query_reaches_the_receiver_and_nobody_else(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither lists nor the audit trail nor a log show it; the names in the query stay, to tell webhooks apart."""
    query = "channel=ops&token=very%2Fsecret&flag"
    async with FaultNode() as receiver:
        webhook = await make_webhook(api, f"{receiver.url}/in?{query}")
        assert webhook["url"] == f"{receiver.url}/in?channel=***&token=***&***"
        await api.http.post(f"/webhooks/{webhook['id']}/test")
        assert receiver.requests[0].path == f"/in?{query}"
    for path in ("/webhooks", "/webhooks?sortBy=name", f"/webhooks/{webhook['id']}/deliveries", "/audit"):
        assert "secret" not in (await api.http.get(path)).text
    refused = await api.http.post("/webhooks", json={"url": "https://host:22/?token=secret"})
    assert refused.status_code == 422
    assert "secret" not in refused.text + caplog.text


async def test_a_webhook_of_an_admin_may_tell_of_every_owners_nodes(api: Api) -> None:
    """With `allOwners`; each event says whose it is, and one event comes once."""
    acme = await api.new_key("acme", ["compute"])
    assert error_code(await acme.http.post("/webhooks", json={"url": URL, "allOwners": True})) == "FORBIDDEN"
    everyones = await make_webhook(api, URL, allOwners=True)
    own = await make_webhook(api, URL)
    node_ids = {"acme": await make_node(acme), "admin": await make_node(api, "other")}
    narrowed = await make_webhook(api, URL, allOwners=True, passportIds=[node_ids["acme"]], events=["node.unhealthy"])
    for node_id in node_ids.values():
        for seconds in (121, 0):
            await say(api, node_id, seconds_ago=seconds)
    assert [delivery["passportId"] for delivery in await deliveries_of(api, own["id"])] == [node_ids["admin"]] * 2
    assert [delivery["passportId"] for delivery in await deliveries_of(api, narrowed["id"])] == [node_ids["acme"]]
    assert len(await deliveries_of(api, everyones["id"])) == 4
    owners = await run_sql(api, "SELECT DISTINCT subject_id::text, payload->>'owner' FROM webhook_deliveries")
    assert {owner: subject_id for subject_id, owner in owners} == node_ids


async def test_a_webhook_of_everyones_nodes_is_for_admins_alone(api: Api) -> None:
    """Not for another key of its owner: its deliveries name nodes of others."""
    webhook = await make_webhook(api, URL, allOwners=True)
    colleague = await api.new_key("admin", ["compute"])
    assert (await colleague.http.get("/webhooks")).json()["pagination"]["total"] == 0
    assert (await colleague.http.get(f"/webhooks/{webhook['id']}/deliveries")).status_code == 404
    assert (await colleague.http.post(f"/webhooks/{webhook['id']}/rotate")).status_code == 404
    assert (await colleague.http.delete(f"/webhooks/{webhook['id']}")).status_code == 404


async def test_a_webhook_may_tell_of_several_nodes_and_of_nobody_elses(api: Api) -> None:
    acme = await api.new_key("acme", ["compute"])
    nodes = [await make_node(acme, f"node {number}") for number in range(3)]
    webhook = await make_webhook(acme, URL, passportIds=nodes[:2])
    assert sorted(webhook["passportIds"]) == sorted(nodes[:2])
    for node_id in nodes:
        await say(api, node_id, seconds_ago=121)
    assert {delivery["passportId"] for delivery in await deliveries_of(acme, webhook["id"])} == set(nodes[:2])
    others = {"url": URL, "passportIds": [nodes[0], await api.register()]}
    refused = await acme.http.post("/webhooks", json=others)
    assert [fault["path"] for fault in refused.json()["error"]["details"]["fields"]] == ["passportIds.1"]


async def test_a_secret_that_is_rotated_leaves_a_day_to_change_over(api: Api) -> None:
    """Both sign, the new one first; with `now` the former one ends at once."""
    async with FaultNode() as receiver:
        webhook = await make_webhook(api, receiver.url)
        rotated = (await api.http.post(f"/webhooks/{webhook['id']}/rotate")).json()
        assert rotated["secret"] not in {webhook["secret"], None}
        node_id = await make_node(api)
        await say(api, node_id, seconds_ago=121)
        await receiver.until(lambda receiver: len(receiver.requests) == 1)
        for secret in (webhook["secret"], rotated["secret"]):
            read(receiver.requests[0], secret)
        await run_sql(api, "UPDATE webhooks SET former_secret_until = now()")
        await WebhookOutbox(api.replica.database).clean()  # nor is it kept any longer
        assert [tuple(row) for row in await run_sql(api, "SELECT former_secret FROM webhooks")] == [(None,)]
        await say(api, node_id, seconds_ago=0)
        await receiver.until(lambda receiver: len(receiver.requests) == 2)
        read(receiver.requests[1], rotated["secret"])
        with pytest.raises(BadSignature):
            read(receiver.requests[1], webhook["secret"])
        at_once = (await api.http.post(f"/webhooks/{webhook['id']}/rotate", json={"now": True})).json()
        await api.http.post(f"/webhooks/{webhook['id']}/test")
        read(receiver.requests[2], at_once["secret"])
        with pytest.raises(BadSignature):
            read(receiver.requests[2], rotated["secret"])
    assert "webhook.rotate" in [event["action"] for event in (await api.http.get("/audit")).json()["events"]]


async def test_a_secret_that_is_rotated_again_within_the_day_ends_no_earlier_one(api: Api) -> None:
    """Each signs for its day: four at most, the newest first; with `now` all earlier ones end."""
    async with FaultNode(host="127.1.0.9") as receiver:
        webhook = await make_webhook(api, receiver.url)
        rotate = f"/webhooks/{webhook['id']}/rotate"
        secrets = [webhook["secret"]]
        for number in range(1, 6):
            secrets.append((await api.http.post(rotate, json={"now": number == 5})).json()["secret"])
            await say(api, await make_node(api, f"node {number}"), seconds_ago=121)
            await receiver.until(lambda receiver, count=number: len(receiver.requests) == count)  # type: ignore[misc]
        for number, request in enumerate(receiver.requests, 1):
            signing = secrets[max(0, number - 3) : number + 1] if number < 5 else secrets[5:]
            assert request.headers["lucid-signature"].count("v1=") == len(signing)
            for secret in signing:
                read(request, secret)
        await run_sql(api, "UPDATE webhooks SET former_secret = 'f', former_secret_until = now() + interval '1 hour'")
        ended = """'[{"secret": "a", "until": "2020-01-01"}, {"secret": "b", "until": "2999-01-01"}]'"""
        await run_sql(api, f"UPDATE webhooks SET older_secrets = {ended}")
        await WebhookOutbox(api.replica.database).clean()
        kept = "SELECT former_secret, older_secrets->0->>'secret', jsonb_array_length(older_secrets) FROM webhooks"
        assert [tuple(row) for row in await run_sql(api, kept)] == [("f", "b", 1)]
