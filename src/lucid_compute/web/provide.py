"""What routes ask for: the service, the caller, a page, the actor that the audit trail names."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from lucid_compute.server.replica import Replica


async def get_service(request: Request) -> Replica:
    """Answer the replica that serves this request."""
    service: Replica = request.app.state.service
    return service


ServiceDependency = Annotated[Replica, Depends(get_service)]
