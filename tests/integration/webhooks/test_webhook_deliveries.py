"""Deliveries to receivers that misbehave: retried in order, without delaying other nodes', given up after a day."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from lucid_compute.registry.domain.event_types import EventType
from lucid_compute.registry.events import record_event
from lucid_compute.server.settings import Settings
from lucid_compute.webhooks.outbox import WebhookOutbox
from tests.api import Adjust, Api, error_code, open_api
from tests.authority import Authority
from tests.fault_answers import BROKEN, Answer, endless_body, endless_header, redirect, respond
from tests.fault_node import Behaviour, Ending, FaultNode
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

_hosts = (f"127.1.{third}.{fourth}" for third in itertools.count(1) for fourth in range(1, 255))
FAILS = Behaviour(answer=respond(status=500))


@pytest.fixture
def adjust() -> Adjust:
    """No delivery waits long, and the tests sweep themselves."""
    return with_limits()


async def drain_and_end(api: Api, node_id: str) -> None:
    """Make two events of one node."""
    await api.http.post(f"/compute/drain/{node_id}")
    await sweep(api)
    await api.http.post(f"/compute/deregister/{node_id}")


async def test_a_failed_delivery_is_tried_again_with_the_same_id(api: Api) -> None:
    """And a signature of its own, for each is made when it is sent."""
    async with FaultNode() as receiver:
        receiver.script = [
            FAILS,
            Behaviour(ending=Ending.RESET, cut_head_after=5),
            Behaviour(answer=redirect("http://x/")),
        ]
        webhook = await make_webhook(api, receiver.url)
        await say(api, await make_node(api), seconds_ago=121)
        await receiver.until(lambda receiver: len(receiver.requests) == 4)
        events = [read(request, webhook["secret"]) for request in receiver.requests]
        assert all(event == events[0] for event in events)

        async def is_over() -> bool:
            return bool((await deliveries_of(api, webhook["id"]))[0]["state"] == "delivered")

        await eventually(is_over)
        (delivery,) = await deliveries_of(api, webhook["id"])
    assert delivery["attempts"] == 4
    results = [attempt["result"] for attempt in delivery["lastAttempts"]]
    assert results == ["2xx", "3xx", "connection_lost", "5xx"]
    assert (await find_webhook(api, webhook["id"]))["failingSince"] is None


async def test_a_failed_delivery_holds_back_its_own_node_alone(api: Api) -> None:
    """The second event of a node never overtakes the first, while those of others go on."""
    async with FaultNode(FAILS) as receiver:
        webhook = await make_webhook(api, receiver.url)
        held, other = await make_node(api, "held"), await make_node(api, "other")
        await drain_and_end(api, held)
        await receiver.until(lambda receiver: len(receiver.requests) >= 3)
        assert set(types_at(receiver)) == {"node.drained"}
        assert (await find_webhook(api, webhook["id"]))["failingSince"] is not None
        await drain_and_end(api, other)
        await receiver.until(lambda receiver: len({request.body for request in receiver.requests}) == 2)
        receiver.behaviour, failed = Behaviour(), len(receiver.requests)

        async def is_over() -> bool:
            return all(delivery["state"] == "delivered" for delivery in await deliveries_of(api, webhook["id"]))

        await eventually(is_over)
        events = [read(request, webhook["secret"]) for request in receiver.requests[failed:]]
    for node_id in (held, other):
        types = [event["type"] for event in events if event["passportId"] == node_id]
        assert types[-2:] == ["node.drained", "node.deregistered"]


async def test_a_webhook_is_disabled_after_a_day_of_failures_and_a_test_enables_it(api: Api) -> None:
    """What waits is given up, nothing more is written for it, and it says why."""
    async with FaultNode(FAILS, host=next(_hosts)) as receiver:
        webhook = await make_webhook(api, receiver.url)
        node_id = await make_node(api)
        await drain_and_end(api, node_id)
        await receiver.until(lambda receiver: bool(receiver.requests))
        await run_sql(api, "UPDATE webhooks SET failing_since = now() - interval '25 hours'")

        async def is_disabled() -> bool:
            return bool((await find_webhook(api, webhook["id"]))["status"] == "disabled")

        await eventually(is_disabled)
        shown = await find_webhook(api, webhook["id"])
        assert shown["disabledReason"].startswith("Nothing could be delivered for a day; the last attempt came to 5xx.")
        assert [delivery["state"] for delivery in await deliveries_of(api, webhook["id"])] == ["given_up", "given_up"]
        await say(api, await make_node(api, "other"), seconds_ago=121)
        assert len(await deliveries_of(api, webhook["id"])) == 2
        receiver.behaviour = Behaviour()
        tested = (await api.http.post(f"/webhooks/{webhook['id']}/test")).json()
        assert (tested["delivered"], tested["result"]) == (True, "2xx")
        assert read(receiver.requests[-1], webhook["secret"])["type"] == "webhook.test"
    shown = await find_webhook(api, webhook["id"])
    assert (shown["status"], shown["failingSince"], shown["disabledAt"]) == ("active", None, None)
    assert (await deliveries_of(api, webhook["id"]))[-1]["id"] == tested["eventId"]


async def test_a_delivery_is_given_up_after_a_day_and_lets_the_next_one_through(api: Api) -> None:
    """A receiver that refuses one event for good, and takes others, is not failing."""
    async with FaultNode(FAILS) as receiver:
        webhook = await make_webhook(api, receiver.url)
        await drain_and_end(api, await make_node(api))
        await receiver.until(lambda receiver: bool(receiver.requests))
        await run_sql(
            api, "UPDATE webhook_deliveries SET first_attempt_at = now() - interval '25 hours' WHERE attempts > 0"
        )
        await receiver.until(lambda receiver: "node.deregistered" in types_at(receiver))
        assert (await deliveries_of(api, webhook["id"]))[0]["state"] == "given_up"
        assert (await find_webhook(api, webhook["id"]))["status"] == "active"


SECRETS = "the receiver's own words"


@pytest.mark.parametrize(
    ("behaviour", "result"),
    [
        (Behaviour(answer=respond(SECRETS.encode(), status=204)), "2xx"),
        (Behaviour(answer=respond(SECRETS.encode(), status=404)), "4xx"),
        (Behaviour(answer=redirect("http://169.254.169.254/latest", 307)), "3xx"),
        (Behaviour(answer=endless_body()), "2xx"),  # its body is nobody's business
        (Behaviour(answer=endless_header()), "bad_response"),
        (Behaviour(answer=Answer(BROKEN["garbage"])), "bad_response"),
        (Behaviour(delay_seconds=30), "timeout"),
        (Behaviour(drip_head_seconds=0.05), "timeout"),
        (Behaviour(cut_head_after=3, ending=Ending.RESET), "connection_lost"),
    ],
)
async def test_a_test_says_what_came_of_it_and_nothing_of_the_answer(
    database_url: str, settings: Settings, behaviour: Behaviour, result: str
) -> None:
    limits = QUICK._replace(attempt_seconds=0.3)
    async with (
        open_api(database_url, settings, with_limits(limits)) as api,
        FaultNode(behaviour, host=next(_hosts)) as receiver,
    ):
        webhook = await make_webhook(api, receiver.url)
        answer = await api.http.post(f"/webhooks/{webhook['id']}/test")
        assert answer.status_code == 200
        assert SECRETS not in answer.text
        assert (answer.json()["result"], answer.json()["delivered"]) == (result, result == "2xx")
        await receiver.until(lambda receiver: not receiver.open_connections)
        assert len(receiver.requests) == 1
        (test,) = await deliveries_of(api, webhook["id"])
        assert (test["type"], test["passportId"], test["attempts"]) == ("webhook.test", None, 1)


async def test_a_name_that_resolves_to_an_inner_address_is_not_connected_to(api: Api) -> None:
    """It is checked at each connection, because it may have resolved elsewhere when the webhook was created."""

    async def to_metadata(host: str, port: int) -> list[str]:
        return ["169.254.169.254"]

    webhook = await make_webhook(api, "https://rebound.example/")
    api.replica.webhooks.tester._deliverer._client._lookups._resolve = to_metadata
    answer = (await api.http.post(f"/webhooks/{webhook['id']}/test")).json()
    assert (answer["result"], answer["delivered"]) == ("address_refused", False)


async def test_this_service_sends_nothing_to_itself(api: Api) -> None:
    """A webhook that leads back would have us write to ourselves."""
    api.replica.gateway.own_endpoints.add(("127.0.0.1", 8123))
    webhook = await make_webhook(api, "http://127.0.0.1:8123/compute/heartbeat")
    assert (await api.http.post(f"/webhooks/{webhook['id']}/test")).json()["result"] == "routing_loop"


async def test_a_receiver_over_tls_has_to_prove_its_name(api: Api, authority: Authority) -> None:
    async with FaultNode(tls=authority.issue("DNS:localhost"), host="127.0.0.1") as receiver:
        for host, result in (("localhost", "2xx"), ("127.0.0.1", "tls_failed")):
            webhook = await make_webhook(api, f"https://{host}:{receiver.port}/")
            assert (await api.http.post(f"/webhooks/{webhook['id']}/test")).json()["result"] == result


async def test_a_host_is_tested_once_in_ten_seconds(api: Api) -> None:
    """So that nobody has us knock elsewhere again and again."""
    async with FaultNode(host=next(_hosts)) as receiver:
        webhook = await make_webhook(api, receiver.url)
        assert (await api.http.post(f"/webhooks/{webhook['id']}/test")).status_code == 200
        assert error_code(await api.http.post(f"/webhooks/{webhook['id']}/test")) == "RATE_LIMITED"


async def test_two_replicas_send_everything_once(database_url: str, settings: Settings, api: Api) -> None:
    """A claim keeps the other one off; two hundred events of a hundred nodes, each node's in order."""
    async with FaultNode() as receiver, open_api(database_url, settings, with_limits()) as other:
        assert other.replica.webhooks.sender is not api.replica.webhooks.sender
        webhook = await make_webhook(api, receiver.url)
        nodes = [await api.register(f"node {number}") for number in range(100)]
        for event in (EventType.REVOKED, EventType.DEREGISTERED):
            await _tell(api, nodes, event)
        for count in range(1, 201):  # however long all take, the next one comes
            await receiver.until(partial(_has_received, count=count), seconds=30)
        events = [read(request, webhook["secret"]) for request in receiver.requests]
    assert len({event["id"] for event in events}) == 200
    written = await run_sql(api, "SELECT event_id::text, subject_id::text FROM webhook_deliveries ORDER BY position")
    for node_id in nodes:
        received = [event["id"] for event in events if event["passportId"] == node_id]
        assert received == [event_id for event_id, subject_id in written if subject_id == node_id]


