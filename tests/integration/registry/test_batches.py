"""POST /passports:batchCreate: each passport has the result that POST /passports has for it, in one transaction."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from lucid_compute.errors import RateLimited
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.keys.rate_limits import WriteRates
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, error_code, open_api
from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import eventually
from tests.other_replicas import run_sql

GPU = {"vram": "80GB", "inferenceUrl": "http://gpu:8080/v1"}
STAMPS = {"id", "createdAt", "updatedAt"}


def node(name: str, **fields: Any) -> dict[str, Any]:
    """Return a node to register."""
    return {"name": name, "type": "compute", "metadata": GPU, **fields}


def model(name: str, *aliases: str) -> dict[str, Any]:
    """Return a model to register."""
    return {"name": name, "type": "model", "metadata": {"format": "gguf", "aliases": [*aliases]}}


async def send(api: Api, *passports: Any, key: str | None = None) -> httpx.Response:
    """Register passports in one call; return the raw response."""
    headers = {"Idempotency-Key": key} if key else {}
    return await api.http.post("/passports:batchCreate", json={"passports": passports}, headers=headers)


async def results(api: Api, *passports: Any, key: str | None = None) -> list[dict[str, Any]]:
    """Register passports in one call; return their results."""
    answer = await send(api, *passports, key=key)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["results"]
    assert len(found) == len(passports)
    created = sum(result["status"] == 201 for result in found)
    assert (answer.json()["created"], answer.json()["refused"]) == (created, len(found) - created)
    return found


def verdicts(found: list[dict[str, Any]]) -> list[Any]:
    """Return 201, or the code of the error, of each result."""
    return [201 if result["status"] == 201 else result["error"]["code"] for result in found]


async def count(api: Api, table: str) -> int:
    """Return the number of rows of a table."""
    return int((await run_sql(api, f"SELECT count(*) FROM {table}"))[0][0])


NO_OBJECTS: list[Any] = [None, 17, "name", [], True]
GARBAGE: list[Any] = [
    {},
    {"name": "x"},
    {"name": "", "type": "agent"},
    {"name": "x", "type": "nonsense"},
    {"name": "x", "type": "agent", "unknown": 1},
    {"name": "x", "type": "agent", "metadata": []},
    {"name": "x", "type": "agent", "metadata": {"deep": [[[[[[[[[[1]]]]]]]]]]}},
    {"name": "x", "type": "agent", "metadata": {"long": "x" * 33_000}},
    {"name": "x\u0007", "type": "agent"},
    {"name": "x", "type": "compute", "metadata": {}},
    {"name": "x", "type": "compute", "metadata": {"vram": "much", "inferenceUrl": ""}},
    {"name": "x", "type": "compute", "metadata": {**GPU, "inferenceUrl": "ftp://gpu"}},
    {"name": "x", "type": "compute", "metadata": {**GPU, "inferenceUrl": "http://169.254.169.254"}},
    {"name": "x/availability", "type": "model", "metadata": {"format": "gguf"}},
    {"name": "x", "type": "model", "metadata": {"format": "gguf", "upstream": {"url": "http://u"}}},
]


async def test_each_passport_is_what_a_single_registration_would_be(api: Api) -> None:
    """The passport, its row of the audit trail, its event, and what this replica serves at once."""
    wanted = [
        GUIDE_PASSPORT,
        model("m", "alias"),
        {"name": "a", "type": "agent", "description": "d", "version": "1", "tags": ["x", "y"], "metadata": {"b": 1.5}},
        node("secret", metadata={**GPU, "inferenceKey": "sk-secret"}),
    ]
    alone = await api.new_key("alone", ["compute", "passports:write"])
    together = await api.new_key("together", ["compute", "passports:write"])
    singles = [(await alone.http.post("/passports", json=body)).json() for body in wanted if body["type"] != "model"]
    found = await results(together, *wanted)
    assert verdicts(found) == [201] * 4
    batched = [result["passport"] for result in found]
    assert [_told(each) for each in batched if each["type"] != "model"] == [_told(each) for each in singles]
    for each in batched:
        assert (await together.http.get(f"/passports/{each['id']}")).json() == each
    assert (await api.http.get("/models/alias")).json()["id"] == batched[1]["id"]
    hashes = {
        owner: await run_sql(
            api,
            "SELECT a.action, a.target_type, a.actor_owner = p.owner, a.request_id IS NOT NULL, a.after_hash, p.name "
            "FROM audit_log a JOIN passports p ON p.id::text = a.target_id WHERE p.owner = $1 AND p.type <> 'model' "
            "ORDER BY p.name",
            owner,
        )
        for owner in ("alone", "together")
    }
    assert hashes["alone"] == hashes["together"]
    assert len(hashes["alone"]) == 3
    events = (await together.http.get(f"/compute/events/{batched[0]['id']}")).json()["events"]
    assert [event["type"] for event in events] == ["registered"]
    assert (await together.beat(batched[0]["id"])).status_code == 200
    assert "sk-secret" not in str(batched)
    assert api.replica.fleet.secrets.of(batched[3]["id"]) == {"inferenceKey": "sk-secret"}


async def test_what_is_refused_has_the_error_of_a_single_registration(api: Api) -> None:
    """Garbage among what is valid: the same code, sentence and paths, and the valid ones are created."""
    key = await api.new_key("acme", ["compute", "passports:write"])
    singles = [(await key.http.post("/passports", json=item)).json() for item in GARBAGE]
    mixed = [each for item in GARBAGE for each in (item, node(f"n{len(str(item))}-{GARBAGE.index(item)}"))]
    found = await results(key, *mixed)
    assert verdicts(found[1::2]) == [201] * len(GARBAGE)
    for item, single, result in zip(GARBAGE, singles, found[::2], strict=True):
        assert result == {"status": single["error"]["status"], "error": single["error"]}, item
    assert await count(api, "passports") == len(GARBAGE)
    for result in await results(key, *NO_OBJECTS):
        (fault,) = result["error"]["details"]["fields"]
        assert (result["status"], fault["path"], fault["message"][:26]) == (422, "", "A passport is a JSON objec")


async def test_a_key_without_a_scope_is_refused_and_one_scope_makes_its_own_kinds(api: Api) -> None:
    compute, writer = await api.new_key("acme", ["compute"]), await api.new_key("acme", ["passports:write"])
    reader, bound = await api.new_key("acme", ["passports:read"]), await api.new_key("b", ["compute"])
    assert error_code(await send(reader, node("n"))) == "FORBIDDEN"
    assert verdicts(await results(compute, node("n"), model("m"))) == [201, "FORBIDDEN"]
    assert verdicts(await results(writer, node("o"), model("m"))) == ["FORBIDDEN", 201]
    assert verdicts(await results(compute, node("p", owner="acme"), node("p", owner="b"))) == [201, "FORBIDDEN"]
    mine = (await results(bound, node("mine")))[0]["passport"]["id"]
    tied = await api.new_key("b", ["compute"], passportId=mine)
    assert verdicts(await results(tied, node("other"))) == ["FORBIDDEN"]
    assert verdicts(await results(api, node("x", owner="acme"), node("x", owner="b"))) == [201, 201]


async def test_a_name_in_use_is_answered_with_the_passport_that_has_it(api: Api) -> None:
    """Registered before, or earlier in the same call; a name of one that has ended is free."""
    first, gone = (await results(api, node("a"), node("gone")))[:2]
    await api.http.post(f"/compute/deregister/{gone['passport']['id']}")
    found = await results(api, node("b"), node("a"), node("b"), node("gone"), {"name": "a", "type": "agent"})
    assert verdicts(found) == [201, "PASSPORT_EXISTS", "PASSPORT_EXISTS", 201, 201]
    assert found[1]["error"]["details"] == {"passportId": first["passport"]["id"]}
    assert found[2]["error"]["details"] == {"passportId": found[0]["passport"]["id"]}
    single = await api.http.post("/passports", json=node("a"))
    assert found[1]["error"] == single.json()["error"]


@pytest.mark.parametrize(
    ("passports", "expected"),
    [
        ([model("a"), model("b", "a"), model("c")], [201, "MODEL_NAME_TAKEN", 201]),
        ([model("b", "taken", "c"), model("c")], ["MODEL_NAME_TAKEN", 201]),
        ([model("b", "taken"), model("b")], ["MODEL_NAME_TAKEN", 201]),
        ([model("b", "taken"), model("c", "b"), model("d", "c")], ["MODEL_NAME_TAKEN", 201, "MODEL_NAME_TAKEN"]),
        ([model("b"), model("b"), model("b")], [201, "PASSPORT_EXISTS", "PASSPORT_EXISTS"]),
        ([model(f"m{number}", "taken") for number in range(3)], ["MODEL_NAME_TAKEN"] * 3),
    ],
)
async def test_models_share_names_as_if_they_came_one_after_the_other(
    api: Api, passports: list[Any], expected: list[Any]
) -> None:
    """A model that is refused takes no name from a later one, and leaves no row."""
    await api.add_model("taken")
    assert verdicts(await results(api, *passports)) == expected
    assert await count(api, "passports") == 1 + expected.count(201)
    names = {row[0] for row in await run_sql(api, "SELECT name FROM model_names")}
    made = [each for each, verdict in zip(passports, expected, strict=True) if verdict == 201]
    assert names == {"taken", *(name for each in made for name in (each["name"], *each["metadata"]["aliases"]))}


async def test_a_repeat_returns_what_the_first_call_created(api: Api) -> None:
    """It is one registration, however often the call is sent; what was refused is tried again."""
    blocker = await api.register("taken")
    wanted = [node("a"), node("taken"), {"name": "b", "type": "agent"}]
    first = await results(api, *wanted, key="k")
    assert verdicts(first) == [201, "PASSPORT_EXISTS", 201]
    assert await results(api, *wanted, key="k") == first
    assert (await send(api, *wanted[:2], key="k")).json()["error"]["code"] == "IDEMPOTENCY_CONFLICT"
    await api.http.post(f"/compute/deregister/{blocker}")
    again = await results(api, *wanted, key="k")
    assert verdicts(again) == [201, 201, 201]
    assert [again[0], again[2]] == [first[0], first[2]]
    assert await results(api, *wanted, key="k") == again
    assert await count(api, "passports") == 4
    assert verdicts(await results(api, *wanted)) == ["PASSPORT_EXISTS"] * 3


async def test_calls_at_once_create_each_passport_once(database_url: str, settings: Settings) -> None:
    """The same names in opposite orders, over two replicas: nothing waits in a circle."""
    wanted = [*(node(f"n{number}") for number in range(200)), *(model(f"m{number}") for number in range(100))]
    async with open_api(database_url, settings) as one, open_api(database_url, settings) as two:
        calls = [results_patiently((one, two)[number % 2], wanted[:: (-1) ** number]) for number in range(4)]
        found = await asyncio.gather(*calls)
        made = [each for each in found for each in verdicts(each) if each == 201]
        assert len(made) == 300
        refused = {verdict for each in found for verdict in verdicts(each)} - {201}
        assert refused == {"PASSPORT_EXISTS"}
        assert await count(one, "passports") == await count(one, "audit_log WHERE action = 'passport.create'") == 300
        assert await count(one, "nodes") == await count(one, "heartbeats") == await count(one, "node_events") == 200
        assert await count(one, "model_names") == 100


async def results_patiently(api: Api, passports: list[Any]) -> list[dict[str, Any]]:
    """Register passports, again after each 503: a busy machine may take longer than the database's time limit."""
    while True:
        answer = await send(api, *passports)
        if answer.status_code != 503:
            found: list[dict[str, Any]] = answer.json()["results"]
            return found


