"""Corrections of closed periods: exact, booked once in the open period, and only added to."""

from __future__ import annotations

import csv
import io
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.api import Api, error_code
from tests.integration.accounting.test_payouts import (
    DAY,
    FIRST,
    TODAY,
    amounts,
    ask,
    close,
    parties,
    some_jobs,
    tell,
    told,
)
from tests.other_replicas import run_sql

UNTIL = FIRST + 5 * DAY
LINES = [
    {"role": "provider", "owner": "acme", "amountUsd": "-0.000000000001"},
    {"role": "model_owner", "owner": "nobody", "amountUsd": "123456789012.123456789012"},
    {"role": "protocol", "amountUsd": "-7"},
]
BODY: dict[str, Any] = {"reason": "a price was wrong", "lines": LINES}


async def closed_period(api: Api) -> tuple[str, dict[tuple[str | None, str], Decimal]]:
    """Close the first days; return the period's id, and what each owner got in them."""
    there = await parties(api)
    jobs = some_jobs(there, 50, days=5)
    await tell(api, jobs)
    return (await close(api, FIRST, UNTIL)).json()["id"], told(there, jobs)


async def correct(api: Api, period_id: str, body: Any = BODY, key: str | None = None) -> Any:
    """Ask for a correction; return the raw response."""
    headers = {} if key is None else {"Idempotency-Key": key}
    return await api.http.post(f"/payouts/periods/{period_id}/corrections", json=body, headers=headers)


def with_lines(before: dict[tuple[str | None, str], Decimal]) -> dict[tuple[str | None, str], Decimal]:
    """What each owner gets once the correction is booked."""
    after = dict(before)
    for line in LINES:
        party = (line.get("owner"), line["role"])
        after[party] = after.get(party, Decimal(0)) + Decimal(line["amountUsd"])
    return after


def totals(report: dict[str, Any]) -> dict[tuple[str | None, str], Decimal]:
    """The totals of a report, which are the sums of its lines and of its corrections."""
    found = {(each["owner"], each["role"]): Decimal(each["amountUsd"]) for each in report["totals"]}
    summed: dict[tuple[str | None, str], Decimal] = {}
    for line in [*report["lines"], *report["corrections"]]:
        party = (line["owner"], line["role"])
        summed[party] = summed.get(party, Decimal(0)) + Decimal(line["amountUsd"])
    assert summed == found
    return found


async def test_a_correction_is_in_the_open_period_and_leaves_the_closed_one_as_it_is(api: Api) -> None:
    period_id, earned = await closed_period(api)
    frozen = await ask(api, f"/periods/{period_id}")
    booked = await correct(api, period_id)
    assert booked.status_code == 201, booked.text
    made = booked.json()
    assert (made["periodId"], made["day"], made["reason"]) == (period_id, str(TODAY), "a price was wrong")
    assert made["lines"] == [{"owner": None, **line} for line in LINES]
    assert await ask(api, f"/periods/{period_id}") == frozen
    assert amounts(frozen) == earned
    report = await ask(api)
    assert totals(report) == with_lines(earned)
    shown = [{name: each[name] for name in ("role", "owner", "amountUsd")} for each in report["corrections"]]
    assert shown == made["lines"]
    assert {(each["id"], each["periodId"], each["day"]) for each in report["corrections"]} == {
        (made["id"], period_id, str(TODAY))
    }
    assert (await ask(api, to=str(TODAY)))["corrections"] == []
    (event,) = (await api.http.get("/audit", params={"targetId": made["id"]})).json()["events"]
    assert event["action"] == "payouts.correct"
    assert event["details"] == {"periodId": period_id, "day": str(TODAY), "reason": "a price was wrong"}


async def test_an_owner_sees_its_own_corrections_alone(api: Api) -> None:
    period_id, _ = await closed_period(api)
    await correct(api, period_id)
    for owner, lines in (("acme", LINES[:1]), ("nobody", LINES[1:2]), ("globex", [])):
        its = await api.new_key(owner, ["compute"])
        report = await ask(its)
        totals(report)
        assert [each["amountUsd"] for each in report["corrections"]] == [line["amountUsd"] for line in lines]
        refused = await correct(its, period_id)
        assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")


async def test_a_correction_is_booked_once_for_its_key(api: Api) -> None:
    """Whenever it is repeated; another body, or another period, with the same key is refused."""
    period_id, earned = await closed_period(api)
    first = await correct(api, period_id, key="a-key")
    await run_sql(api, "DELETE FROM idempotency_keys")
    again = await correct(api, period_id, key="a-key")
    assert (again.status_code, again.json()) == (201, first.json())
    assert totals(await ask(api)) == with_lines(earned)
    for other in (
        await correct(api, period_id, {**BODY, "reason": "x"}, "a-key"),
        await correct(api, "x", BODY, "a-key"),
    ):
        assert (other.status_code, error_code(other)) == (409, "IDEMPOTENCY_CONFLICT")
    assert (await correct(api, period_id, key="another")).json()["id"] != first.json()["id"]
    assert len(await run_sql(api, "SELECT FROM payout_corrections")) == 2 * len(LINES)