async def test_what_a_killed_replica_had_in_hand_is_sent_by_another(api: Api) -> None:
    """Its claim runs out; until then nobody has the delivery, nor the next one of the node."""
    killed = WebhookOutbox(api.replica.database)
    async with FaultNode() as receiver:
        with a_busy_sender(api):
            webhook = await make_webhook(api, receiver.url)
            await drain_and_end(api, await make_node(api))
            (claimed,) = await killed.claim(10, 10)
        assert await killed.claim(10, 10) == []
        assert not receiver.requests
        ends_now = "UPDATE webhook_deliveries SET claimed_until = now(), next_attempt_at = now()"
        await run_sql(api, f"{ends_now} WHERE claimed_until IS NOT NULL")
        await receiver.until(lambda receiver: len(receiver.requests) == 2)
        assert types_at(receiver) == ["node.drained", "node.deregistered"]
        assert read(receiver.requests[0], webhook["secret"])["id"] == claimed.event_id


async def test_a_webhook_that_fails_is_tried_with_one_delivery_at_a_time(api: Api) -> None:
    """Its other nodes wait, so that a receiver that hangs takes few of this service's places."""
    outbox, nodes = WebhookOutbox(api.replica.database), [await api.register(f"node {number}") for number in range(20)]
    await make_webhook(api, "http://127.0.0.1:1025/")
    with a_busy_sender(api):
        await run_sql(api, "UPDATE webhooks SET failing_since = now()")
        await _tell(api, nodes, EventType.REVOKED)
        assert [len(await outbox.claim(64, 32)) for _ in range(2)] == [1, 0]
        await run_sql(api, "UPDATE webhooks SET failing_since = NULL")
        assert [len(await outbox.claim(64, 32)) for _ in range(2)] == [19, 0]


