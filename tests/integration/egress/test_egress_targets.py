"""The head of a request to a node: what the service says, and nothing that a stored key could add to it."""

from __future__ import annotations

import pytest

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.upstreams import Target, Upstreams
from lucid_compute.registry.fleet.fleet import Fleet
from tests.egress import LOOPBACK, Outcome, ask, on_both_loops, open_client
from tests.factories import compute_passport
from tests.fault_answers import OK_BODY
from tests.fault_node import FaultNode


@pytest.mark.parametrize("bearer", ["a\r\nX-Evil: b", "a\nb", "a\rb", "a\0b", "a\x7f", "schlüssel", "a\u2028b", "a\tb"])
def test_a_key_that_would_add_to_the_head_of_a_request_is_refused(bearer: str) -> None:
    fleet = Fleet()
    record = compute_passport()
    fleet.apply_passport(record)
    fleet.secrets.apply(record.id, 1, {"inferenceKey": bearer})
    node = fleet.find_node(record.id)
    assert node is not None
    with pytest.raises(EgressFault, match="no header may hold") as refused:
        Upstreams(fleet, EgressPolicy(), "replica").of_node(node)
    assert refused.value.kind is FaultKind.ADDRESS_REFUSED
    assert bearer not in refused.value.message


def test_a_target_is_kept_until_its_passport_or_its_key_changes() -> None:
    """And no longer than its node. A key that was rotated or removed is sent no more."""
    fleet, record = Fleet(), compute_passport()
    upstreams = Upstreams(fleet, EgressPolicy(), "replica")
    fleet.apply_passport(record)

    def target() -> Target:
        node = fleet.find_node(record.id)
        assert node is not None
        return upstreams.of_node(node)

    first = target()
    assert target() is first
    assert first.bearer is None
    for revision, secrets in enumerate(({"inferenceKey": "one"}, {"inferenceKey": "two"}, {}), start=1):
        fleet.secrets.apply(record.id, revision, secrets)
        assert target().bearer == secrets.get("inferenceKey")
    moved = compute_passport({"inferenceUrl": "http://elsewhere:8080"}, id=record.id, revision=record.revision + 1)
    fleet.apply_passport(moved)
    assert target().url.host == "elsewhere"
    upstreams.forget_ended()
    assert upstreams._cached
    node = fleet.find_node(record.id)
    assert node is not None
    fleet.forget_node(node)
    upstreams.forget_ended()
    assert not upstreams._cached


def test_the_key_in_a_further_header_is_sent_only_if_there_is_one() -> None:
    """Anthropic's API wants it in a header of its own, too."""
    fleet, endpoint = Fleet(), ENDPOINTS["messages"]
    for number, secrets in enumerate(({}, {"inferenceKey": "secret"})):
        record = compute_passport(name=f"node {number}")
        fleet.apply_passport(record)
        fleet.secrets.apply(record.id, 1, secrets)
        node = fleet.find_node(record.id)
        assert node is not None
        head = Upstreams(fleet, EgressPolicy(), "replica").of_node(node).head(endpoint, "job")
        assert head.count(b"x-api-key: secret\r\n") == head.count(b"x-api-key") == number
        assert b"anthropic-version: 2023-06-01\r\n" in head


@on_both_loops
async def test_a_request_has_the_headers_of_the_service_and_no_others() -> None:
    fleet = Fleet()
    async with FaultNode() as server, open_client() as client:
        record = compute_passport({"inferenceUrl": f"{server.url}/llama/v1"})
        fleet.apply_passport(record)
        fleet.secrets.apply(record.id, 1, {"inferenceKey": "secret key"})
        node = fleet.find_node(record.id)
        assert node is not None
        target = Upstreams(fleet, LOOPBACK, "replica").of_node(node)
        assert await ask(client, target.url, head=target.head(ENDPOINTS["chat/completions"], "job")) == Outcome(
            200, OK_BODY
        )
        assert server.requests[0].path == "/llama/v1/chat/completions"
        assert server.requests[0].headers == {
            "host": f"127.0.0.1:{server.port}",
            "content-type": "application/json",
            "accept": "application/json, text/event-stream",
            "accept-encoding": "identity",
            "user-agent": "lucid-compute",
            "x-lucid-replica": "replica",
            "authorization": "Bearer secret key",
            "x-request-id": "job",
            "content-length": "2",
        }
