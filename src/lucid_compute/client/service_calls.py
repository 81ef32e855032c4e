"""Calls about the service as a whole. Like each `*_calls` module it is the namespace of one resource of the client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lucid_compute.client.call import ApiCall, body_of, given
from lucid_compute.gateway.shapes import MatchAnswer, MatchRequest, RequestPolicy
from lucid_compute.web.shapes import Liveness, Readiness, ServiceView


def match(
    model: str, *, user: str | None = None, lucid: RequestPolicy | Mapping[str, Any] | None = None
) -> ApiCall[MatchAnswer]:
    """Rank the nodes for a request to a model, and give every reason against the others. Nothing is sent to a node.

    `lucid` is the request's policy for nodes, such as `{"allow_regions": ["eu"]}`.
    """
    body = body_of(MatchRequest, model=model, **given(user=user, lucid=lucid))
    return ApiCall(method="POST", path="/match", body=body, answer=MatchAnswer)


def healthz() -> ApiCall[Liveness]:
    """Read whether the process runs."""
    return ApiCall(method="GET", path="/healthz", answer=Liveness)


def service() -> ApiCall[ServiceView]:
    """Read what runs, for admins: the version, the live replicas, and the settings of the one that responds."""
    return ApiCall(method="GET", path="/service", answer=ServiceView)


def ready() -> ApiCall[Readiness]:
    """Read whether the service can serve requests.

    Raises:
        Unavailable: it can't serve now.
    """
    return ApiCall(method="GET", path="/readyz", answer=Readiness)
