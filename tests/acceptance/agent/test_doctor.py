"""The doctor against a real service: everything that can be broken is broken, and it says so, with one fix."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lucid_compute.agent.doctor import heartbeat_checks
from lucid_compute.agent.doctor.check import CheckFinding, CheckVerdict
from lucid_compute.agent.doctor.examination import CHECKS
from lucid_compute.agent.doctor.reach_checks import PROBE_FIXES
from lucid_compute.agent.doctor.reason_fixes import REASON_FIXES
from lucid_compute.gateway.shapes import ProbeCode
from lucid_compute.registry.matching_engine import ReasonCode
from tests.authority import Authority
from tests.doctor_case import Ward, next_host, open_ward, says
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.llama import MODEL, llama_server
from tests.lucid_serve import LUCID, Served, serving_on_a_clone

WARN, FAIL, SKIPPED = CheckVerdict.WARN, CheckVerdict.FAIL, CheckVerdict.SKIPPED


class Break(NamedTuple):
    """Something broken, and what the check says of it: its verdict, a part of what was found, a part of the fix."""

    check: str
    verdict: CheckVerdict
    found: str
    fix: str
    do: Callable[[Ward], Awaitable[Any]]


async def no_service(ward: Ward) -> None:
    ward.api = "http://127.0.0.1:1"


async def wrong_key(ward: Ward) -> None:
    ward.key = "lk_live_wrong"


async def key_without_scope(ward: Ward) -> None:
    ward.key = (await ward.post("/keys", name="k", owner="acme", scopes=["inference:run"]))["key"]


async def unknown_node(ward: Ward) -> None:
    ward.wanted = "nobody"


async def several_nodes(ward: Ward) -> None:
    metadata = {"vram": "1GB", "inferenceUrl": "http://your-gpu:8080"}
    await ward.post("/passports", name=f"{ward.name}-b", type="compute", owner="acme", metadata=metadata)
    ward.wanted = ""


async def no_node_at_all(ward: Ward) -> None:
    ward.key = (await ward.post("/keys", name="k", owner=ward.name, scopes=["compute"]))["key"]
    ward.wanted = ""


async def deregistered(ward: Ward) -> None:
    ward.sender = None
    await ward.post(f"/compute/deregister/{ward.node}")


async def reports_draining(ward: Ward) -> None:
    ward.sender = {"status": "draining", "detail": "the agent is stopping"}


async def silent(ward: Ward) -> None:
    ward.sender = None
    await ward.beat()
    await ward.served.fall_silent(ward.node, 45)


async def stopped(ward: Ward) -> None:
    ward.sender = None
    await ward.beat(status="draining", detail="the agent is stopping")
    await ward.served.fall_silent(ward.node, 1500)


async def vanished_while_drained(ward: Ward) -> None:
    ward.sender = None
    await ward.beat()
    await ward.post(f"/compute/drain/{ward.node}")
    await ward.served.fall_silent(ward.node, 1500)


async def never_heard(ward: Ward) -> None:
    ward.sender = None


async def unwell(ward: Ward) -> None:
    ward.sender = {"status": "unhealthy", "detail": "llama.cpp is wedged"}


async def server_fails(ward: Ward) -> None:
    ward.server.by_path["/v1/models"] = says({}, status=500)


async def server_wants_a_key(ward: Ward) -> None:
    ward.server.by_path["/v1/models"] = says({}, status=401)


async def late_clock(ward: Ward) -> None:
    ward.sender = {"sentAt": (datetime.now(UTC) - timedelta(hours=1)).isoformat()}


async def server_gone(ward: Ward) -> None:
    await ward.server.stop()


async def wrong_url_here(ward: Ward) -> None:
    ward.url = "http://127.0.0.1:1"


async def lacks_metrics(ward: Ward) -> None:
    ward.server.by_path["/metrics"] = Behaviour(answer=respond(status=501))


async def small_gpu(ward: Ward) -> None:
    ward.sender = {"gpus": [{"index": 0, "memoryTotalMb": 24576}]}


async def unregistered_model(ward: Ward) -> None:
    ward.server.by_path["/v1/models"] = says({"data": [{"id": "nobodys", "owned_by": "llamacpp"}]})
    await ward.declare("nobodys")


async def beats_rarely(ward: Ward) -> None:
    ward.sender = None
    await ward.beat()


async def nothing_declared(ward: Ward) -> None:
    assert (await ward.admin.put(f"/compute/models/{ward.node}", json={"models": []})).is_success


BREAKS = [
    Break("service", FAIL, "Nothing listens at", "Correct --api", no_service),
    Break("key", FAIL, "does not know the key", "Set LUCID_API_KEY", wrong_key),
    Break(
        "scope",
        FAIL,
        "lacks the scope compute",
        "lucid keys create NAME --owner OWNER --scope compute",
        key_without_scope,
    ),
    Break("node", FAIL, "No node 'nobody'", "lucid nodes", unknown_node),
    Break("node", FAIL, " nodes: ", "lucid doctor NODE", several_nodes),
    Break("node", FAIL, "no node", "lucid agent run", no_node_at_all),
    Break("passport", FAIL, "is deprecated", "--status active", lambda ward: ward.patch(status="deprecated")),
    Break("passport", FAIL, "for good", "Register it again", deregistered),
    Break("drain", FAIL, "An operator", "lucid resume node-", lambda ward: ward.post(f"/compute/drain/{ward.node}")),
    Break("drain", FAIL, "own heartbeats say that it drains: the agent", "lucid agent run", reports_draining),
    Break("drain", FAIL, "The node said that it stops: the agent is stopping", "lucid agent run", stopped),
    Break("drain", FAIL, "An operator", "lucid resume node-", vanished_while_drained),
    Break("report", SKIPPED, "The node says that it drains", "", reports_draining),
    Break("heartbeats", FAIL, "1500 s old", "Start the sender again", stopped),
    Break("heartbeats", FAIL, "No heartbeat was ever", "lucid agent run", never_heard),
    Break("heartbeats", FAIL, "s old; after 30 s", "start it again", silent),
    Break("report", FAIL, "unhealthy: llama.cpp is wedged", "lucid agent inspect", unwell),
    Break("probe", FAIL, "with status 500", "--set inferenceUrl=URL", server_fails),
    Break("probe", FAIL, "refused the key", "--set inferenceKey=", server_wants_a_key),
    Break("probe", FAIL, "could not be connected to", "Let the inference server listen", server_gone),
    Break("clock", WARN, "behind the service's", "timedatectl", late_clock),
    Break("server", FAIL, "can't be connected to", "--url http://localhost:8000", server_gone),
    Break("server", FAIL, "can't be connected to", "Start the inference server", wrong_url_here),
    Break("server", FAIL, "another key", "--inference-key", server_wants_a_key),
    Break("server", FAIL, "status 500", "--url", server_fails),
    Break("runtime", FAIL, "registered with vllm", "runtimes=", lambda w: w.patch(metadata={"runtimes": ["vllm"]})),
    Break("runtime", WARN, "names no runtime", "runtimes=", lambda ward: ward.patch(metadata={"runtimes": None})),
    Break("metrics", WARN, "status 501", "--metrics", lacks_metrics),
    Break("models", FAIL, "does not serve other", "Load what is missing", lambda ward: ward.declare("other")),
    Break("models", FAIL, "no model", "Load a model", nothing_declared),
    Break("context", FAIL, "99999", "4096", lambda ward: ward.declare(ward.model, 99999)),
    Break("capacity", WARN, "is 8", "maxConcurrency=2", lambda ward: ward.patch(metadata={"maxConcurrency": 8})),
    Break("capacity", WARN, "no maxC", "maxConcurrency=2", lambda ward: ward.patch(metadata={"maxConcurrency": None})),
    Break("vram", FAIL, "GPUs have 24.0 GB", "vram=24GB", small_gpu),
    Break("catalogue", FAIL, "Nobody has registered nobodys", "lucid passports create nobodys", unregistered_model),
    Break("fit", FAIL, "100", "--quantization", lambda w: w.patch(w.model_id, metadata={"minVramGb": 100})),
    Break("availability", FAIL, "CONTEXT", "context", lambda w: w.patch(w.model_id, metadata={"contextLength": 9999})),
    Break("availability", FAIL, "RUNTIME", "runtimes=", lambda w: w.patch(w.model_id, metadata={"runtimes": ["tgi"]})),
    Break("pace", WARN, "No heartbeat for", "nextHeartbeatInSeconds", beats_rarely),
]
# Those whose fixture is a test of its own below.
TESTED_ALONE = {"tls"}


@pytest.fixture(scope="module")
def served(postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """A service for all these tests."""
    with serving_on_a_clone(postgres_and_template, HEARTBEAT_MAX_PER_SECOND="0") as served:
        yield served


@pytest.fixture(autouse=True)
def short_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the next heartbeat only briefly."""
    monkeypatch.setattr(heartbeat_checks, "PACE_SECONDS", 1.0)


