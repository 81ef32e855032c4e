"""The responses that the OpenAPI document shows, recorded from a service.

`python -m tests.api_examples` records them again, into the file that `server/openapi.py` reads.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

import lucid_compute
from lucid_compute.server.settings import Settings
from tests import postgres
from tests.api import ADMIN_KEY, open_api
from tests.factories import GUIDE_PASSPORT
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode

FILE = Path(lucid_compute.__file__).parent / "server" / "openapi_examples.json"
MODEL = "llama-3-70b"
INFERENCE = {
    "create_chat_completion": {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767225600,
        "model": MODEL,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hello!"}, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13},
    },
    "create_completion": {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1767225600,
        "model": MODEL,
        "choices": [{"index": 0, "text": " there was a node.", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9},
    },
    "create_embeddings": {
        "object": "list",
        "model": "bge-m3",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    },
    "create_response": {
        "id": "resp_1",
        "object": "response",
        "created_at": 1767225600,
        "status": "completed",
        "model": MODEL,
        "output": [
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Hello!", "annotations": []}],
            }
        ],
        "usage": {"input_tokens": 11, "output_tokens": 2, "total_tokens": 13},
    },
}
_RANKED = {
    "id": "rerank-1",
    "model": "bge-reranker-v2-m3",
    "usage": {"total_tokens": 24, "prompt_tokens": 24},
    "results": [{"index": 0, "document": {"text": "A GPU that serves models."}, "relevance_score": 0.98}],
}
INFERENCE |= {
    "create_message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 11, "output_tokens": 2},
    },
    "count_message_tokens": {"input_tokens": 11},
    "rerank": _RANKED,
    "rerank_v2": _RANKED,
    "create_score": {
        "id": "score-1",
        "object": "list",
        "created": 1767225600,
        "model": "bge-reranker-v2-m3",
        "data": [{"index": 0, "object": "score", "score": 0.98}],
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
    },
    "tokenize": {"count": 3, "max_model_len": 8192, "tokens": [46864, 24748, 13], "token_strs": None},
    "detokenize": {"prompt": "Say hello."},
    "create_image": {"created": 1767225600, "data": [{"b64_json": "iVBORw0KGgo="}]},
    "create_transcription": {"text": "A node sends a heartbeat."},
    "create_translation": {"text": "A node sends a heartbeat."},
}
FURTHER_MODELS = ("bge-reranker-v2-m3", "whisper-large-v3", "flux-1-schnell")
_LISTED = json.dumps(
    {"object": "list", "data": [{"id": name, "object": "model"} for name in (MODEL, "bge-m3")]}
).encode()
_LONGEST_LIST = 2
_LONGEST_TEXT = 3  # lines


class Recorder:
    """Calls the operations of a service by their ids, and keeps what each answered."""

    def __init__(self, http: httpx.AsyncClient, document: dict[str, Any], node_url: str) -> None:
        self._http = http
        self._node_url = node_url
        self._operations = {
            operation["operationId"]: (method, path, operation)
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        }
        self.recorded: dict[str, Any] = {}

    async def call(self, operation_id: str, *values: str, body: Any = None, **query: Any) -> Any:
        """Call an operation with the values of its path; return and keep its response."""
        method, path, operation = self._operations[operation_id]
        given = iter(values)
        path = re.sub(r"\{[^}]+\}", lambda _: next(given), path)
        accepted = operation.get("requestBody", {}).get("content", {})
        shown = accepted.get("application/json", {}).get("examples", {})
        form: dict[str, Any] = {}
        if body is None and shown:
            body = {**next(iter(shown.values()))["value"], "stream": False}
        if "multipart/form-data" in accepted:
            model = next(iter(accepted["multipart/form-data"]["examples"].values()))["value"]["model"]
            form = {"data": {"model": model}, "files": {"file": b"RIFF"}}
        kinds = [
            kind
            for status in ("200", "201", "202")
            for kind in operation["responses"].get(status, {}).get("content", {})
        ]
        value = None
        for kind in kinds:
            if kind != "text/event-stream":
                headers = {"Accept": kind}
                answer = await self._http.request(method, path, json=body, params=query, headers=headers, **form)
                assert answer.is_success, (operation_id, answer.text)
                value = answer.json() if kind == "application/json" else answer.text
                self.recorded.setdefault(operation_id, {})[kind] = self._shorten(value)
        return value

    def _shorten(self, value: Any) -> Any:
        """Leave out what makes an example long, and what names this machine or could be taken for a secret."""
        if isinstance(value, dict):
            return {key: self._shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._shorten(item) for item in value[-_LONGEST_LIST:]]  # the newest steps of a series
        if isinstance(value, str):
            value = "".join(value.splitlines(keepends=True)[:_LONGEST_TEXT])
            value = value.replace(self._node_url, "http://your-gpu:8080/v1")
            return re.sub(r"^(lk_live_|whsec_)(.{4}).*", r"\1\2…", value)
        return value


async def record(database_url: str) -> dict[str, Any]:
    """Return the responses of each operation that answers with a body, by its id and media type."""
    settings = Settings(bootstrap_admin_key=ADMIN_KEY)
    async with FaultNode(Behaviour()) as server, open_api(database_url, settings) as api:
        document = (await api.http.get("/openapi.json")).json()
        recorder = Recorder(api.http, document, server.url)
        node = await _register(recorder, server.url)
        for operation_id, answer in INFERENCE.items():
            server.behaviour = Behaviour(answer=respond(json.dumps(answer).encode()))
            await recorder.call(operation_id)
        server.behaviour = Behaviour(answer=respond(_LISTED))
        await recorder.call("probe", node)
        await _read_all(recorder, node)
        await _manage(recorder)
        await _leave(recorder, node)
    return recorder.recorded


async def _register(recorder: Recorder, url: str) -> str:
    metadata = {**GUIDE_PASSPORT["metadata"], "inferenceUrl": url, "runtimes": ["vllm"], "pricePer1kTokens": "0.002"}
    node = str((await recorder.call("create_passport", body={**GUIDE_PASSPORT, "metadata": metadata}))["id"])
    shown = recorder.recorded["create_passport"]
    for name in (*FURTHER_MODELS, "bge-m3", MODEL):
        model = {"format": "safetensors", "requiredVram": "40GB", "contextLength": 8192}
        await recorder.call("create_passport", body={"name": name, "type": "model", "metadata": model})
    recorder.recorded["create_passport"] = shown
    await recorder.call("create_passports", body={"passports": [{**GUIDE_PASSPORT, "name": "node-2"}, {}]})
    await recorder.call("change_passport", node, body={"description": "Eight A100 in Berlin", "tags": ["eu"]})
    names = [*FURTHER_MODELS, MODEL, "bge-m3"]
    beat = {"passportId": node, "status": "healthy", "load": 0.42, "queueDepth": 3, "availableModels": names}
    await recorder.call("send_heartbeat", body=beat)
    declared = [{"id": MODEL, "maxTokens": 8192, "quantization": "fp8"}, {"id": "bge-m3"}]
    await recorder.call("declare_models", node, body={"models": declared})
    return node


async def _read_all(recorder: Recorder, node: str) -> None:
    await asyncio.sleep(1.0)  # until the jobs are in the ledger and the sweep has recorded the node's state
    for operation_id in (
        "list_passports",
        "list_nodes",
        "list_fleet_events",
        "list_jobs",
        "get_fleet_metrics",
        "get_fleet_uptime",
    ):
        await recorder.call(operation_id)
    for operation_id in ("get_payouts", "get_losses", "list_models", "list_served_models", "get_overview", "get_usage"):
        await recorder.call(operation_id)
    for operation_id in (
        "get_passport",
        "get_health",
        "get_routing",
        "get_declaration",
        "list_events",
        "get_node_metrics",
    ):
        await recorder.call(operation_id, node)
    await recorder.call("get_node_uptime", node)
    for operation_id in ("get_model", "get_served_model", "get_availability"):
        await recorder.call(operation_id, MODEL)
    await recorder.call("match", body={"model": MODEL})
    for operation_id in ("get_liveness", "get_readiness", "get_service", "get_metrics"):
        await recorder.call(operation_id)


async def _manage(recorder: Recorder) -> None:
    """Record what admins do: keys, the audit trail, webhooks and periods."""
    key = await recorder.call("create_key", body={"name": "node 1", "owner": "acme", "scopes": ["compute"]})
    await recorder.call("list_keys")
    await recorder.call("change_key", key["id"], body={"limits": {"requestsPerMinute": 600}})
    await recorder.call("get_own_key")
    await recorder.call("rotate_key", key["id"], body={"now": False})
    await recorder.call("list_audit")
    webhook = await recorder.call("create_webhook", body={"url": "https://ops.example.com/lucid", "allOwners": True})
    await recorder.call("list_webhooks")
    await recorder.call("rotate_webhook", webhook["id"], body={"now": False})
    await recorder.call("test_webhook", webhook["id"])
    await recorder.call("list_deliveries", webhook["id"])
    first = (datetime.now(UTC).replace(day=1) - timedelta(days=40)).replace(day=1).date()
    until = (first + timedelta(days=31)).replace(day=1)
    period = await recorder.call("close_period", body={"from": str(first), "to": str(until)})
    lines = [{"role": "protocol", "amountUsd": "-12.5"}]
    correction = {"reason": "A price was wrong", "lines": lines}
    await recorder.call("correct_period", period["id"], body=correction)
    await recorder.call("list_periods")
    await recorder.call("get_period", period["id"])


async def _leave(recorder: Recorder, node: str) -> None:
    for operation_id in ("drain", "resume", "deregister"):
        await recorder.call(operation_id, node)


async def _record_on_a_new_database(folder: Path) -> dict[str, Any]:
    url = await postgres.clone(*postgres.ask_for_server(folder))
    try:
        return await record(url)
    finally:
        await postgres.drop(url)


def shape_of(value: Any, path: str = "") -> Iterator[str]:
    """Return the path of each key of a value; what is in a list counts once."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key}"
            yield from shape_of(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from shape_of(item, f"{path}[]")


def main() -> None:
    """Record the examples again."""
    run = postgres.TestRun()
    try:
        recorded = asyncio.run(_record_on_a_new_database(run.folder))
    finally:
        run.end()
    FILE.write_text(json.dumps(recorded, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