async def test_a_receiver_gets_eight_deliveries_at_a_time(api: Api) -> None:
    """However many wait for it; all of them come."""
    nodes = [await api.register(f"node {number}") for number in range(30)]
    async with FaultNode(Behaviour(delay_seconds=600)) as receiver:
        await make_webhook(api, receiver.url)
        await _tell(api, nodes, EventType.REVOKED)
        await receiver.until(lambda receiver: len(receiver.requests) == 8)
        assert api.replica.webhooks.sender.running == 8
        assert receiver.open_connections == 8


async def test_receivers_that_hang_leave_places_to_the_others(api: Api) -> None:
    """A hundred that have failed before take half of the places, and what comes for another is sent at once."""
    async with FaultNode(Behaviour(delay_seconds=600)) as hangs, FaultNode() as receiver:
        node_id = await api.register()
        insert = "INSERT INTO webhooks (id, owner, url, secret, events, all_owners, failing_since)"
        values = (
            "SELECT gen_random_uuid(), 'x', $1, 's', '{node.deregistered}', true, now() FROM generate_series(1, 100)"
        )
        await run_sql(api, f"{insert} {values}", hangs.url)
        await _tell(api, [node_id], EventType.REVOKED)
        await hangs.until(lambda hangs: len(hangs.requests) == 32)
        await make_webhook(api, receiver.url)
        await _tell(api, [await api.register("other")], EventType.REVOKED)
        await receiver.until(lambda receiver: len(receiver.requests) == 1)
        assert api.replica.webhooks.sender.running <= 32 + 1


