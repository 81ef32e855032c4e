"""`lucid passports` and `lucid keys` beside a real service."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest

from tests.command_line import CommandLine
from tests.gateway import Gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")
NODE = {"gpu": "NVIDIA A100", "vram": "80GB", "inferenceUrl": "http://gpu.example.com:8000"}


async def test_a_passport_lives_from_its_creation_to_its_revocation(lucid: CommandLine) -> None:
    """Named by its name all the way; a merge leaves what is not named."""
    name = uuid4().hex
    metadata = json.dumps(NODE)
    made = (await lucid("passports", "create", name, "--metadata", metadata, "--tag", "a", "--tag", "b", "--json")).json
    assert (made["type"], made["metadata"]["gpu"], made["tags"]) == ("compute", "NVIDIA A100", ["a", "b"])
    changed = await lucid("passports", "update", name, "--set", "region=eu", "--set", "gpu=null", "--json")
    assert changed.json["metadata"] == {
        "vram": "80GB", "vramGb": 80, "inferenceUrl": NODE["inferenceUrl"], "region": "eu"
    }  # fmt: skip
    shown = await lucid("passports", "show", name)
    assert f"name            {name}\n" in shown.out
    assert "  region        eu\n" in shown.out
    listed = (await lucid("passports", "--search", name, "--type", "compute", "--json")).json["passports"]
    assert [passport["id"] for passport in listed] == [made["id"]]
    assert (await lucid("passports", "revoke", name)).status == 2
    assert (await lucid("passports", "revoke", name, "--yes")).out == f"{name} is revoked.\n"
    assert (await lucid("passports", "show", name, "--json")).json["status"] == "revoked"


async def test_metadata_comes_from_the_line_a_file_or_stdin(lucid: CommandLine) -> None:
    """Single keys go on top, as JSON where it reads so, and lead inside by dots."""
    (lucid.folder / "node.json").write_text(json.dumps(NODE))
    from_file = await lucid("passports", "create", uuid4().hex, "--metadata", "node.json", "--json")
    assert from_file.json["metadata"]["vramGb"] == 80
    piped = await lucid("passports", "create", uuid4().hex, "--metadata", "-", "--json", stdin=json.dumps(NODE))
    assert piped.json["metadata"] == from_file.json["metadata"]
    options = [f"--set={setting}" for setting in ("format=gguf", "minVramGb.q4=12.5", 'aliases=["x=y"]', "note=true=1")]
    options[2] = f'--set=aliases=["{uuid4().hex}=y"]'
    model = await lucid("passports", "create", uuid4().hex, "--type", "model", *options, "--json")
    metadata = model.json["metadata"]
    assert (metadata["minVramGb"], metadata["note"]) == ({"q4": 12.5}, "true=1")
    assert metadata["aliases"][0].endswith("=y")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--metadata", '{"vram":'), "--metadata is no JSON"),
        (("--metadata", "[1]"), "No such file"),
        (("--metadata", "nowhere.json"), "nowhere.json: No such file or directory"),
        (("--metadata", "-"), "stdin is no JSON"),
        (("--metadata", "{}", "--set", "novalue"), "write KEY=VALUE"),
        (("--metadata", '{"a": 1}', "--set", "a.b=1"), "a is not an object"),
        (("--type", "gpu"), "--type"),
    ],
)
async def test_metadata_that_cannot_be_read_is_status_2(
    options: tuple[str, ...], said: str, lucid: CommandLine
) -> None:
    """In a sentence that says where it is."""
    ended = await lucid("passports", "create", "never-made", *options)
    assert ended.status == 2
    assert said in ended.sentence


async def test_what_the_service_refuses_is_status_1_in_its_words(lucid: CommandLine) -> None:
    """A fault of a field, and a name that is taken."""
    all_faulty = await lucid("passports", "create", uuid4().hex, "--set", "vram=lots")
    assert all(f"metadata.{field}: " in all_faulty.sentence for field in ("vram", "inferenceUrl"))
    assert "details.fields" not in all_faulty.sentence
    faulty = await lucid("passports", "create", uuid4().hex, "--set", "vram=80GB")
    assert faulty.status == 1
    assert "inferenceUrl" in faulty.sentence
    name = uuid4().hex
    metadata = json.dumps(NODE)
    assert (await lucid("passports", "create", name, "--metadata", metadata)).status == 0
    taken = await lucid("passports", "create", name, "--metadata", metadata)
    assert taken.status == 1
    assert name in taken.sentence


async def test_stdout_of_a_new_key_is_the_key_alone(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """So that a script can take it; the sentence that it is shown this once goes to stderr."""
    name = uuid4().hex
    made = await lucid("keys", "create", name, "--owner", "acme", "--scope", "compute", "--scope", "passports:read")
    assert made.status == 0
    secret = made.out.removesuffix("\n")
    assert secret.startswith("lk_live_")
    assert "only time" in made.err
    assert (await lucid("nodes", "--key", secret)).status == 0
    listed = await lucid("keys", "--owner", "acme", "--json")
    key = next(key for key in listed.json["keys"] if key["name"] == name)
    assert "key" not in key
    assert name in (await lucid("keys")).out
    assert secret not in (await lucid("keys")).out + listed.out


async def test_a_key_is_bound_limited_rotated_and_revoked(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """By its name; with --now the former secret ends at once."""
    node, name = await cli_fleet.add_node(NODE["inferenceUrl"]), uuid4().hex
    owner = (await cli_fleet.admin.get(f"/passports/{node}")).json()["owner"]
    limits = ("--requests-per-minute", "500", "--tokens-per-minute", "7", "--expires", "7d")
    bound = ("--owner", owner, "--scope", "compute", "--node", node)
    made = (await lucid("keys", "create", name, *bound, *limits, "--json")).json
    assert made["passportId"] == node
    set_ = {limit: value for limit, value in made["limits"].items() if value is not None}
    assert set_ == {"requestsPerMinute": 500, "tokensPerMinute": 7}
    assert made["expiresAt"] is not None
    rotated = (await lucid("keys", "rotate", name, "--now", "--json")).json
    assert rotated["id"] == made["id"]
    assert (await lucid("nodes", "--key", made["key"])).status == 4
    assert (await lucid("nodes", "--key", rotated["key"])).status == 0
    assert (await lucid("keys", "revoke", name)).status == 2
    assert (await lucid("keys", "revoke", name, "--yes", "--json")).json == {"id": made["id"], "revoked": True}
    assert (await lucid("nodes", "--key", rotated["key"])).status == 4
    assert (await lucid("keys", "revoke", name, "--yes")).status == 5


async def test_a_key_that_cannot_be_made_says_why(lucid: CommandLine) -> None:
    """Two keys of one name are told apart by their ids."""
    assert "--scope" in (await lucid("keys", "create", "x", "--owner", "a")).sentence
    name = uuid4().hex
    for _ in range(2):
        assert (await lucid("keys", "create", name, "--owner", "a", "--scope", "compute")).status == 0
    ended = await lucid("keys", "rotate", name)
    assert ended.status == 2
    assert f"2 keys have the name '{name}'" in ended.sentence
