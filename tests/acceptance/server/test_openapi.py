"""The OpenAPI document is true: schemathesis drives a live service by it, with every check it has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import Served, serving

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
TIMEOUT_SECONDS = 900  # it takes twenty seconds alone, and much longer beside other work

# What is left out, and why:
# - NUL in generated text: the guard refuses it by design, whatever a schema says of the text around it; the document
#   says so of most fields by a pattern, which query parameters and free metadata do not have.
# - A passport that was deleted is revoked and stays readable, as the contract says: no use after it was freed.
# - 410 counts as a good answer to good data, as 404 and 409 do: an ended node answers it to whatever is sent.
# - Good data may be refused where its goodness depends on what is there, which a schema can't say: a key bound to a
#   node of another owner or already expired, provider URLs that the egress policy denies, metadata of another type
#   than the passport's, a patch of what is fixed, a model declared twice, a price with more digits than JSON's
#   numbers keep exactly, a span of time with too many steps, with none or beyond the calendar, a request for a
#   WebSocket that is none.
ALL_CHECKS = """
continue-on-failure = true
request-timeout = 20.0
[auth.openapi.HTTPBearer]
bearer = "${ADMIN_KEY}"
[generation]
deterministic = true
database = "none"
no-shrink = true
max-examples = 30
allow-x00 = false
[phases.stateful]
max-steps = 8
[checks]
use_after_free.enabled = false
positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "410", "429"]
[[operations]]
include-name = ["POST /keys", "PATCH /keys/{key_id}", "POST /passports", "POST /passports:batchCreate",
    "POST /webhooks", "PATCH /passports/{passport_id}",
    "PUT /compute/models/{passport_id}", "GET /compute/metrics", "GET /compute/metrics/{passport_id}",
    "GET /payouts", "GET /payouts/losses", "GET /usage", "POST /payouts/periods",
    "POST /match", "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings", "POST /v1/responses",
    "POST /v1/messages", "POST /v1/messages/count_tokens", "POST /v1/rerank", "POST /v2/rerank", "POST /v1/score",
    "POST /tokenize", "POST /detokenize", "POST /v1/audio/speech", "POST /v1/images/generations",
    "POST /v1/audio/transcriptions", "POST /v1/audio/translations"]
checks.positive_data_acceptance.enabled = false
"""

# Two owners who must never see each other's nodes. Their keys can make compute passports alone: models are public.
TWO_OWNERS = """
continue-on-failure = true
request-timeout = 20.0
[auth.wfc]
path = "owners.json"
peers = ["acme", "globex"]
[generation]
deterministic = true
database = "none"
no-shrink = true
max-examples = 20
allow-x00 = false
"""


def run_schemathesis(served: Served, folder: Path, config: str, *options: str) -> str:
    """Drive the service by its document; return what schemathesis says, which has to be that all is well."""
    (folder / "schemathesis.toml").write_text(config)
    finished = subprocess.run(
        [SCHEMATHESIS, "--no-color", "run", f"{served.url}/openapi.json", *options],
        cwd=folder,
        env={"ADMIN_KEY": served.admin_key, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}\n{served.log}"
    return finished.stdout


@pytest.mark.longest
def test_the_service_does_what_its_document_says(database_url: str, tmp_path: Path) -> None:
    """All checks of all phases, on every operation, with an admin's key: no failure, and no server error."""
    with serving(database_url, HEARTBEAT_MAX_PER_SECOND="0") as served:
        document = httpx.get(f"{served.url}/openapi.json", trust_env=False).json()
        said = run_schemathesis(served, tmp_path, ALL_CHECKS)
        assert "failed" not in served.log, served.log
    operations = sum(len(path) for path in document["paths"].values())
    assert f"Tested: {operations}\n" in said, said
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in said, said
    counts = re.search(r"(\d+) generated, (\d+) passed", said)
    assert counts, said
    assert counts[1] == counts[2]
    assert int(counts[1]) > 1500, said


async def test_no_owner_reads_what_is_anothers(database_url: str, tmp_path: Path) -> None:
    """Whatever one owner makes is asked for with the other's key too, and is never found."""
    with serving(database_url, HEARTBEAT_MAX_PER_SECOND="0") as served:
        async with served.client() as admin:
            keys = {}
            for owner in ("acme", "globex"):
                body = {"name": owner, "owner": owner, "scopes": ["compute"]}
                keys[owner] = (await admin.post("/keys", json=body)).json()["key"]
        (tmp_path / "owners.json").write_text(json.dumps({"auth": [_identity(*pair) for pair in keys.items()]}))
        checks = "object_level_authorization,not_a_server_error"
        said = run_schemathesis(served, tmp_path, TWO_OWNERS, "--checks", checks, "--phases", "examples,stateful")
        assert "will not run" not in said
        async with served.client() as admin:
            total = (await admin.get("/passports?type=compute")).json()["pagination"]["total"]
    assert total > 0, said  # else there was nothing to keep apart


async def test_the_document_shows_the_guides_own_requests(database_url: str) -> None:
    """Who reads the document finds the guides' examples in it, and can paste them."""
    with serving(database_url) as served:
        async with served.client() as client:
            document = (await client.get("/openapi.json")).json()
            schemas = document["components"]["schemas"]
            (registration,) = schemas["PassportCreate"]["examples"]
            assert registration == GUIDE_PASSPORT
            made = (await client.post("/passports", json=registration)).json()
            operation = document["paths"]["/compute/heartbeat"]["post"]
            beat = operation["requestBody"]["content"]["application/json"]["examples"]["guide"]["value"]
            answer = await client.post("/compute/heartbeat", json={**beat, "passportId": made["id"]})
            assert answer.status_code == 200
            (declaration,) = schemas["DeclareModels"]["examples"]
            answer = await client.put(f"/compute/models/{made['id']}", json=declaration)
            assert answer.status_code == 200


def _identity(name: str, key: str) -> dict[str, object]:
    """Return one user in the form of Web Fuzzing Commons."""
    return {"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key}"}]}