async def test_what_is_in_hand_is_laid_down_when_its_webhook_fails_or_the_service_stops(
    database_url: str, settings: Settings, api: Api
) -> None:
    """Nobody has to wait until its claim runs out, and it counts as no attempt."""
    nodes = [await api.register(f"node {number}") for number in range(30)]
    with a_busy_sender(api):
        async with FaultNode(Behaviour(delay_seconds=600)) as receiver, open_api(database_url, settings, with_limits()):
            await make_webhook(api, receiver.url)
            await _tell(api, nodes, EventType.REVOKED)
            await receiver.until(lambda receiver: len(receiver.requests) == 8)
            in_hand = "SELECT count(*) FROM webhook_deliveries WHERE claimed_until > now() AND attempts = 1"

            async def are_in_hand() -> bool:
                return bool((await run_sql(api, in_hand))[0][0] == 30)

            await eventually(are_in_hand)
        # Stopped: those that were under way are in doubt, the others are free.
        assert (await run_sql(api, in_hand))[0][0] == 8
        (counted,) = await run_sql(api, "SELECT count(*) FROM webhook_deliveries WHERE attempts = 0")
        assert counted[0] == 22


def _has_received(receiver: FaultNode, count: int) -> bool:
    return len(receiver.requests) >= count


async def _tell(api: Api, nodes: list[str], event: EventType) -> None:
    """Write an event of each node, each in a transaction of its own."""
    for node_id in nodes:
        async with api.replica.database.transaction() as connection:
            await record_event(connection, node_id, event)


@contextmanager
def a_busy_sender(api: Api) -> Iterator[None]:
    """Keep the replica's own sender from claiming anything, as if all its places were taken."""
    sender = api.replica.webhooks.sender
    sender._in_progress = {asyncio.create_task(asyncio.sleep(60)) for _ in range(64)}
    yield
    taken, sender._in_progress = sender._in_progress, set()
    for task in taken:
        task.cancel()
