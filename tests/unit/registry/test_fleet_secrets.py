"""Secrets in the fleet: only the newest, and none after the node or the model has ended."""

from __future__ import annotations

from dataclasses import replace

from lucid_compute.registry.domain.passports import PassportStatus, PassportType
from lucid_compute.registry.fleet.fleet import Credentials, Fleet
from tests.factories import NOW, compute_passport, passport

KEY = {"inferenceKey": "told-to-nobody"}


def test_an_older_sight_of_secrets_is_left_out_also_after_their_removal() -> None:
    """The feed may apply a row from before a change that this replica made itself."""
    secrets = Credentials()
    assert secrets.of("node") == {}
    secrets.apply("node", 3, {"inferenceKey": "new"})
    secrets.apply("node", 2, {"inferenceKey": "old"})
    assert secrets.of("node") == {"inferenceKey": "new"}
    secrets.apply("node", 4, {})
    secrets.apply("node", 3, {"inferenceKey": "new"})
    assert secrets.of("node") == {}
    secrets.apply("node", 5, {"inferenceKey": "newer"})
    assert secrets.of("node") == {"inferenceKey": "newer"}


def test_their_repr_tells_how_many_and_no_secret() -> None:
    """It may appear in a log."""
    secrets = Credentials()
    secrets.apply("node", 1, KEY)
    assert repr(secrets) == "Credentials(of 1 passports)"


def test_they_go_with_the_node_or_the_model() -> None:
    """Because it was forgotten, was not in a load, or has ended."""
    fleet = Fleet()
    node, lost, ended = (compute_passport() for _ in range(3))
    model = passport(PassportType.MODEL, {"format": "api"})
    for record in (node, lost, ended, model):
        fleet.apply_passport(record)
        fleet.secrets.apply(record.id, record.revision, KEY)
    fleet.forget_node(fleet.get_node(node.id, owner=None))
    fleet.begin_load()
    fleet.end_load({ended.id, model.id})
    fleet.apply_passport(replace(ended, deregistered_at=NOW, revision=ended.revision + 1))
    assert [bool(fleet.secrets.of(record.id)) for record in (node, lost, ended, model)] == [False, False, False, True]
    fleet.apply_passport(replace(model, status=PassportStatus.REVOKED, revision=model.revision + 1))
    assert fleet.secrets.of(model.id) == {}
