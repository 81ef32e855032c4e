"""What the SDK makes of answers: an older service's, a newer one's, and hostile ones."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from lucid_compute.client import compute_calls, errors, key_calls
from lucid_compute.client.answers import Received, read_answer
from lucid_compute.client.call import ApiCall
from lucid_compute.client.lenient import unknown_member
from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.domain.node_state import NodeStatus

HEALTH: dict[str, Any] = {
    "passportId": "p", "status": "healthy", "fresh": True, "uptimeSeconds": 1.5, "jobsCompleted": 0,
    "avgLatencyMs": None, "errorRate": None, "lastHeartbeatAt": "2026-01-01T00:00:00.000Z",
    "heartbeatAgeSeconds": 1.0, "load": 0.5, "queueDepth": 0, "inFlight": 0, "drained": False,
    "availableModels": [], "reasons": [],
    "reported": {
        "status": "healthy", "load": 0.5, "queueDepth": 0, "inFlight": None, "runtime": None,
        "gpus": [{"index": 0, "utilization": 1}], "jobsCompleted": None, "jobsFailed": None, "avgLatencyMs": None,
        "tokensGenerated": None, "bootId": None, "sequence": None, "sentAt": None, "clockOffsetSeconds": None,
        "detail": None,
    },
}  # fmt: skip


def read(call: ApiCall[Any], body: Any, status: int = 200, **headers: str) -> Any:
    """What is made of `body`."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_answer(call, Received(status, named, content), base_url="http://lucid", has_key=True)


def read_health(changes: dict[str, Any] | None = None, *, without: str = "", **reported: Any) -> Any:
    """A health with changes."""
    body = {**HEALTH, **(changes or {}), "reported": {**HEALTH["reported"], **reported}}
    body.pop(without, None)
    return read(compute_calls.health("p"), body)


def refuse(status: int, error: Any, **headers: str) -> Any:
    """What a refusal is raised as."""
    with pytest.raises(errors.LucidClientError) as raised:
        read(compute_calls.health("p"), {"error": error}, status, **headers)
    return raised.value


def test_who_sent_no_key_is_told_how_to_send_one() -> None:
    """In Python as on the command line: the agent shows the same sentence."""
    received = Received(401, {}, json.dumps({"error": {"code": "UNAUTHORIZED", "message": "Send a key."}}).encode())
    with pytest.raises(errors.Unauthorized) as raised:
        read_answer(compute_calls.health("p"), received, base_url="http://lucid", has_key=False)
    assert all(word in raised.value.message for word in ("LUCID_API_KEY", "api_key", "--key"))
    assert "No key was sent" not in refuse(401, {"code": "UNAUTHORIZED", "message": "Send a key."}).message


def test_fields_of_a_newer_service_are_ignored() -> None:
    """At every depth."""
    health = read_health({"mood": "good"}, mood="good", gpus=[{"index": 0, "mood": "good"}])
    assert health.status is NodeStatus.HEALTHY
    assert not hasattr(health, "mood")


def test_a_name_of_a_newer_service_is_itself_and_none_that_is_known() -> None:
    """So an old agent goes on with a status that it does not know; it stands wherever an enumeration does."""
    health = read_health({"status": "suspended"}, status="resting")
    assert health.status == "suspended"
    assert isinstance(health.status, NodeStatus)
    assert health.status.value == str(health.status) == "suspended"
    assert health.status not in list(NodeStatus)
    assert health.reported.status == "resting"
    assert health.load == 0.5
    assert json.loads(health.model_dump_json())["status"] == "suspended"
    assert "suspended" in repr(health)
    key = {
        "id": "k", "key": "s", "name": "k", "owner": "o", "scopes": ["compute", "payouts:read"], "prefix": "p",
        "lastFour": "l", "passportId": None, "expiresAt": None, "limits": None, "rotatedAt": None,
        "createdAt": "2026-01-01T00:00:00.000Z", "lastUsedAt": None,
    }  # fmt: skip
    scopes = read(key_calls.rotate("k"), key, 200).scopes
    assert scopes == ["compute", "payouts:read"]
    assert scopes[0] is Scope.COMPUTE


