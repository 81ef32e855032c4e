"""The errors that end the agent, with their exit statuses. Waiting would not fix them; the agent retries all others."""

from __future__ import annotations

from typing import ClassVar

from lucid_compute.client import errors

SLOW_RETRY_SECONDS = 60.0


class AgentFault(Exception):
    """The agent ends. The message says what to do. Exit statuses up to 5 mean the same as for other commands."""

    exit_status: ClassVar[int] = 1


class WrongSettings(AgentFault):
    """The agent's settings can't work, or the registry refuses them."""

    exit_status = 2


class NotAuthorised(AgentFault):
    """There is no key, or the key may not do this."""

    exit_status = 4


class NotThere(AgentFault):
    """The key can't see the passport that was named."""

    exit_status = 5


class NodeEnded(AgentFault):
    """The node was deregistered, or its passport was revoked, on purpose."""

    exit_status = 10


class Superseded(AgentFault):
    """Another agent, started later, reports for the same passport."""

    exit_status = 11


_REFUSALS: tuple[tuple[type[errors.LucidClientError], type[AgentFault]], ...] = (
    (errors.ConfigurationFault, WrongSettings),
    (errors.InvalidRequest, WrongSettings),
    (errors.Conflict, WrongSettings),
    (errors.Unauthorized, NotAuthorised),
    (errors.Forbidden, NotAuthorised),
    (errors.PassportNotFound, NotThere),
    (errors.NodeDeregistered, NodeEnded),
)


def refusal(error: errors.LucidClientError) -> AgentFault | None:
    """Return the error that ends an agent at its start, when a person can read it; None to try again."""
    return next((fault(str(error)) for kind, fault in _REFUSALS if isinstance(error, kind)), None)
