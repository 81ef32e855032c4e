"""Probes on the wire: what the service found when it went to a node itself."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from lucid_compute.field_types import AnswerShape, Instant


class ProbeCode(StrEnum):
    """What came of a probe. Those that an attempt to serve a request can end with too are called as in its job."""

    OK = "ok"
    MODEL_MISSING = "model_missing"  # it lists models, and not all that it declares or reports
    ADDRESS_REFUSED = "address_refused"
    ROUTING_LOOP = "routing_loop"
    NAME_UNKNOWN = "name_unknown"
    CONNECT_FAILED = "connect_failed"
    CONNECT_TIMED_OUT = "connect_timed_out"
    TLS_FAILED = "tls_failed"
    CONNECTION_LOST = "connection_lost"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    BAD_RESPONSE = "bad_response"  # not HTTP, or over a limit
    BAD_STATUS = "bad_status"
    REDIRECTED = "redirected"
    AUTH_REFUSED = "auth_refused"  # it wants another key than inferenceKey, or any
    NOT_JSON = "not_json"  # no list of models in JSON


class TlsView(AnswerShape):
    """The TLS session in which a node answered; its certificate was verified for the URL's host."""

    version: str
    certificate_expires_at: Instant | None


class ProbeAnswer(AnswerShape):
    """What the service found at a node's `inferenceUrl`. Nothing of the node's own answer is quoted."""

    passport_id: str
    checked_at: Instant
    reachable: bool = Field(description="Whether it answered `GET /v1/models` with a list, so requests can be sent.")
    code: ProbeCode
    message: str
    http_status: int | None = Field(description="Null when no answer came.")
    connect_ms: float | None = Field(description="Name, connection and TLS together; null when it was not connected.")
    answer_ms: float | None = Field(description="From the request to the whole answer; null when there was none.")
    tls: TlsView | None = Field(description="Null over plain http.")
    runtime: str | None = Field(description="What `owned_by` of the list suggests; null when it suggests nothing.")
    models_listed: list[str] = Field(description="Of the models that the node declares or reports, those it lists.")
    models_missing: list[str] = Field(description="Of those, the ones it does not list; empty without a list.")
