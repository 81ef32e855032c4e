"""Bodies of heartbeats: which are stored as they came, and which are read strictly before."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from lucid_compute.errors import InvalidRequest
from lucid_compute.registry.heartbeat_lane import JITTERS, MAX_REPORT_BYTES, _Ending, read_heartbeat

PLAIN: dict[str, Any] = {
    "passportId": "7a1b8a52",
    "status": "healthy",
    "load": 0.5,
    "availableModels": ["org/model:7b", "C:/models"],
    "queueDepth": 0,
}
COMPLETE: dict[str, Any] = PLAIN | {
    "bootId": "boot:1",
    "sequence": 7,
    "sentAt": "2026-01-01T12:00:00.000Z",
    "inFlight": None,
    "runtime": {"name": "vllm:cuda", "version": "0.9"},
    "gpus": [{"index": 0, "name": "GPU:0", "utilization": 0.5}, {"index": 1, "memoryUsedMb": 1024.5}],
    "jobsCompleted": 10,
    "jobsFailed": 1,
    "avgLatencyMs": 12.5,
    "tokensGenerated": 2**40,
    "detail": "fine: all of it",
}


@pytest.mark.parametrize("sent", [PLAIN, COMPLETE], ids=["plain", "complete"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_body_of_known_fields_is_stored_as_it_came(sent: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(sent, indent=indent).encode()
    heartbeat, report = read_heartbeat(body)
    assert report == body
    assert heartbeat.model_dump(mode="json", exclude_unset=True) == sent


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(COMPLETE | {"mood": 1}),
        json.dumps(COMPLETE | {"detail": "\\u0000 is written out"}),
        json.dumps(COMPLETE | {"detail": "é"}),
        json.dumps(COMPLETE | {"runtime": {"name": "vllm", "build": "x"}}),
        json.dumps(COMPLETE | {"sentAt": "2026-01-01T12:00:00.000+00:00"}),
        json.dumps(COMPLETE) + " " * MAX_REPORT_BYTES,
        json.dumps(PLAIN).replace("0.5", "1e-9999"),
        json.dumps(PLAIN).replace("0.5", "0E9"),
        json.dumps(PLAIN | {"sequence": 3}).replace("3", "3.0"),
    ],
)
def test_a_body_with_anything_else_is_written_out_again(text: str) -> None:
    """Unknown fields, escapes, exponents whose digits Postgres would store, and whole numbers with a decimal."""
    assert read_heartbeat(text.encode())[1] is None


@pytest.mark.parametrize("sent", [PLAIN, COMPLETE], ids=["plain", "complete"])
def test_a_key_twice_is_refused_wherever_it_stands(sent: dict[str, Any]) -> None:
    """Also beside an escaped colon, which is in the value and not in the body."""
    text = json.dumps(sent)
    twice = [text.replace("{", '{"load": 0.1, ', 1), text.replace("}", ', "load": 0.1}')]
    twice.append(twice[0].replace("org/model:7b", "org/model\\u003a7b"))
    if "gpus" in sent:
        twice += [text.replace('"index": 1', '"index": 1, "index": 2'), text.replace('"name"', '"name": "x", "name"')]
    for each in twice:
        with pytest.raises(InvalidRequest, match="twice"):
            read_heartbeat(each.encode())


def test_the_next_heartbeats_of_a_group_are_spread_evenly() -> None:
    """Between 8.1 and 9.9 seconds, in no order, so that nodes that were answered together come back apart."""
    ending = _Ending(is_draining=False)
    due = [json.loads(f'{{"due":{ending.next()}')["due"] for _ in range(2 * JITTERS)]
    assert due[:JITTERS] == due[JITTERS:]
    assert (min(due), max(due)) == (8.1, 9.9)
    assert set(Counter(int(seconds * 10) for seconds in due if 8.2 <= seconds < 9.8).values()) <= {56, 57, 58}
    assert due != sorted(due)
