"""The OpenAPI document: FastAPI's, with the fast lane beside its routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from lucid_compute.api.error_responses import declare
from lucid_compute.api.heartbeat_lane import PATH
from lucid_compute.errors import NodeDeregistered, NodeNotFound, Overloaded
from lucid_compute.node_state import Heartbeat
from lucid_compute.passport_metadata import ComputeMetadata, ModelMetadata
from lucid_compute.wire.compute import HeartbeatAnswer

_REFERENCE = "#/components/schemas/{model}"
_EXAMPLE = {
    "passportId": "7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11",
    "status": "healthy",
    "load": 0.42,
    "availableModels": ["llama-3-70b", "mistral-7b"],
    "queueDepth": 3,
}


def install(app: FastAPI) -> None:
    """Make `app` answer the whole document, built once."""
    app.openapi = lambda: app.openapi_schema or _build(app)  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for model in (Heartbeat, HeartbeatAnswer):
        schemas.update(_schemas(model))
    _describe_metadata(schemas)
    document["paths"][PATH] = {"post": _heartbeat_operation()}
    for operation in (op for path in document["paths"].values() for op in path.values()):
        _drop_fastapis_own_422(operation)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    app.openapi_schema = document
    return document


def _describe_metadata(schemas: dict[str, Any]) -> None:
    """Show what a passport's metadata may say by its type; any other type takes anything."""
    shapes = (ComputeMetadata, ModelMetadata)
    for shape in shapes:
        schemas.update(_schemas(shape))
    references = [{"$ref": _REFERENCE.format(model=shape.__name__)} for shape in shapes]
    described = {"anyOf": [*references, {"type": "object"}], "title": "Metadata"}
    schemas["PassportCreate"]["properties"]["metadata"] = described


def _heartbeat_operation() -> dict[str, Any]:
    errors = declare(NodeNotFound, NodeDeregistered, Overloaded, body=True)
    body = {"schema": {"$ref": _REFERENCE.format(model="Heartbeat")}, "examples": {"guide": {"value": _EXAMPLE}}}
    return {
        "tags": ["compute"],
        "summary": "Heartbeat",
        "operationId": "heartbeat",
        "description": "Say that a node is alive and what it can serve. Answered once it is committed; send the next "
        "one after `nextHeartbeatInSeconds`. Unknown fields are ignored.",
        "security": [{"HTTPBearer": []}],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": _response("The state of the node", "HeartbeatAnswer"),
            **{str(status): _response(error["description"], "ErrorAnswer") for status, error in errors.items()},
        },
    }


def _response(description: str, model: str) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model=model)}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    """Answer the model's JSON schema and those it refers to, by name."""
    schema = model.model_json_schema(by_alias=True, ref_template=_REFERENCE)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _drop_fastapis_own_422(operation: dict[str, Any]) -> None:
    """Take out the 422 that FastAPI adds by itself in its own shape, where the route declares none."""
    declared = operation.get("responses", {}).get("422", {})
    if "HTTPValidationError" in str(declared):
        del operation["responses"]["422"]
