"""Metadata is at most 32 KiB as JSON and eight levels deep, and costs little memory in the fleet."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lucid_compute.registry.domain.metadata import MAX_BYTES
from lucid_compute.registry.domain.packed_metadata import PackedMetadata
from lucid_compute.registry.domain.passports import ComputePassport
from tests.api import Api, error_code
from tests.factories import compute_passport
from tests.other_replicas import run_sql

GPU = {"vram": "80GB", "inferenceUrl": "http://gpu:8080/v1"}
TYPES = {"compute": GPU, "model": {"format": "api"}, "agent": {}}


def size_of(metadata: dict[str, Any]) -> int:
    """Return the bytes of metadata as JSON without spaces."""
    return len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode())


def of_size(basis: dict[str, Any], size: int, letter: str = "x") -> dict[str, Any]:
    """Return metadata with an unknown key, of exactly that many bytes; the rest is filled up with one-byte letters."""
    rest = size - size_of({**basis, "note": ""})
    wide = letter * (rest // len(letter.encode()))
    return {**basis, "note": wide + "x" * (rest - len(wide.encode()))}


def nested(levels: int, inner: Any = 1) -> Any:
    """Return containers in containers, lists and objects by turns; the innermost holds a number."""
    for level in range(levels):
        inner = [inner] if level % 2 else {"k": inner}
    return inner


async def register(api: Api, kind: str, metadata: dict[str, Any], name: str = "x") -> Any:
    """Register a passport; return the raw response."""
    return await api.http.post("/passports", json={"name": name, "type": kind, "metadata": metadata})


def check_refused(answer: Any, *words: str, path: str = "metadata") -> None:
    """Check that the response blames the place, in a sentence with these words, and is short."""
    assert (answer.status_code, error_code(answer)) == (422, "INVALID_REQUEST"), answer.text[:300]
    (fault,) = answer.json()["error"]["details"]["fields"]
    assert fault["path"] == path
    assert all(word in fault["message"] for word in words), fault
    assert len(answer.content) < 1000


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("letter", ["x", "é", "💻"])
async def test_metadata_of_32_kib_is_taken_and_one_byte_more_is_not(api: Api, kind: str, letter: str) -> None:
    full = of_size(TYPES[kind], MAX_BYTES, letter)
    made = await register(api, kind, full)
    assert made.status_code == 201, made.text[:300]
    assert made.json()["metadata"]["note"] == full["note"]
    check_refused(await register(api, kind, of_size(TYPES[kind], MAX_BYTES + 1, letter), "y"), "32,769", "32,768")


@pytest.mark.parametrize("filling", [[[]] * 340_000, [{}] * 300_000, {str(n): 0 for n in range(90_000)}])
async def test_a_megabyte_of_small_things_is_refused(api: Api, filling: Any) -> None:
    """With that size no body of the API has so many values; they are not even read."""
    check_refused(await register(api, "agent", {"x": filling}), "20000", path="")


@pytest.mark.parametrize("filling", [[[]] * 19_000, [{}] * 19_000, {str(n): 0 for n in range(4_900)}])
async def test_as_many_small_things_as_a_body_may_have_are_refused(api: Api, filling: Any) -> None:
    check_refused(await register(api, "agent", {"x": filling}), "32,768")


@pytest.mark.parametrize("kind", TYPES)
async def test_eight_levels_are_taken_and_nine_are_not(api: Api, kind: str) -> None:
    """The object that metadata is counts as the first."""
    assert (await register(api, kind, {**TYPES[kind], "x": nested(7)})).status_code == 201
    for deep in (nested(8), nested(7, [])):
        check_refused(await register(api, kind, {**TYPES[kind], "x": deep}, "y"), "8 levels")


async def test_what_a_patch_results_in_is_bounded_too(api: Api) -> None:
    """Two halves, each of which is small enough; and a level more than there was."""
    made = (await register(api, "compute", of_size(GPU, MAX_BYTES // 2))).json()
    path = f"/passports/{made['id']}"
    check_refused(await api.http.patch(path, json={"metadata": {"more": "x" * (MAX_BYTES // 2)}}), "32,768")
    check_refused(await api.http.patch(path, json={"metadata": {"x": nested(8)}}), "8 levels")
    assert (await api.http.get(path)).json() == made
    smaller = await api.http.patch(path, json={"metadata": {"note": "short", "more": "x" * (MAX_BYTES // 2)}})
    assert smaller.status_code == 200


async def test_the_nodes_own_key_counts_and_what_is_read_only_does_not(api: Api) -> None:
    full = of_size(GPU, MAX_BYTES)
    check_refused(await register(api, "compute", {**full, "inferenceKey": "k"}), "32,768")
    made = (await register(api, "compute", full)).json()
    again = await api.http.patch(f"/passports/{made['id']}", json={"metadata": made["metadata"]})
    assert again.status_code == 200  # with the vramGb that the response contained


async def test_larger_metadata_of_an_older_version_stays_readable(api: Api) -> None:
    """It is changed only to what is allowed now; whatever else the passport has can be changed."""
    node = await api.register()
    large = of_size(GPU, MAX_BYTES * 4)
    await run_sql(api, "UPDATE passports SET metadata = $2::jsonb WHERE id = $1", node, json.dumps(large))
    path = f"/passports/{node}"
    renamed = await api.http.patch(path, json={"name": "renamed"})
    assert (renamed.status_code, renamed.json()["metadata"]["note"]) == (200, large["note"])
    check_refused(await api.http.patch(path, json={"metadata": {"region": "eu"}}), "32,768")
    shrunk = await api.http.patch(path, json={"metadata": {"note": None, "region": "eu"}})
    assert shrunk.json()["metadata"] == {**GPU, "region": "eu", "vramGb": 80}


async def test_the_fleet_shows_unknown_keys_as_they_were_sent(api: Api) -> None:
    metadata: dict[str, Any] = {**GPU, "x": [1, 2.5, None, True, {"é": []}], "region": "eu"}
    made = await register(api, "compute", metadata)
    (node,) = (await api.http.get("/compute")).json()["nodes"]
    assert node["metadata"] == made.json()["metadata"] == {**metadata, "vramGb": 80}


def test_the_fleet_holds_text_and_no_objects() -> None:
    """Ten thousand empty lists take a few bytes each, and read as they were written."""
    metadata = {**GPU, "runtimes": [], "x": [[]] * 10_000}
    passport = ComputePassport.read(compute_passport(metadata))
    kept = passport.record.metadata
    assert isinstance(kept, PackedMetadata)
    assert kept._text.count(b"[]") == 10_001
    assert set(kept._often) == {"inferenceUrl"}
    assert kept == metadata
    assert (len(kept), kept["inferenceUrl"], kept.get("vram"), kept.get("none")) == (
        4,
        GPU["inferenceUrl"],
        "80GB",
        None,
    )