async def test_a_correction_belongs_to_the_period_of_its_day_for_good(api: Api) -> None:
    """It is in that period's report and statement, with its reason, and figures below 0 are figures."""
    period_id, _ = await closed_period(api)
    days = (UNTIL, UNTIL + 2 * DAY)
    for number, day in enumerate(days):
        await _insert(api, period_id, day, f"-{number + 1}.5")
    second = (await close(api, UNTIL, UNTIL + 2 * DAY)).json()["id"]
    report = await ask(api, f"/periods/{second}")
    assert totals(report) == {("acme", "provider"): Decimal("-1.5")}
    text = (await api.http.get("/payouts", params={"format": "csv", "from": str(UNTIL), "to": str(TODAY)})).text
    rows = list(csv.DictReader(io.StringIO(text)))
    corrections = [row for row in rows if row["kind"] == "correction"]
    names = ("day", "amountUsd", "periodId", "correctsPeriodId", "reason")
    assert [tuple(row[name] for name in names) for row in corrections] == [
        (str(days[0]), "-1.5", second, period_id, "'=why"),
        (str(days[1]), "-2.5", "", period_id, "'=why"),
    ]
    (acmes,) = (row for row in rows if row["kind"] == "total")
    assert (acmes["owner"], acmes["jobs"], acmes["grossUsd"], acmes["amountUsd"]) == ("acme", "0", "0", "-4.0")
    statement = (await api.http.get(f"/payouts/periods/{second}?format=csv")).text
    assert [row["kind"] for row in csv.DictReader(io.StringIO(statement))] == ["correction", "total"]


async def _insert(api: Api, period_id: str, day: date, amount: str) -> None:
    """Book a correction as on that day."""
    await run_sql(
        api,
        "INSERT INTO payout_corrections (id, line, period_id, day, role, owner, amount_usd, reason, created_by) "
        f"VALUES (gen_random_uuid(), 0, $1::text::uuid, $2, 'provider', 'acme', {amount}, '=why', 'x')",
        period_id,
        day,
    )


async def test_a_correction_is_in_no_closed_period_whatever_the_clock_did(api: Api) -> None:
    """After a failover to a host whose clock is behind, the last period may end tomorrow, or be being closed."""
    period_id, _ = await closed_period(api)
    ends = TODAY + 3 * DAY
    await run_sql(api, "INSERT INTO payout_periods VALUES (gen_random_uuid(), $1, $2, now(), 'x')", UNTIL, ends)
    assert (await correct(api, period_id)).json()["day"] == str(ends)
    closing = "INSERT INTO payout_closings VALUES (gen_random_uuid(), $1, $2, now(), 'x')"
    await run_sql(api, closing, ends, ends + DAY)
    assert (await correct(api, period_id)).json()["day"] == str(ends + DAY)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ({"amountUsd": "0"}, "lines.0.amountUsd"),
        ({"amountUsd": "-0.000"}, "lines.0.amountUsd"),
        ({"amountUsd": -7}, "lines.0.amountUsd"),
        ({"amountUsd": 0.1}, "lines.0.amountUsd"),
        ({"amountUsd": "1e3"}, "lines.0.amountUsd"),
        ({"amountUsd": "--1"}, "lines.0.amountUsd"),
        ({"amountUsd": "+1"}, "lines.0.amountUsd"),
        ({"amountUsd": "٣"}, "lines.0.amountUsd"),
        ({"amountUsd": "NaN"}, "lines.0.amountUsd"),
        ({"amountUsd": "0.0000000000001"}, "lines.0.amountUsd"),
        ({"amountUsd": "1000000000000"}, "lines.0.amountUsd"),
        ({"role": "client"}, "lines.0.role"),
        ({"role": "protocol"}, "lines.0.owner"),
        ({"owner": None}, "lines.0.owner"),
    ],
)
async def test_a_correction_that_can_not_be_is_refused(api: Api, line: dict[str, Any], path: str) -> None:
    refused = await correct(api, str(uuid4()), {**BODY, "lines": [{**LINES[0], **line}]})
    assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST")
    assert [fault["path"] for fault in refused.json()["error"]["details"]["fields"]] == [path]


async def test_only_a_closed_period_is_corrected_and_with_a_reason(api: Api) -> None:
    for period_id in ("x", str(uuid4())):
        assert error_code(await correct(api, period_id)) == "PERIOD_NOT_FOUND"
    for body in ({**BODY, "reason": " "}, {**BODY, "reason": "x" * 501}, {**BODY, "lines": []}, {"lines": LINES}):
        assert error_code(await correct(api, "x", body)) == "INVALID_REQUEST"
    assert error_code(await correct(api, "x", {**BODY, "lines": LINES * 34})) == "INVALID_REQUEST"


async def test_a_correction_can_not_be_changed(api: Api) -> None:
    for statement in ("UPDATE payout_corrections SET line = 1", "DELETE FROM payout_corrections"):
        with pytest.raises(asyncpg.RaiseError, match="append-only"):
            await run_sql(api, statement)
