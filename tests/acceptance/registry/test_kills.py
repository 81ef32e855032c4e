"""Whatever is killed, and whenever: no acknowledged heartbeat is lost, and the service comes back by itself."""

from __future__ import annotations

from tests.kill_harness import torment
from tests.lucid_serve import serving

SLACK = 3  # the goals are for a machine that does nothing else
APP_SECONDS = 3.0 * SLACK
POSTGRES_SECONDS = 2.0 * SLACK


async def test_no_acknowledged_heartbeat_is_lost_to_a_kill() -> None:
    """Clients see 200, 503 with Retry-After and broken connections alone; the long run is by hand, `kill_harness`."""
    with serving(HEARTBEAT_MAX_PER_SECOND="0") as served:
        figures = await torment(served, app_kills=4, postgres_kills=2, worker_kills=2)
    said = "\n".join(figures.lines())
    assert figures.lost == 0, said
    assert figures.forbidden == [], said
    assert figures.acknowledged > 500, said
    assert figures.checked == 24 * 9, said
    assert max(figures.recoveries["app"] + figures.recoveries["worker"]) <= APP_SECONDS, said
    assert max(figures.recoveries["postgres"]) <= POSTGRES_SECONDS, said
