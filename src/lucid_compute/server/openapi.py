"""The OpenAPI document: FastAPI's, with the paths that lanes serve added."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from lucid_compute.errors import (
    MethodNotAllowed,
    ModelNotFound,
    ModelUnavailable,
    NodeDeregistered,
    NodeFailed,
    NodeNotFound,
    NodeTimeout,
    Overloaded,
    ResponseNotFound,
    RoutingLoop,
)
from lucid_compute.gateway.endpoints import ENDPOINTS, STORED, InferenceEndpoint
from lucid_compute.gateway.shapes import MAX_MODEL_ID, AnthropicErrorAnswer, InferenceBody, OpenAiErrorAnswer
from lucid_compute.registry.domain.metadata import ComputeMetadata, ModelMetadata
from lucid_compute.registry.domain.node_state import Heartbeat
from lucid_compute.registry.heartbeat_lane import PATH
from lucid_compute.registry.shapes import HeartbeatAnswer
from lucid_compute.web.errors import ANTHROPIC_PREFIX, PREFIX, REFERENCE, ErrorAnswer, declare, respond

_HEARTBEAT = {
    "passportId": "7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11",
    "status": "healthy",
    "load": 0.42,
    "availableModels": ["llama-3-70b", "mistral-7b"],
    "queueDepth": 3,
}
_FORM = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "minLength": 1, "maxLength": MAX_MODEL_ID},
        "file": {"type": "string", "format": "binary"},
    },
    "required": ["model"],
    "additionalProperties": True,
}
_PATHS = {
    "passport_id": _HEARTBEAT["passportId"],
    "id_or_name": "llama-3-70b",
    "key_id": "ug548cjkn1Kj",
    "webhook_id": "3fe3d32f-17b0-4b8d-a168-95cf04e3250a",
    "period_id": "a3ed89e6-2311-462b-9c2b-13de36a4180d",
    "response_id": "resp_Xc0b9Q2m1xqkV4uT7rJd5wQ8hZ3nYpLsA6eGfKcB0iM",
}
_DESCRIPTION = """\
Served by the node where the request waits least. The body goes on untouched but for three things:
`model` (a model's name, alias or passport id) becomes the id that the node knows, `lucid` (what the request asks of its
node) is taken out, and a stream's usage is asked for. Until the first byte a node that fails is replaced by another, at
most twice; after it the stream ends with an error event and without the event that says that it is done. The answer's
headers name the job (`X-Lucid-Job`), the node (`X-Lucid-Node`), how many attempts it took (`X-Lucid-Attempts`)
and the price (`X-Lucid-Price-Usd`; of a stream `usage.cost`, if its usage is asked for). `user`,
`prompt_cache_key` or the header `X-Lucid-Session` tie requests to one node, whose cache knows them.
"""
_OF_STORED = """\
Sent to the node that has the response: `response_id` is the id that `POST /v1/responses` returned. A response of
another owner is not found, as one that its node has no longer.
"""


def lane_operations() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the operations of the lanes, by path and method."""
    inference = {(endpoint.path, "post"): _inference_operation(endpoint) for endpoint in ENDPOINTS.values()}
    stored = {(endpoint.path, endpoint.method.lower()): _stored_operation(endpoint) for endpoint in STORED}
    return {(PATH, "post"): _heartbeat_operation(), **inference, **stored}


