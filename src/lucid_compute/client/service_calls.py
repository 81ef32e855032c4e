"""The calls about the service as a whole: is it there, where would a request go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lucid_compute.client.call import ApiCall, body_of, given
from lucid_compute.wire.inference import MatchAnswer, MatchRequest, RequestPolicy
from lucid_compute.wire.operations import Liveness, Readiness


def match(
    model: str, *, user: str | None = None, lucid: RequestPolicy | Mapping[str, Any] | None = None
) -> ApiCall[MatchAnswer]:
    """Rank the nodes for a request of a model, and say of the others every reason why not. Nothing is sent to nodes.

    `lucid` is what the request asks of nodes, such as `{"allow_regions": ["eu"]}`.
    """
    body = body_of(MatchRequest, model=model, **given(user=user, lucid=lucid))
    return ApiCall(method="POST", path="/match", body=body, answer=MatchAnswer)


def healthz() -> ApiCall[Liveness]:
    """Ask whether the process runs."""
    return ApiCall(method="GET", path="/healthz", answer=Liveness)


def ready() -> ApiCall[Readiness]:
    """Ask whether the service can serve.

    Raises:
        Unavailable: it can't, for now.
    """
    return ApiCall(method="GET", path="/readyz", answer=Readiness)
