"""What the command line says of a model that can't be had, and of nodes that have left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from lucid_compute.cli.model_commands import explanation, match_parts
from lucid_compute.gateway.shapes import MatchAnswer, RejectedNode
from lucid_compute.registry.domain.passports import PassportStatus, PassportType
from lucid_compute.registry.shapes import ModelAvailability, ModelView, NodeEligibility, ReasonView
from tests.factories import NOW

LEFT = ReasonView(code="DEREGISTERED", message="The node was deregistered.", wanted="registered", found="deregistered")
STALE = ReasonView(code="HEARTBEAT_STALE", message="Its last heartbeat is old.", wanted="fresh", found="old")
MODEL = ModelView(
    id="m", type=PassportType.MODEL, name="phi", description=None, version=None, tags=[], owner="o", metadata={},
    status=PassportStatus.ACTIVE, created_at=NOW, updated_at=NOW, available=False, served=False,
)  # fmt: skip


def written(*parts: RenderableType) -> str:
    """The parts, as they are printed."""
    file = io.StringIO()
    Console(file=file, width=200).print(*parts)
    return file.getvalue()


@pytest.mark.parametrize(
    ("nodes", "summary", "is_nobody_there"),
    [
        ([], {}, True),
        ([[LEFT]], {"DEREGISTERED": 1}, True),
        ([], {"DEREGISTERED": 2}, True),
        ([[LEFT, STALE]], {"DEREGISTERED": 1, "HEARTBEAT_STALE": 1}, True),
        ([[LEFT, STALE]], {"DEREGISTERED": 1, "HEARTBEAT_STALE": 2}, False),
        ([[LEFT]], {"DEREGISTERED": 1, "HEARTBEAT_STALE": 1}, False),
        ([[LEFT], [STALE]], {"DEREGISTERED": 1, "HEARTBEAT_STALE": 1}, False),
    ],
)
def test_nobody_is_there_only_where_nobody_stays(
    nodes: list[list[ReasonView]], summary: dict[str, int], is_nobody_there: bool
) -> None:
    """Nodes of others are counted and not listed; they may well stay."""
    listed = [NodeEligibility(passport_id="p", eligible=False, reasons=reasons) for reasons in nodes]
    availability = ModelAvailability(available=False, served=False, checked_at=NOW, nodes=listed, summary=summary)
    assert ("no node is registered" in written(*explanation(MODEL, availability))) is is_nobody_there


def test_match_names_a_node_that_has_left_once_and_advises_nothing_about_it() -> None:
    """Beside one that stays, whose reason is told and can be mended."""
    rejected = [
        RejectedNode(passport_id=name, name=name, reasons=reasons)
        for name, reasons in (("stays", [STALE]), ("gone", [LEFT, STALE]))
    ]
    counts = {"DEREGISTERED": 1, "HEARTBEAT_STALE": 2}
    answer = MatchAnswer(
        model="phi", model_passport_id="m", chosen=None, shortlist=[], rejected=rejected, rejections=counts
    )
    said = written(*match_parts(answer))
    assert said.count("gone") == 1
    assert "Deregistered or revoked, nothing to do: gone." in said
    assert "Register the node" not in said
    assert said.count(STALE.message) == 1
