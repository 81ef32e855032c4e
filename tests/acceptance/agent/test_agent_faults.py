"""What an agent outlives, what ends it, and with which status."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import httpx
import pytest

from tests.agents import BEATS_SECONDS, NOBODY_LISTENS, agent, make_key, open_registry
from tests.fault_answers import respond
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.llama import llama_server, said
from tests.llama import running as llama_running
from tests.lucid_serve import LUCID, Served, eventually, folder, serving
from tests.recorded_servers import NOTHING_THERE, answers_of, recorded_server


async def test_an_agent_outlives_the_registry_until_its_node_is_deregistered(tmp_path: Path) -> None:
    """A kill -9 of the service costs nothing but time; a deregistration by somebody else is a wish, and ends it."""
    with folder() as made, llama_server(tmp_path) as llama, Served(made) as served:
        port = served.url.rsplit(":", 1)[1]
        served.stop()
        again = Served(made, PORT=port)
        with again:
            async with open_registry(again) as registry:
                with agent(tmp_path, registry.served.url, registry.key, llama.url) as running:
                    await asyncio.to_thread(running.says_in_time, "declared")
                    node = (await registry.node())["id"]
                    registry.served.kill()
                    await asyncio.to_thread(running.says_in_time, "trying again")
                    registry.served.start()
                    await asyncio.to_thread(registry.served.wait_until_ready)
                    await asyncio.to_thread(running.says_in_time, "takes this node's heartbeats again", 60.0)
                    assert (await registry.node())["id"] == node
                    assert (await registry.admin.post(f"/compute/deregister/{node}")).status_code == 200
                    assert await asyncio.to_thread(running.ends) == 10
                    assert "deregistered, for good" in running.log
                    assert "Traceback" not in running.log


def test_the_registry_is_no_inference_server(small_registry: tuple[str, str], tmp_path: Path) -> None:
    """Beside `make run` both would be looked for on port 8000."""
    url, key = small_registry
    with agent(tmp_path, url, key, url) as running:
        assert running.ends() == 2
        assert "registry's own address" in running.log


def test_beside_lucid_serve_an_agent_needs_no_key(tmp_path: Path) -> None:
    """As every other command; the key is found in the data folder, over loopback alone."""
    with folder() as made, Served(made) as served:
        command = [str(LUCID), "agent", "run", "--url", NOBODY_LISTENS, "--api", served.url, "--vram", "2GB"]
        with llama_running(tmp_path / "output", command, LUCID_DATA_DIR=str(served.data_dir)) as process:
            said(tmp_path / "output", process, "(not registered yet)")


@pytest.mark.parametrize(
    ("options", "key", "ends"),
    [
        ((), "lk_live_wrong", (4, "UNAUTHORIZED")),
        (("--public-url", "http://10.0.0.1:8000"), None, (2, "INVALID_REQUEST")),
        (("--passport-id", "1b4e28ba-2fa1-11d2-883f-0016d3cca427"), None, (5, "PASSPORT_NOT_FOUND")),
        (("--vram", "much"), None, (2, "--vram: Send the memory")),
        (("--api", "http://lucid.example"), None, (2, "--public-url")),
    ],
)
async def test_what_waiting_does_not_mend_ends_the_agent_at_its_start(
    small_registry: tuple[str, str], tmp_path: Path, options: tuple[str, ...], key: str | None, ends: tuple[int, str]
) -> None:
    """One sentence, and a status that says what kind of thing is wrong."""
    url, good_key = small_registry
    status, words = ends
    async with recorded_server("llama.cpp") as (node, _):
        with agent(tmp_path, url, key or good_key, node.url, *options) as running:
            assert await asyncio.to_thread(running.ends) == status, running.log
    assert words in running.log
    assert "Traceback" not in running.log


async def test_a_second_agent_of_the_same_name_takes_the_node_over(
    small_registry: tuple[str, str], tmp_path: Path
) -> None:
    """Both are told: the first ends rather than beat in vain, and the second says that there was another."""
    url, key = small_registry
    async with recorded_server("llama.cpp") as (node, _):
        with agent(tmp_path, url, key, node.url) as first:
            await asyncio.to_thread(first.says_in_time, "healthy, first heartbeat accepted")
            with agent(tmp_path, url, key, node.url) as second:
                assert await asyncio.to_thread(first.ends) == 11, first.log
                assert "give each its own --name" in first.log
                assert second.process.poll() is None
                await asyncio.to_thread(second.says_in_time, "give each machine its own --name")


async def test_an_agent_registers_no_node_before_its_server_answers(
    small_registry: tuple[str, str], tmp_path: Path
) -> None:
    """It waits and says so, once; the server is then registered as what it is, and the log says that all is well."""
    url, key = small_registry
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}) as provider:

        async def nodes() -> list[str]:
            listed = (await provider.get("/compute?search=late")).json()["nodes"]
            return [entry["health"]["status"] for entry in listed]

        async with FaultNode(NOTHING_THERE) as node:
            with agent(tmp_path, url, key, node.url, "--name", "late") as running:
                await asyncio.to_thread(running.says_in_time, f"no inference server answers at {node.url}")
                assert await nodes() == []
                node.by_path |= answers_of("llama.cpp")
                await asyncio.to_thread(running.says_in_time, "healthy, first heartbeat accepted")
                assert await nodes() == ["healthy"]
                assert running.log.count("not registered yet") == 1
                node.by_path.clear()
                await asyncio.to_thread(running.says_in_time, "unhealthy: this node gets no request")
                assert await asyncio.to_thread(running.stop) == 0
        with agent(tmp_path, url, key, NOBODY_LISTENS, "--name", "late") as again:  # a known node is reported at once
            await asyncio.to_thread(again.says_in_time, "unhealthy, first heartbeat accepted")
            assert await asyncio.to_thread(again.stop) == 0


def test_an_agent_that_waits_for_its_server_stops_when_it_is_told(
    small_registry: tuple[str, str], tmp_path: Path
) -> None:
    """It has registered nothing, so that there is nothing to drain."""
    url, key = small_registry
    with agent(tmp_path, url, key, NOBODY_LISTENS, "--name", "never") as running:
        running.says_in_time("not registered yet")
        assert running.stop() == 0
        assert "drains" not in running.log


async def test_requests_that_do_not_end_are_waited_for_until_the_deadline_or_a_second_signal(
    small_registry: tuple[str, str], tmp_path: Path
) -> None:
    """Two requests run for ever: the time to drain is kept, and nobody who means it has to wait for it."""
    url, key = small_registry
    async with recorded_server("llama.cpp") as (node, _):
        with agent(tmp_path, url, key, node.url, "--drain-seconds", "2") as patient:
            await asyncio.to_thread(patient.says_in_time, "healthy, first heartbeat accepted")
            assert await asyncio.to_thread(patient.stop) == 0
            assert "the time to drain is over; 2 requests may still run" in patient.log
        with agent(tmp_path, url, key, node.url) as hurried:
            await asyncio.to_thread(hurried.says_in_time, "found this machine")
            hurried.process.terminate()
            await asyncio.to_thread(hurried.says_in_time, "the node drains, for 60 s")
            assert await asyncio.to_thread(hurried.stop) == 128 + signal.SIGTERM
            assert "Traceback" not in hurried.log


async def test_one_lost_beat_is_sent_again_and_lost_news_cost_nothing(tmp_path: Path) -> None:
    """The answer of a heartbeat is lost: a second later it is sent again under its number, and counts once."""
    with serving() as served:
        async with (
            served.client() as admin,
            FaultNode(upstream=served.url) as between,
            recorded_server("llama.cpp") as (server, _),
        ):
            key = await make_key(admin)
            cut = Behaviour(cut_head_after=10, ending=Ending.RESET)
            between.by_path["/compute/heartbeat"] = cut
            with agent(tmp_path, between.url, key, server.url) as running:
                await asyncio.to_thread(running.says_in_time, "trying again")
                del between.by_path["/compute/heartbeat"]
                await asyncio.to_thread(running.says_in_time, "takes this node's heartbeats again")
                beats = [json.loads(each.body) for each in between.requests if each.path == "/compute/heartbeat"]
                assert [beat["sequence"] for beat in beats[:2]] == [1, 1]
                assert beats[0] == beats[1]
                (node,) = (await admin.get("/compute")).json()["nodes"]
                assert node["health"]["reported"]["sequence"] == beats[-1]["sequence"]
                assert running.log.count("trying again") == 1


async def test_a_registry_that_forgot_the_node_gets_it_again(tmp_path: Path) -> None:
    """As after a restore from an old backup: the beat is answered 404, and the agent registers anew."""
    with serving() as served:
        async with (
            served.client() as admin,
            FaultNode(upstream=served.url) as between,
            recorded_server("llama.cpp") as (server, _),
        ):
            key = await make_key(admin)
            error = {"code": "NODE_NOT_FOUND", "message": "No node.", "status": 404, "details": {}}
            missing = Behaviour(answer=respond(json.dumps({"error": error}).encode(), status=404))
            between.by_path["/compute/heartbeat"] = missing
            with agent(tmp_path, between.url, key, server.url) as running:
                await asyncio.to_thread(running.says_in_time, "registering it again")
                del between.by_path["/compute/heartbeat"]
                await asyncio.to_thread(running.says_in_time, "found this machine")

                async def beats() -> bool:
                    (node,) = (await admin.get("/compute")).json()["nodes"]
                    return node["health"]["reported"] is not None

                await eventually(beats, BEATS_SECONDS)