def bad(findings: dict[str, CheckFinding]) -> dict[str, str]:
    """What is neither passed nor skipped."""
    return {name: found.found for name, found in findings.items() if found.verdict in {WARN, FAIL}}


async def test_a_healthy_node_has_nothing_to_mend(served: Served) -> None:
    async with open_ward(served) as ward:
        findings = await ward.examine()
        assert not bad(findings)
        assert list(findings) == [check.id for check in CHECKS]
        assert {name for name, found in findings.items() if found.verdict is CheckVerdict.SKIPPED} == {"tls", "vram"}


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: f"{broken.check}: {broken.found}")
async def test_what_is_broken_is_found_and_its_fix_is_said(served: Served, broken: Break) -> None:
    async with open_ward(served) as ward:
        await broken.do(ward)
        finding = (await ward.examine())[broken.check]
        assert finding.verdict is broken.verdict, finding
        assert broken.found in finding.found
        assert broken.fix in (finding.fix or "")


def test_every_check_has_a_fixture_that_it_does_not_pass() -> None:
    assert {broken.check for broken in BREAKS} | TESTED_ALONE == {check.id for check in CHECKS}


def test_every_code_of_a_probe_and_every_reason_has_a_fix() -> None:
    assert set(ProbeCode) - {ProbeCode.OK} == set(PROBE_FIXES)
    assert set(ReasonCode) == set(REASON_FIXES)