async def test_the_quota_refuses_the_last_passports_of_an_owner(database_url: str) -> None:
    """As many as are left are created, in their order; those that exist already take nothing."""
    async with open_api(database_url, Settings(bootstrap_admin_key=ADMIN_KEY, passports_per_owner=5)) as api:
        key = await api.new_key("acme", ["compute", "passports:write"])
        await results(key, node("a"), node("b"))
        names = ("a", "c", "d", "e", "f", "e")
        found = await results(key, *(node(name) for name in names))
        assert verdicts(found) == ["PASSPORT_EXISTS", 201, 201, 201, "INVALID_REQUEST", "PASSPORT_EXISTS"]
        single = await key.http.post("/passports", json=node("f"))
        assert found[4]["error"] == single.json()["error"]
        assert "'acme' has 5 active passports, and 5 are allowed." in found[4]["error"]["message"]
        assert await count(api, "passports") == await count(api, "nodes") == 5
        over = await results(api, *(node(f"n{number}", owner=owner) for number in range(6) for owner in ("x", "acme")))
        assert verdicts(over[::2]) == [201] * 5 + ["INVALID_REQUEST"]
        assert verdicts(over[1::2]) == ["INVALID_REQUEST"] * 6
        twice = await results(key, node("g"), node("g"))
        assert verdicts(twice) == ["INVALID_REQUEST"] * 2


