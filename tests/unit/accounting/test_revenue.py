"""Splits add up exactly to the price; every job that was not completed has one cause and one responsible party."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.payouts.revenue import (
    ALL_BPS,
    BilledTotals,
    ResponsibleParty,
    Terms,
    UnfinishedJobs,
    cause_of,
    cause_of_refusal,
    could_be_served,
    estimate,
)
from lucid_compute.egress.faults import FaultKind
from lucid_compute.errors import Shortage
from lucid_compute.web.lanes import CutReason
from tests.ledger import Shares, split

PRICES = st.decimals(0, 10**15, places=15)
TERMS = st.lists(st.integers(0, ALL_BPS), min_size=2, max_size=2).map(
    lambda cuts: Terms(min(cuts), max(cuts) - min(cuts), ALL_BPS - max(cuts))
)


@given(PRICES, TERMS, st.booleans())
def test_a_split_always_adds_up_and_nobody_gets_more_than_its_part(
    price: Decimal, terms: Terms, has_model_owner: bool
) -> None:
    """The provider has the rest, which is less than two of the last decimals above its part."""
    assert terms.are_whole
    shares = split(price, terms, has_model_owner=has_model_owner)
    assert sum(map(Fraction, shares)) == Fraction(price)
    assert min(shares) >= 0
    model_owner_bps = terms.model_owner_bps if has_model_owner else 0
    for share, bps in ((shares.model_owner, model_owner_bps), (shares.protocol, terms.protocol_bps)):
        exact = Fraction(price) * bps / ALL_BPS
        assert 0 <= exact - Fraction(share) < Fraction(1, 10**12)
        assert -int(share.as_tuple().exponent) <= 12


def test_the_default_is_seventy_twenty_ten() -> None:
    assert split(Decimal(1), Terms()) == Shares(Decimal("0.7"), Decimal("0.2"), Decimal("0.1"))
    assert split(Decimal("0.000000000001"), Terms()) == Shares(Decimal("0.000000000001"), Decimal(0), Decimal(0))
    assert split(Decimal(1), Terms(), has_model_owner=False) == Shares(Decimal("0.9"), Decimal(0), Decimal("0.1"))


@pytest.mark.parametrize("terms", [Terms(7000, 2000, 999), Terms(7000, 3001, -1), Terms(0, 0, 0)])
def test_terms_that_are_not_whole_say_so(terms: Terms) -> None:
    assert not terms.are_whole


@given(
    st.sampled_from([Outcome.FAILED, Outcome.REJECTED, Outcome.CANCELLED, Outcome.LOST]),
    st.one_of(st.none(), st.text(), st.sampled_from([*FaultKind, *CutReason, "http_500", "internal"])),
)
def test_whatever_ended_a_job_has_one_cause_and_one_responsible_party(outcome: Outcome, reason: str | None) -> None:
    """Also a reason that only a newer version knows."""
    found = cause_of(outcome, reason)
    assert found.name
    assert found.party in ResponsibleParty


@pytest.mark.parametrize(
    ("outcome", "reason", "cause", "side"),
    [
        (Outcome.FAILED, "http_503", "http_503", ResponsibleParty.PROVIDER),
        (Outcome.FAILED, "first_byte_timeout", "first_byte_timeout", ResponsibleParty.PROVIDER),
        (Outcome.FAILED, "answer_timeout", "answer_timeout", ResponsibleParty.PROVIDER),
        (Outcome.FAILED, "broken_stream", "broken_stream", ResponsibleParty.PROVIDER),
        (Outcome.FAILED, "connect_failed", "connect_failed", ResponsibleParty.PROVIDER),
        (Outcome.FAILED, "connection_lost", "connection_lost", ResponsibleParty.NETWORK),
        (Outcome.FAILED, "internal", "internal", ResponsibleParty.US),
        (Outcome.CANCELLED, "client_left", "client_left", ResponsibleParty.CLIENT),
        (Outcome.CANCELLED, "key_revoked", "key_revoked", ResponsibleParty.CLIENT),
        (Outcome.CANCELLED, "shutdown", "shutdown", ResponsibleParty.US),
        (Outcome.REJECTED, "http_400", "http_400", ResponsibleParty.CLIENT),
        (Outcome.REJECTED, None, "refused", ResponsibleParty.CLIENT),
        (Outcome.REJECTED, "endpoint_not_offered", "endpoint_not_offered", ResponsibleParty.PROVIDER),
        (Outcome.REJECTED, "model_not_offered", "model_not_offered", ResponsibleParty.PROVIDER),
        (Outcome.LOST, None, "replica_lost", ResponsibleParty.US),
    ],
)
def test_causes_are_as_documented(outcome: Outcome, reason: str | None, cause: str, side: ResponsibleParty) -> None:
    assert cause_of(outcome, reason) == (cause, side)


@pytest.mark.parametrize(
    ("side", "causes", "is_in_order"),
    [
        (ResponsibleParty.PROVIDER, ("nodes_busy", "nodes_failing", "no_healthy_node", "no_node"), True),
        (ResponsibleParty.US, ("no_upstream", "overloaded", "database_unavailable", "internal", "shutdown"), True),
        (ResponsibleParty.CLIENT, ("no_node_suits", "rate_limited", "client_left", "key_revoked"), True),
        (
            ResponsibleParty.CLIENT,
            ("invalid_request", "payload_too_large", "method_not_allowed", "model_not_found"),
            False,
        ),
        (ResponsibleParty.CLIENT, ("unauthorized", "forbidden", "body_too_slow"), False),
    ],
)
def test_causes_of_refusals_are_as_documented(
    side: ResponsibleParty, causes: tuple[str, ...], is_in_order: bool
) -> None:
    for cause in causes:
        assert cause_of_refusal(cause) == (cause, side)
        assert could_be_served(cause) is is_in_order


def test_no_shortage_is_left_out() -> None:
    """The client is responsible only for what its request asked for."""
    of_clients = {shortage for shortage in Shortage if cause_of_refusal(shortage).party is ResponsibleParty.CLIENT}
    assert of_clients == {Shortage.NO_NODE_SUITS}


def test_an_estimate_uses_known_tokens_in_and_average_tokens_out_minus_what_was_billed() -> None:
    typical = BilledTotals(jobs=10, tokens_in=1000, tokens_out=3000, gross_usd=Decimal("0.4"))  # 0.0001 a token
    assert estimate(UnfinishedJobs(2, 0, 0, Decimal(0)), typical) == Decimal("0.08")
    assert estimate(UnfinishedJobs(2, 1, 500, Decimal(0)), typical) == Decimal("0.12")
    assert estimate(UnfinishedJobs(2, 1, 500, Decimal("0.02")), typical) == Decimal("0.1")
    assert estimate(UnfinishedJobs(1, 0, 0, Decimal(9)), typical) == 0
    assert estimate(UnfinishedJobs(1, 0, 0, Decimal(0)), None) is None
    assert estimate(UnfinishedJobs(1, 0, 0, Decimal(0)), BilledTotals(1, 0, 0, Decimal(0))) == 0