@pytest.mark.parametrize(
    ("name", "options", "finding"),
    [
        ("", {}, CheckFinding(WARN, "2 days from now", "Renew it now")),
        ("127.9.9.9", {}, CheckFinding(FAIL, "IP address mismatch", "register the URL with the name")),
        ("", {"is_signed": False}, CheckFinding(FAIL, "self-signed certificate", "fullchain.pem")),
    ],
)
async def test_a_certificate_is_judged(
    served: Served, authority: Authority, name: str, options: dict[str, bool], finding: CheckFinding
) -> None:
    host = next_host()
    tls = authority.issue(f"IP:{name or host}", **options)
    async with open_ward(served) as ward, FaultNode(tls=tls, host=host) as server:
        await ward.patch(metadata={"inferenceUrl": server.url})
        judged = (await ward.examine())["tls"]
        assert judged.verdict is finding.verdict, judged
        assert finding.found in judged.found
        assert (finding.fix or "") in (judged.fix or "")


async def test_a_check_whose_ground_is_gone_is_skipped_and_not_failed(served: Served) -> None:
    async with open_ward(served) as ward:
        await key_without_scope(ward)
        findings = await ward.examine()
        assert set(bad(findings)) == {"scope"}
        assert findings["node"].needs == "scope"
        assert all(found.needs for found in list(findings.values())[3:])


async def test_a_reason_that_a_check_has_told_is_not_told_again(served: Served) -> None:
    async with open_ward(served) as ward:
        await ward.post(f"/compute/drain/{ward.node}")
        findings = await ward.examine()
        assert set(bad(findings)) == {"drain"}


def run_doctor(api: str, key: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a provider does."""
    environment = {"PATH": os.defpath, "LUCID_API_URL": api, "LUCID_API_KEY": key}
    return subprocess.run(
        [LUCID, "doctor", *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


async def test_the_command_says_it_all_and_its_status_tells_scripts(served: Served) -> None:
    async with open_ward(served) as ward:
        await ward.beat(availableModels=[ward.model])
        await lacks_metrics(ward)
        looked = await _in_thread(served.url, ward.key, ward.name)
        assert looked.returncode == 0, looked.stdout + looked.stderr
        assert "warn  Metrics" in looked.stdout
        assert "→ Start llama-server with --metrics." in looked.stdout
        await ward.post(f"/compute/drain/{ward.node}")
        looked = await _in_thread(served.url, ward.key, ward.name, "--json")
        report = json.loads(looked.stdout)
        assert (looked.returncode, report["passed"]) == (1, False)
        drain = next(check for check in report["checks"] if check["id"] == "drain")
        assert drain["verdict"] == "fail"
        assert drain["fix"].endswith(f"lucid resume {ward.name}")
        assert (await _in_thread("http://127.0.0.1:1", ward.key)).returncode == 3
        for key in ("lk_live_wrong", ""):
            looked = await _in_thread(served.url, key)
            assert looked.returncode == 4
            assert "Not asked         Scope, Node, " in looked.stdout
        assert (await _in_thread("ftp://nowhere", ward.key)).returncode == 2


async def test_a_real_llama_cpp_without_its_metrics_is_told_so(served: Served, tmp_path: Path) -> None:
    with llama_server(tmp_path, tells=False) as llama:
        async with open_ward(served) as ward:
            await ward.patch(metadata={"inferenceUrl": llama.url})
            await ward.declare(MODEL)
            findings = await ward.examine()
            assert findings["runtime"].verdict is CheckVerdict.PASS
            assert findings["models"].verdict is CheckVerdict.PASS
            assert findings["probe"].verdict is CheckVerdict.PASS
            assert findings["metrics"].fix == "Start llama-server with --metrics."


async def _in_thread(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command while the node's server goes on in this loop."""
    return await asyncio.to_thread(run_doctor, *arguments)