async def test_a_batch_is_charged_a_tenth_of_its_passports() -> None:
    """100,000 fit in the burst of a key. One who has spent it waits, for a batch as for a single change."""
    rates = WriteRates(key_per_second=20, owner_per_second=50, burst=20_000, clock=lambda: 0.0)
    fleet = Principal("key", "acme", frozenset(), None, None)
    for _ in range(100):
        rates.spend(fleet)
        rates.charge(fleet, 99)
    for _ in range(10_000):
        rates.spend(fleet)
    with pytest.raises(RateLimited):
        rates.spend(fleet)


async def test_a_batch_spends_the_limits_of_its_key(database_url: str) -> None:
    """What is over stays owed, so a small burst does not make batches impossible, and nothing is gained by them."""
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, writes_burst=5, key_writes_per_second=1)
    async with open_api(database_url, settings) as api:
        key = await api.new_key("acme", ["compute", "passports:write"])
        assert (await send(key, *(node(f"n{number}") for number in range(95)))).status_code == 200
        refused = await send(key, node("x"))
        assert (refused.status_code, error_code(refused)) == (429, "RATE_LIMITED")
        assert 4 <= int(refused.headers["retry-after"]) <= 6
        other = await api.new_key("other", ["passports:write"])
        assert (await send(other, *([7] * 95))).json()["refused"] == 95
        assert (await send(other, 7)).status_code == 429


