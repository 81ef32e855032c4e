"""What calls send, without sending it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from lucid_compute.client import compute_calls, key_calls, model_calls, passport_calls, payout_calls, service_calls
from lucid_compute.client.call import ApiCall
from lucid_compute.client.errors import InvalidRequest
from lucid_compute.registry.domain.node_state import Heartbeat, ReportedStatus
from lucid_compute.registry.shapes import ModelDeclaration
from tests.factories import GUIDE_PASSPORT, heartbeat


def sent(call: ApiCall[Any]) -> Any:
    """The body, as JSON."""
    assert call.body is not None
    return json.loads(call.body)


def faults(error: InvalidRequest) -> list[str]:
    """Where the faults of a request are."""
    return [fault["path"] for fault in error.details["fields"]]


def test_a_registration_is_sent_as_the_guide_writes_it() -> None:
    """Nothing is added to it, and metadata keeps its names."""
    assert sent(passport_calls.create(**GUIDE_PASSPORT)) == GUIDE_PASSPORT


def test_each_registration_has_an_idempotency_key_or_the_one_that_is_given() -> None:
    """So that each may be repeated."""
    first, second = (passport_calls.create(name="n", type="tool") for _ in range(2))
    assert first.idempotency_key
    assert first.idempotency_key != second.idempotency_key
    assert passport_calls.create(name="n", type="tool", idempotency_key="mine").idempotency_key == "mine"
    with pytest.raises(InvalidRequest):
        passport_calls.create(name="n", type="tool", idempotency_key="a\nb")


def test_a_heartbeat_says_that_it_does_not_know_and_leaves_out_what_it_was_not_told() -> None:
    """Load and queue are always there, null when unknown."""
    call = compute_calls.heartbeat(
        passport_id="p", status="healthy", load=None, available_models=["a"], queue_depth=None, detail=None
    )
    assert sent(call) == {
        "passportId": "p", "status": "healthy", "load": None, "availableModels": ["a"], "queueDepth": None
    }  # fmt: skip


def test_a_heartbeat_takes_everything_that_the_contract_names() -> None:
    """In Python's names or in the contract's, below too."""
    call = compute_calls.heartbeat(
        passport_id="p",
        status=ReportedStatus.HEALTHY,
        load=0.5,
        available_models=(),
        queue_depth=0,
        boot_id="b",
        sequence=3,
        sent_at=datetime(2026, 1, 1, tzinfo=UTC),
        in_flight=1,
        runtime={"name": "vllm", "version": "0.9"},
        gpus=[{"index": 0, "memory_used_mb": 1.0}, {"index": 1, "memoryUsedMb": 2}],
        jobs_completed=1,
        jobs_failed=2,
        avg_latency_ms=3.5,
        tokens_generated=4,
        detail="fine",
    )
    body = sent(call)
    assert set(body) == {field.alias for field in Heartbeat.model_fields.values()}
    assert body["sentAt"] == "2026-01-01T00:00:00.000Z"
    assert body["gpus"] == [{"index": 0, "memoryUsedMb": 1.0}, {"index": 1, "memoryUsedMb": 2.0}]


def test_a_ready_heartbeat_is_sent_as_it_is() -> None:
    """The same body as one that was written out."""
    ready = heartbeat("p", load=None, queueDepth=None)
    written = compute_calls.heartbeat(
        passport_id="p", status="healthy", load=None, available_models=[], queue_depth=None
    )
    assert sent(compute_calls.send(ready)) == sent(written)


def test_models_are_declared_in_either_spelling() -> None:
    """Python's names, the contract's, or the shape itself."""
    ready = ModelDeclaration.model_validate({"id": "c", "maxTokens": 3})
    call = compute_calls.update_models("p", models=[{"id": "a", "max_tokens": 1}, {"id": "b", "maxTokens": 2}, ready])
    assert sent(call)["models"] == [
        {"id": "a", "maxTokens": 1},
        {"id": "b", "maxTokens": 2},
        {"id": "c", "maxTokens": 3},
    ]


def test_a_change_sends_what_is_named_and_null_for_none() -> None:
    """RFC 7396: what is left out stays."""
    assert sent(passport_calls.update("p", description=None, metadata={"region": None})) == {
        "description": None,
        "metadata": {"region": None},
    }


def test_a_request_that_the_service_would_refuse_is_not_sent() -> None:
    """With every fault."""
    with pytest.raises(InvalidRequest) as raised:
        compute_calls.heartbeat(passport_id="p", status="fine", load=2, available_models=[], queue_depth=-1)
    assert faults(raised.value) == ["status", "load", "queueDepth"]
    assert raised.value.status is None
    with pytest.raises(InvalidRequest):
        service_calls.match("m", lucid={"allow_regoins": []})
    with pytest.raises(InvalidRequest):
        passport_calls.create(name="n", type="tool", metadata={"what": object()})
    with pytest.raises(InvalidRequest):
        passport_calls.create(name="n", type="tool", metadata={"what": "\ud800"})


def test_a_fault_is_told_by_the_name_on_the_wire_whichever_was_passed() -> None:
    """As the service tells it, below lists and objects too; a name that there is not stays as it was written."""
    with pytest.raises(InvalidRequest) as raised:
        service_calls.match("m", lucid={"max_price_per_1k_tokens": "x", "maxLatencyMs": -1, "allow_regoins": []})
    assert faults(raised.value) == ["lucid.maxPricePer1kTokens", "lucid.maxLatencyMs", "lucid.allow_regoins"]
    with pytest.raises(InvalidRequest) as raised:
        compute_calls.update_models("p", models=[{"id": "a"}, {"id": "b", "max_tokens": 0}])
    assert faults(raised.value) == ["models.1.maxTokens"]
    with pytest.raises(InvalidRequest) as raised:
        payout_calls.close_period(from_="x", to="2026-01-01")
    assert faults(raised.value) == ["from"]


@pytest.mark.parametrize(
    "describe", [passport_calls.get, compute_calls.health, key_calls.revoke, model_calls.get, compute_calls.events]
)
def test_an_empty_id_does_not_become_another_call(describe: Any) -> None:
    """`DELETE /keys/` is no way to revoke all of them."""
    with pytest.raises(InvalidRequest, match="empty"):
        describe("")


def test_availability_is_not_mistaken_for_a_name() -> None:
    """A model's name may not end so, and the service would answer something else."""
    assert model_calls.availability("a/b").path == "/models/a%2Fb/availability"
    with pytest.raises(InvalidRequest, match=r"models\.availability"):
        model_calls.get("a/availability")


def test_filters_go_by_their_names_on_the_wire() -> None:
    """None is left out, flags are words, lists are repeated, instants are UTC with their zone."""
    listing = model_calls.list_(available=False, max_vram=24.5, tags=["a", "b"], sort_by="createdAt")
    assert listing.query == (
        ("available", "false"), ("maxVram", "24.5"), ("tags", "a"), ("tags", "b"), ("sortBy", "createdAt")
    )  # fmt: skip
    assert listing.page(2, 50).query[-2:] == (("page", "2"), ("perPage", "50"))
    since = datetime(2026, 1, 1, tzinfo=UTC)
    assert compute_calls.events("p", since=since).query == (("since", "2026-01-01T00:00:00.000Z"),)
    with pytest.raises(InvalidRequest, match="time zone"):
        compute_calls.jobs(until=since.replace(tzinfo=None))


def test_only_what_makes_secrets_is_not_repeatable() -> None:
    """Everything else does twice what it does once."""
    assert not key_calls.create(name="k", owner="o", scopes=["compute"]).is_repeatable
    assert not key_calls.rotate("k").is_repeatable
    assert passport_calls.create(name="n", type="tool").is_repeatable
    assert compute_calls.drain("p").is_repeatable
