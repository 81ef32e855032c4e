"""What the OpenAPI document says of the fast lanes, which FastAPI does not know."""

from __future__ import annotations

from typing import Any

from lucid_compute.api.error_responses import declare
from lucid_compute.api.heartbeat_lane import PATH
from lucid_compute.api.inference_lane import ENDPOINTS
from lucid_compute.errors import ModelNotFound, NodeDeregistered, NodeNotFound, Overloaded
from lucid_compute.routing_errors import ModelUnavailable, NodeFailed, NodeTimeout, RoutingLoop

REFERENCE = "#/components/schemas/{model}"
_HEARTBEAT = {
    "passportId": "7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11",
    "status": "healthy",
    "load": 0.42,
    "availableModels": ["llama-3-70b", "mistral-7b"],
    "queueDepth": 3,
}
_SAY_HELLO = [{"role": "user", "content": "Say hello."}]
_REQUESTS: dict[str, dict[str, Any]] = {
    "chat/completions": {"model": "llama-3-70b", "messages": _SAY_HELLO, "stream": True},
    "completions": {"model": "llama-3-70b", "prompt": "Once upon a time", "max_tokens": 16},
    "embeddings": {"model": "bge-m3", "input": "Hello"},
    "responses": {"model": "llama-3-70b", "input": "Say hello."},
}
_DESCRIPTION = """\
OpenAI's endpoint, served by the node where the request waits least. The body goes on untouched but for three things:
`model` (a model's name, alias or passport id) becomes the id that the node knows, `lucid` (what the request asks of its
node) is taken out, and a stream's usage is asked for. Until the first byte a node that fails is replaced by another, at
most twice; after it the stream ends with an error event and no `[DONE]`. The answer's headers name the job
(`X-Lucid-Job`), the node (`X-Lucid-Node`) and how many attempts it took (`X-Lucid-Attempts`). `user`,
`prompt_cache_key` or the header `X-Lucid-Session` tie requests to one node, whose cache knows them.
"""


def lane_operations() -> dict[str, dict[str, Any]]:
    """Answer the POST operation of each lane's path."""
    inference = {path: _inference_operation(endpoint) for path, endpoint in ENDPOINTS.items()}
    return {PATH: _heartbeat_operation(), **inference}


def respond(description: str, model: str) -> dict[str, Any]:
    """Answer how a response of a named shape is described."""
    schema = {"$ref": REFERENCE.format(model=model)}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _inference_operation(endpoint: str) -> dict[str, Any]:
    known = (ModelNotFound, NodeFailed, NodeTimeout, RoutingLoop, ModelUnavailable, Overloaded)
    errors = declare(*known, body=True)
    example = {"plain": {"value": _REQUESTS[endpoint]}}
    body = {"schema": {"$ref": REFERENCE.format(model="InferenceBody")}, "examples": example}
    answer = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
    return {
        "tags": ["inference"],
        "summary": endpoint.replace("/", " ").capitalize(),
        "operationId": endpoint.replace("/", "_"),
        "description": _DESCRIPTION,
        "security": [{"HTTPBearer": []}],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": {"description": "The node's answer, or its stream", "content": answer},
            **{str(status): respond(error["description"], "OpenAiErrorAnswer") for status, error in errors.items()},
        },
    }


def _heartbeat_operation() -> dict[str, Any]:
    errors = declare(NodeNotFound, NodeDeregistered, Overloaded, body=True)
    body = {"schema": {"$ref": REFERENCE.format(model="Heartbeat")}, "examples": {"guide": {"value": _HEARTBEAT}}}
    return {
        "tags": ["compute"],
        "summary": "Heartbeat",
        "operationId": "heartbeat",
        "description": "Say that a node is alive and what it can serve. Answered once it is committed; send the next "
        "one after `nextHeartbeatInSeconds`. Unknown fields are ignored.",
        "security": [{"HTTPBearer": []}],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": respond("The state of the node", "HeartbeatAnswer"),
            **{str(status): respond(error["description"], "ErrorAnswer") for status, error in errors.items()},
        },
    }