def test_an_unknown_name_is_not_added_to_the_enumeration() -> None:
    """The next one is refused or mended for itself; two of them with one text are equal."""
    first, second = (unknown_member(NodeStatus, "suspended") for _ in range(2))
    assert first == second
    assert len({first, second}) == 1
    with pytest.raises(ValueError, match="suspended"):
        NodeStatus("suspended")


def test_a_field_that_an_older_service_does_not_have_is_none_where_it_may_be() -> None:
    """Where it may not, no value is made up."""
    assert read_health(without="errorRate").error_rate is None
    with pytest.raises(errors.UnexpectedAnswer, match="at fresh: Field required"):
        read_health(without="fresh")


@pytest.mark.parametrize("status", [3, None, True, ["healthy"], {"healthy": 1}])
def test_what_is_no_name_at_all_is_refused(status: Any) -> None:
    """A number is no status of a newer service."""
    with pytest.raises(errors.UnexpectedAnswer):
        read_health({"status": status})


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("INVALID_REQUEST", 422, errors.InvalidRequest),
        ("INVALID_REQUEST", 400, errors.InvalidRequest),
        ("UNAUTHORIZED", 401, errors.Unauthorized),
        ("FORBIDDEN", 403, errors.Forbidden),
        ("PASSPORT_NOT_FOUND", 404, errors.PassportNotFound),
        ("NODE_NOT_FOUND", 404, errors.NodeNotFound),
        ("MODEL_NOT_FOUND", 404, errors.ModelNotFound),
        ("KEY_NOT_FOUND", 404, errors.KeyNotFound),
        ("ROUTE_NOT_FOUND", 404, errors.NotFound),
        ("PASSPORT_EXISTS", 409, errors.PassportExists),
        ("MODEL_NAME_TAKEN", 409, errors.ModelNameTaken),
        ("IDEMPOTENCY_CONFLICT", 409, errors.IdempotencyConflict),
        ("REQUESTS_IN_FLIGHT", 409, errors.RequestsInFlight),
        ("NODE_DEREGISTERED", 410, errors.NodeDeregistered),
        ("PAYLOAD_TOO_LARGE", 413, errors.PayloadTooLarge),
        ("UNSUPPORTED_MEDIA_TYPE", 415, errors.UnsupportedMediaType),
        ("RATE_LIMITED", 429, errors.RateLimited),
        ("INTERNAL", 500, errors.ServiceFailed),
        ("NODE_FAILED", 502, errors.Unavailable),
        ("OVERLOADED", 503, errors.Unavailable),
        ("DATABASE_UNAVAILABLE", 503, errors.Unavailable),
        ("NODE_TIMEOUT", 504, errors.Unavailable),
        ("QUOTA_SPENT", 402, errors.LucidApiError),
        ("GONE_FISHING", 409, errors.Conflict),
    ],
)
def test_every_code_of_the_contract_has_its_exception(code: str, status: int, kind: type[errors.LucidApiError]) -> None:
    """One that a newer service has is raised by its status, and keeps its code."""
    said = {"code": code, "message": "Do this.", "status": status, "details": {"inFlight": 3, "passportId": "p"}}
    error: Any = refuse(status, said, x_request_id="r-1", retry_after="2")
    assert type(error) is kind
    assert (error.code, error.status, error.message, error.request_id) == (code, status, "Do this.", "r-1")
    assert error.details == {"inFlight": 3, "passportId": "p"}
    assert error.retry_after_seconds == 2.0
    assert pickle.loads(pickle.dumps(error)).__dict__ == error.__dict__  # noqa: S301 - our own bytes


def test_a_refusal_can_not_write_to_a_terminal() -> None:
    """Control characters are blanks, and no sentence is endless."""
    error = refuse(409, {"code": "A\x1b[31m", "message": "x\x1b]0;evil\x07\r\ny" + "z" * 9999, "details": []})
    assert not [character for character in str(error) if ord(character) < 32]
    assert len(str(error)) < 2200
    assert error.details == {}


@pytest.mark.parametrize("error", [None, "text", [], {}, {"code": 7}, {"message": "no code"}])
def test_a_refusal_in_another_shape_is_not_the_services(error: Any) -> None:
    """It is told as what it is."""
    assert isinstance(refuse(418, error), errors.UnexpectedAnswer)


def test_nothing_is_read_from_an_answer_that_has_none() -> None:
    """204, whatever comes with it."""
    assert read(key_calls.revoke("k"), b"", 204) is None
