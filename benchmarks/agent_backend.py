"""An inference server as an agent sees it: vLLM's responses, growing counters, sometimes an outage or another model.

Run by `benchmarks.agent` with the descriptor of a listening socket.
"""

from __future__ import annotations

import json
import socket
import sys
from itertools import count
from typing import Any

import uvicorn

LOOKS_BETWEEN_OUTAGES = 400
LOOKS_OF_AN_OUTAGE = 20
LOOKS_OF_A_MODEL = 1000
_looks = count()
_LABELS = 'engine="0",model_name="bench-model"'


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Serve the paths by which an agent recognises vLLM and reads its state; everything else is 404."""
    while (await receive()).get("more_body"):
        pass
    status, body = _answer(scope["path"])
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _answer(path: str) -> tuple[int, bytes]:
    if path == "/health":
        return (503 if next(_looks) % LOOKS_BETWEEN_OUTAGES >= LOOKS_BETWEEN_OUTAGES - LOOKS_OF_AN_OUTAGE else 200), b""
    looks = int(repr(_looks)[6:-1])
    if path == "/metrics":
        return 200, _metrics(looks).encode()
    known = {"/version": {"version": "0.32.0"}, "/v1/models": {"object": "list", "data": [_model(looks)]}}
    return (200, json.dumps(known[path]).encode()) if path in known else (404, b"{}")


def _model(looks: int) -> dict[str, Any]:
    return {"id": f"bench-model-{looks // LOOKS_OF_A_MODEL}", "owned_by": "vllm", "max_model_len": 4096}


def _metrics(looks: int) -> str:
    """Return as many lines of metrics as vLLM has; few of them matter."""
    known = {
        "num_requests_running": 3,
        "num_requests_waiting": 1,
        "kv_cache_usage_perc": 0.25,
        "generation_tokens_total": looks * 100,
    }
    lines = [f"vllm:{name}{{{_LABELS}}} {value}" for name, value in known.items()]
    lines += [f'vllm:some_seconds_bucket{{{_LABELS},le="{bucket}"}} 1.0' for bucket in range(600)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    uvicorn.Server(config).run([socket.socket(fileno=int(sys.argv[1]))])