def _stored_operation(endpoint: InferenceEndpoint) -> dict[str, Any]:
    errors = declare(ResponseNotFound, NodeFailed, NodeTimeout, RoutingLoop, MethodNotAllowed, Overloaded)
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    named = {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string", "maxLength": 400}}
    parameters = [named]
    if endpoint.stream is not None:
        answer["text/event-stream"] = {"schema": {"type": "string"}}
        streams = {"type": "boolean", "default": False}
        parameters.append({"name": "stream", "in": "query", "required": False, "schema": streams})
    return {
        "tags": ["inference"],
        "summary": endpoint.operation_id.replace("_", " ").capitalize(),
        "operationId": endpoint.operation_id,
        "description": _OF_STORED,
        "security": [{"HTTPBearer": []}],
        "parameters": parameters,
        "responses": {
            "200": {"description": "The node's answer, or its stream", "content": answer},
            **{
                str(status): respond(each["description"], _error_shape(endpoint.path))
                for status, each in errors.items()
            },
        },
    }


def _inference_operation(endpoint: InferenceEndpoint) -> dict[str, Any]:
    known = (ModelNotFound, NodeFailed, NodeTimeout, RoutingLoop, ModelUnavailable, Overloaded)
    errors = declare(*known, body=True)
    example = {"plain": {"value": endpoint.example}}
    reference: dict[str, Any] = {"$ref": REFERENCE.format(model="InferenceBody")}
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if not endpoint.shape.names:
        answer = {"audio/mpeg": {"schema": {"type": "string", "format": "binary"}}}
    if endpoint.stream is not None:
        answer["text/event-stream"] = {"schema": {"type": "string"}}
    media_type = "multipart/form-data" if endpoint.is_form else "application/json"
    body = {"schema": _FORM if endpoint.is_form else reference, "examples": example}
    return {
        "tags": ["inference"],
        "summary": endpoint.name.strip("/").replace("/", " ").capitalize(),
        "operationId": endpoint.operation_id,
        "description": _DESCRIPTION,
        "security": [{"HTTPBearer": []}],
        "requestBody": {"required": True, "content": {media_type: body}},
        "responses": {
            "200": {"description": "The node's answer, or its stream", "content": answer},
            **{
                str(status): respond(each["description"], _error_shape(endpoint.path))
                for status, each in errors.items()
            },
        },
    }


def _heartbeat_operation() -> dict[str, Any]:
    errors = declare(NodeNotFound, NodeDeregistered, Overloaded, body=True)
    body = {"schema": {"$ref": REFERENCE.format(model="Heartbeat")}, "examples": {"guide": {"value": _HEARTBEAT}}}
    return {
        "tags": ["compute"],
        "summary": "Heartbeat",
        "operationId": "send_heartbeat",
        "description": "Say that a node is alive and what it can serve. Answered once it is committed; send the next "
        "one after `nextHeartbeatInSeconds`. Unknown fields are ignored.",
        "security": [{"HTTPBearer": []}],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": respond("The state of the node", "HeartbeatAnswer"),
            **{str(status): respond(error["description"], "ErrorAnswer") for status, error in errors.items()},
        },
    }


def install(app: FastAPI) -> None:
    """Make `app` return the complete document, which is built once."""
    app.openapi = lambda: app.openapi_schema or _build(app)  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    for route in app.routes:
        if isinstance(route, APIRoute):
            route.unique_id = route.name  # the operation's id; FastAPI's own repeats path and method
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        servers=app.servers or None,
    )
    schemas = document["components"]["schemas"]
    for model in (ErrorAnswer, Heartbeat, HeartbeatAnswer, InferenceBody, OpenAiErrorAnswer, AnthropicErrorAnswer):
        schemas.update(_schemas(model))
    schemas["InferenceBody"]["additionalProperties"] = True
    _describe_metadata(schemas)
    lanes = lane_operations()
    for (path, method), operation in lanes.items():
        document["paths"].setdefault(path, {})[method] = operation
    for path, operations in document["paths"].items():
        if path.startswith(PREFIX):
            for operation in operations.values():
                _use_inference_errors(operation, path)
    examples = json.loads((files("lucid_compute.server") / "openapi_examples.json").read_text(encoding="utf-8"))
    for operation in (op for path in document["paths"].values() for op in path.values()):
        _drop_default_422(operation)
        _show_examples(operation, examples.get(operation["operationId"], {}))
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    app.openapi_schema = document
    return document


def _show_examples(operation: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Show a value of each part of the path, and the response in each media type: see `tests/api_examples.py`."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["example"] = _PATHS[parameter["name"]]
    for status, response in operation["responses"].items():
        if status.startswith("2"):
            for media_type, content in response.get("content", {}).items():
                if media_type in recorded:
                    content["example"] = recorded[media_type]


def _describe_metadata(schemas: dict[str, Any]) -> None:
    """Describe a passport's metadata by its type; other types accept anything."""
    shapes = (ComputeMetadata, ModelMetadata)
    for shape in shapes:
        schemas.update(_schemas(shape))
    references = [{"$ref": REFERENCE.format(model=shape.__name__)} for shape in shapes]
    described = {"anyOf": [*references, {"type": "object"}], "title": "Metadata"}
    schemas["PassportCreate"]["properties"]["metadata"] = described


def _use_inference_errors(operation: dict[str, Any], path: str) -> None:
    """Give errors below `/v1` the shape that its clients read."""
    for status, response in operation["responses"].items():
        if not status.startswith("2"):
            operation["responses"][status] = respond(response["description"], _error_shape(path))


def _error_shape(path: str) -> str:
    return "AnthropicErrorAnswer" if path.startswith(ANTHROPIC_PREFIX) else "OpenAiErrorAnswer"


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    """Return the model's JSON schema and those it refers to, by name."""
    schema = model.model_json_schema(by_alias=True, ref_template=REFERENCE)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _drop_default_422(operation: dict[str, Any]) -> None:
    """Remove the 422 in FastAPI's own shape, which it adds where the route declares none."""
    declared = operation.get("responses", {}).get("422", {})
    if "HTTPValidationError" in str(declared):
        del operation["responses"]["422"]
