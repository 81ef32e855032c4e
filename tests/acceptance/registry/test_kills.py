"""Whatever is killed, and whenever: no acknowledged heartbeat is lost, and the service comes back by itself."""

from __future__ import annotations

from tests.kill_harness import torment
from tests.lucid_serve import serving


async def test_no_acknowledged_heartbeat_is_lost_to_a_kill() -> None:
    """Clients see 200, 503 with Retry-After and broken connections alone; the long run is by hand, `kill_harness`."""
    with serving(HEARTBEAT_MAX_PER_SECOND="0") as served:
        figures = await torment(served, app_kills=4, postgres_kills=2, worker_kills=2)
    said = "\n".join(figures.lines())
    assert figures.lost == 0, said
    assert figures.forbidden == [], said
    assert figures.acknowledged > 500, said
    assert figures.checked == 24 * 9, said
    assert {kind: len(each) for kind, each in figures.recoveries.items()} == {"app": 4, "worker": 2, "postgres": 2}, (
        said
    )