async def test_the_call_itself_is_refused_as_every_other_is(api: Api) -> None:
    bodies: list[Any] = [
        {},
        {"passports": []},
        {"passports": {}},
        {"passports": [1], "x": 1},
        {"passports": [1] * 1001},
        [],
    ]
    for body in bodies:
        refused = await api.http.post("/passports:batchCreate", json=body)
        assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST"), body
    long = {"name": "x", "type": "agent", "metadata": {"x": "x" * 32_000}}
    refused = await send(api, *([long] * 40))
    assert (refused.status_code, error_code(refused)) == (413, "PAYLOAD_TOO_LARGE")
    assert (await api.http.get("/passports:batchCreate")).status_code == 405
    assert await count(api, "passports") == 0


async def test_a_full_call_of_the_largest_passports_is_created(api: Api) -> None:
    """1,000 like the guide's, and as much metadata as a body may hold."""
    guides = [{**GUIDE_PASSPORT, "name": f"node-{number}"} for number in range(1000)]
    assert {result["status"] for result in await results(api, *guides)} == {201}
    large = [{"name": f"a{number}", "type": "agent", "metadata": {"x": "x" * 32_000}} for number in range(32)]
    assert {result["status"] for result in await results(api, *large)} == {201}
    assert (await api.http.get("/compute?search=node-999")).json()["pagination"]["total"] == 1


async def test_other_replicas_receive_a_batch(database_url: str, settings: Settings) -> None:
    async with open_api(database_url, settings) as one, open_api(database_url, settings) as two:
        found = await results(one, *(node(f"n{number}") for number in range(300)))
        last = found[-1]["passport"]["id"]

        async def has_received() -> bool:
            return (await two.http.get(f"/compute/health/{last}")).status_code == 200

        await eventually(has_received)
        assert (await two.http.get("/compute")).json()["pagination"]["total"] == 300


def _told(passport: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in passport.items() if key not in {*STAMPS, "owner"}}
