"""The providers' guide over the application's routes."""

from __future__ import annotations

from tests.api import Api
from tests.factories import GUIDE_PASSPORT


async def test_the_guides_registration_works_to_the_letter(api: Api) -> None:
    """The body of the guide makes a node, whose VRAM is answered as written and parsed."""
    answer = await api.http.post("/passports", json=GUIDE_PASSPORT)
    assert answer.status_code == 201
    made = answer.json()
    assert answer.headers["location"] == f"/passports/{made['id']}"
    assert made["metadata"] == {**GUIDE_PASSPORT["metadata"], "vramGb": 80}
    assert made["status"] == "active"
    health = await api.health(made["id"])
    assert health["status"] == "unhealthy"
    assert [reason["code"] for reason in health["reasons"]] == ["HEARTBEAT_MISSING"]
