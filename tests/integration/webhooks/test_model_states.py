"""Events of models that become available or unavailable: lasting changes, and at most three in ten minutes."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lucid_compute.registry.cleaning import Cleaner
from lucid_compute.registry.fleet.replicas import Outage
from lucid_compute.webhooks.model_states import OLD_MODEL_STATES, ModelStateRecorder
from tests.api import Adjust, Api, without_sweeps
from tests.other_replicas import run_sql
from tests.webhooks import deliveries_of, make_webhook

URL = "https://ops.example.com/lucid"


@pytest.fixture
def adjust() -> Adjust:
    """The tests sweep themselves."""
    return without_sweeps


async def look(
    api: Api, *, seconds: float = 6, is_doubtful: bool = False, states: ModelStateRecorder | None = None
) -> None:
    """Follow the models twice, `seconds` apart."""
    own = next(follower for follower in api.replica.sweep.followers if isinstance(follower, ModelStateRecorder))
    states, now = states or own, api.replica.clock.now()
    await states.follow(now - timedelta(seconds=seconds), is_doubtful=is_doubtful)
    await states.follow(now, is_doubtful=is_doubtful)


async def types_of(api: Api, webhook: dict[str, str]) -> list[str]:
    """The types of the events for the webhook, oldest first."""
    return [delivery["type"] for delivery in await deliveries_of(api, webhook["id"])]


async def make_served_model(api: Api) -> tuple[str, str]:
    """Make a model and a node that can run it and is not heard yet; answer their ids, once the first is known of."""
    api.replica.fleet.outages = ()  # before this replica began there was none, which counts as one
    model_id = await api.add_model("m", "gguf")
    node_id = await api.register("n", {"runtimes": ["llama.cpp"]})
    await look(api)
    return model_id, node_id


async def turn(api: Api, node_id: str, *, on: bool) -> None:
    """Make the node able or unable to run models."""
    await api.beat(node_id, status="healthy" if on else "unhealthy")


async def test_a_model_that_comes_and_goes_gives_events(api: Api) -> None:
    """Where it begins is no news; models that are always available and those of other owners are none either."""
    webhook = await make_webhook(api, URL)
    acme = await api.new_key("acme", ["compute"])
    others = await make_webhook(acme, URL)
    await api.add_model("always", "api")
    model_id, node_id = await make_served_model(api)
    assert await types_of(api, webhook) == []
    await turn(api, node_id, on=True)
    await look(api)
    await look(api)
    assert await types_of(api, webhook) == ["model.available"]
    await turn(api, node_id, on=False)
    await look(api)
    assert await types_of(api, webhook) == ["model.available", "model.unavailable"]
    assert {delivery["passportId"] for delivery in await deliveries_of(api, webhook["id"])} == {model_id}
    assert await types_of(api, others) == []


async def test_a_change_that_does_not_last_gives_no_event(api: Api) -> None:
    webhook = await make_webhook(api, URL)
    _, node_id = await make_served_model(api)
    await turn(api, node_id, on=True)
    await look(api, seconds=4)
    assert await types_of(api, webhook) == []
    await turn(api, node_id, on=False)
    await look(api)
    assert await types_of(api, webhook) == []


async def test_a_model_that_flaps_tells_of_three_changes_in_ten_minutes(api: Api) -> None:
    """The fourth is told of when the first is old enough, if it still holds."""
    webhook = await make_webhook(api, URL)
    _, node_id = await make_served_model(api)
    for on in (True, False, True, False):
        await turn(api, node_id, on=on)
        await look(api)
    assert await types_of(api, webhook) == ["model.available", "model.unavailable", "model.available"]
    await run_sql(api, "UPDATE model_states SET since = since - interval '11 minutes'")
    await look(api)
    assert (await types_of(api, webhook))[3:] == ["model.unavailable"]


async def test_a_model_that_is_available_again_is_told_of_in_time(api: Api) -> None:
    """However often it changed before: only bad news waits."""
    webhook = await make_webhook(api, URL)
    _, node_id = await make_served_model(api)
    await turn(api, node_id, on=True)
    await look(api)
    await run_sql(api, "UPDATE model_states SET since = since - interval '11 minutes'")
    for on in (False, True, False, True, False, True):
        await turn(api, node_id, on=on)
        await look(api)
    assert (await types_of(api, webhook))[1:] == ["model.unavailable", "model.available"] * 2


async def test_two_replicas_tell_of_a_change_once(api: Api) -> None:
    """The second to look finds it written, and one that starts anew takes it from there."""
    webhook = await make_webhook(api, URL)
    _, node_id = await make_served_model(api)
    other = ModelStateRecorder(api.replica.database, api.replica.fleet)
    await turn(api, node_id, on=True)
    await look(api)
    await look(api, states=other)
    await look(api, states=ModelStateRecorder(api.replica.database, api.replica.fleet))
    assert await types_of(api, webhook) == ["model.available"]


async def test_nothing_is_called_unavailable_while_the_fault_may_be_ours(api: Api) -> None:
    """While the brake is on, and for a minute after an outage of the registry."""
    webhook = await make_webhook(api, URL)
    _, node_id = await make_served_model(api)
    await turn(api, node_id, on=True)
    await look(api, is_doubtful=True)
    assert await types_of(api, webhook) == ["model.available"]
    await turn(api, node_id, on=False)
    await look(api, is_doubtful=True)
    now = api.replica.clock.now()
    api.replica.fleet.outages = (Outage(now - timedelta(seconds=50), now - timedelta(seconds=40)),)
    await look(api)
    assert await types_of(api, webhook) == ["model.available"]
    api.replica.fleet.outages = (Outage(now - timedelta(seconds=90), now - timedelta(seconds=80)),)
    await look(api)
    assert await types_of(api, webhook) == ["model.available", "model.unavailable"]


async def test_a_model_that_is_revoked_is_told_of_no_more(api: Api) -> None:
    webhook = await make_webhook(api, URL)
    model_id, node_id = await make_served_model(api)
    await turn(api, node_id, on=True)
    await api.http.delete(f"/passports/{model_id}")
    await look(api)
    assert await types_of(api, webhook) == []


async def test_old_states_are_deleted_in_batches_except_the_newest_of_each_model(api: Api) -> None:
    await run_sql(
        api,
        "INSERT INTO model_states SELECT md5(m::text)::uuid, now() - d * interval '1 day', true, false "
        "FROM generate_series(1, 3) m, generate_series(m * 40, 400, 40) d",
    )
    cleaner = Cleaner(api.replica.database, [OLD_MODEL_STATES._replace(batch=4)])
    assert await cleaner.clean() == 8 + 8 + 7
    left = await run_sql(api, "SELECT (now()::date - since::date) FROM model_states ORDER BY 1")
    assert [row[0] for row in left] == [40, 80, 80, 120]
