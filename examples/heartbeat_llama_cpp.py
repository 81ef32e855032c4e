"""Heartbeats for a running llama.cpp server, until the node agent exists: the standard library and httpx alone.

It registers the server as a node, or finds the passport that it made before, and then says every few seconds, as often
as the service asks for, how the server is. SIGTERM or Ctrl-C: it reports that the node drains, and ends.

    LUCID_API_KEY=lk_live_… python examples/heartbeat_llama_cpp.py --llama http://127.0.0.1:8080 --vram 16GB
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx

RETRY_SECONDS = 1.0  # once, after a heartbeat that failed: two may then be lost inside the 30 s that count
LOOK_TIMEOUT_SECONDS = 2.0
SEND_TIMEOUT_SECONDS = 5.0


class LlamaServer:
    """What a llama.cpp server says of itself. What it does not say is None, never 0."""

    def __init__(self, url: str) -> None:
        """Ask the server at `url`."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=self.url, timeout=LOOK_TIMEOUT_SECONDS)

    def report(self) -> dict[str, Any]:
        """Answer a heartbeat's part about the server; an unhealthy one when it does not answer, or still loads."""
        health = self._get("/health")
        if health is None or not health.is_success:
            said = "does not answer" if health is None else f"answers {health.status_code} to /health"
            unknown: dict[str, Any] = {"load": None, "queueDepth": None, "availableModels": []}
            return {"status": "unhealthy", "detail": f"llama.cpp {said}", **unknown}
        metrics, slots = self._metrics(), self._slots()
        busy = sum(slot["is_processing"] for slot in slots) if slots else metrics.get("requests_processing")
        return {
            "status": "healthy",
            "load": busy / len(slots) if slots and busy is not None else None,
            "queueDepth": _whole(metrics.get("requests_deferred")),
            "inFlight": _whole(busy),
            "tokensGenerated": _whole(metrics.get("tokens_predicted_total")),
            "availableModels": sorted({name for model in self.models() for name in _names(model)}),
            "runtime": {"name": "llama.cpp", "version": self._version()},
        }

    def models(self) -> list[dict[str, Any]]:
        """Answer what /v1/models lists."""
        models: list[dict[str, Any]] = (self._json("/v1/models") or {}).get("data", [])
        return models

    def max_context(self) -> int | None:
        """Answer how many tokens one request may have: the least of the loaded models', None when not said."""
        return min(
            (model["meta"]["n_ctx"] for model in self.models() if (model.get("meta") or {}).get("n_ctx")), default=None
        )

    def _slots(self) -> list[dict[str, Any]] | None:
        """Answer the state of each slot; None where the server runs with --no-slots."""
        slots = self._json("/slots")
        return slots if isinstance(slots, list) and slots else None

    def _metrics(self) -> dict[str, float]:
        """Answer the Prometheus metrics by name, without their prefix; none where the server runs without --metrics."""
        answer = self._get("/metrics")
        lines = answer.text.splitlines() if answer is not None and answer.is_success else []
        pairs = (line.removeprefix("llamacpp:").split() for line in lines if line.startswith("llamacpp:"))
        return {name: float(value) for name, value in pairs}

    def _version(self) -> str | None:
        return (self._json("/props") or {}).get("build_info")

    def _json(self, path: str) -> Any:
        answer = self._get(path)
        return answer.json() if answer is not None and answer.is_success else None

    def _get(self, path: str) -> httpx.Response | None:
        try:
            return self._http.get(path)
        except httpx.TransportError:
            return None


class Lucid:
    """The calls of the compute service that a node makes."""

    def __init__(self, url: str, key: str) -> None:
        """Call the service at `url` with an API key of scope `compute`."""
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=SEND_TIMEOUT_SECONDS)
        self._boot_id = uuid4().hex
        self._sequence = 0

    def register(self, name: str, metadata: dict[str, Any]) -> str:
        """Answer the id of the node's passport: a new one, or the one of this name, brought up to date."""
        answer = self._http.post("/passports", json={"name": name, "type": "compute", "metadata": metadata})
        if answer.status_code != httpx.codes.CONFLICT:
            return str(_accepted(answer)["id"])
        passport_id = answer.json()["error"]["details"]["passportId"]
        return str(_accepted(self._http.patch(f"/passports/{passport_id}", json={"metadata": metadata}))["id"])

    def heartbeat(self, passport_id: str, report: dict[str, Any]) -> httpx.Response | None:
        """Send one heartbeat; None when the service can't be reached."""
        self._sequence += 1
        sent = {"bootId": self._boot_id, "sequence": self._sequence, "sentAt": datetime.now(UTC).isoformat()}
        try:
            return self._http.post("/compute/heartbeat", json={"passportId": passport_id, **sent, **report})
        except httpx.TransportError:
            return None


def main() -> int:
    """Heartbeat until told to stop."""
    wanted = _arguments()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    llama, lucid = LlamaServer(wanted.llama), Lucid(wanted.service, os.environ["LUCID_API_KEY"])
    metadata = {
        "gpu": wanted.gpu,
        "vram": wanted.vram,
        "inferenceUrl": f"{llama.url}/v1",
        "runtimes": ["llama.cpp"],
        "maxContext": llama.max_context(),
    }
    passport_id = lucid.register(wanted.name, metadata)
    print(f"{wanted.name} is node {passport_id}", flush=True)
    while not stop.is_set():
        stop.wait(_beat(lucid, passport_id, llama.report(), stop))
    _beat(lucid, passport_id, {**llama.report(), "status": "draining"}, stop)
    print("said that the node drains", flush=True)
    return 0


def _beat(lucid: Lucid, passport_id: str, report: dict[str, Any], stop: threading.Event) -> float:
    """Send one heartbeat, once more when it fails; answer in how many seconds the next one is due.

    A refusal that no repetition mends ends the script: a key that is no longer valid, a node that was deregistered.
    """
    for is_retry in (False, True):
        answer = lucid.heartbeat(passport_id, report)
        if answer is not None and answer.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
            body = _accepted(answer)
            print(f"{report['status']}: the service says {body['status']}", flush=True)
            return float(body["nextHeartbeatInSeconds"])
        said = "can't be reached" if answer is None else f"answers {answer.status_code}"
        print(f"the service {said}; trying again in {RETRY_SECONDS:.0f} s", file=sys.stderr, flush=True)
        if not is_retry:
            stop.wait(RETRY_SECONDS)
    return RETRY_SECONDS


def _accepted(answer: httpx.Response) -> dict[str, Any]:
    """Answer the body of a success; end with the service's sentence otherwise."""
    if not answer.is_success:
        sys.exit(f"the service answers {answer.status_code}: {answer.json()['error']['message']}")
    body: dict[str, Any] = answer.json()
    return body


def _names(model: dict[str, Any]) -> list[str]:
    return [model["id"], *model.get("aliases", [])]


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", default="http://127.0.0.1:8000", help="the compute service")
    parser.add_argument("--llama", default="http://127.0.0.1:8080", help="the llama.cpp server")
    parser.add_argument("--name", default=f"{socket.gethostname()}-llama.cpp", help="the node's name, yours to choose")
    parser.add_argument("--vram", required=True, help="memory for models, such as 24GB (a CPU's: what it may use)")
    parser.add_argument("--gpu", help="the GPU's name")
    wanted = parser.parse_args()
    if not os.environ.get("LUCID_API_KEY"):
        parser.error("set LUCID_API_KEY to a key with the scope compute")
    return wanted


if __name__ == "__main__":
    sys.exit(main())
