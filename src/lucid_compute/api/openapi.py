"""The OpenAPI document: FastAPI's, with the fast lanes beside its routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from lucid_compute.api.openai_errors import PREFIX
from lucid_compute.api.openapi_lanes import REFERENCE, lane_operations, respond
from lucid_compute.node_state import Heartbeat
from lucid_compute.passport_metadata import ComputeMetadata, ModelMetadata
from lucid_compute.wire.compute import HeartbeatAnswer
from lucid_compute.wire.inference import InferenceBody
from lucid_compute.wire.openai import OpenAiErrorAnswer


def install(app: FastAPI) -> None:
    """Make `app` answer the whole document, built once."""
    app.openapi = lambda: app.openapi_schema or _build(app)  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for model in (Heartbeat, HeartbeatAnswer, InferenceBody, OpenAiErrorAnswer):
        schemas.update(_schemas(model))
    schemas["InferenceBody"]["additionalProperties"] = True
    _describe_metadata(schemas)
    lanes = lane_operations()
    for path, operation in lanes.items():
        document["paths"].setdefault(path, {})["post"] = operation
    for path, operations in document["paths"].items():
        if path.startswith(PREFIX):
            for operation in operations.values():
                _wear_openais_shape(operation)
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
    references = [{"$ref": REFERENCE.format(model=shape.__name__)} for shape in shapes]
    described = {"anyOf": [*references, {"type": "object"}], "title": "Metadata"}
    schemas["PassportCreate"]["properties"]["metadata"] = described


def _wear_openais_shape(operation: dict[str, Any]) -> None:
    """Name the shape that errors below `/v1` have."""
    for status, response in operation["responses"].items():
        if not status.startswith("2"):
            operation["responses"][status] = respond(response["description"], "OpenAiErrorAnswer")


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    """Answer the model's JSON schema and those it refers to, by name."""
    schema = model.model_json_schema(by_alias=True, ref_template=REFERENCE)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _drop_fastapis_own_422(operation: dict[str, Any]) -> None:
    """Take out the 422 that FastAPI adds by itself in its own shape, where the route declares none."""
    declared = operation.get("responses", {}).get("422", {})
    if "HTTPValidationError" in str(declared):
        del operation["responses"]["422"]
