"""What ends an agent, and with which exit status: what waiting would not mend. Everything else is tried again."""

from __future__ import annotations

from typing import ClassVar

from lucid_compute.client import errors

SLOW_RETRY_SECONDS = 60.0


class AgentFault(Exception):
    """The agent ends; the message says what to do. Statuses up to 5 mean what they mean of other commands."""

    exit_status: ClassVar[int] = 1


class WrongSettings(AgentFault):
    """What the agent was told can't work, or the registry refuses it."""

    exit_status = 2


class NotAuthorised(AgentFault):
    """There is no key, or the registry does not let it do this."""

    exit_status = 4


class NotThere(AgentFault):
    """The passport that was named is not this key's to see."""

    exit_status = 5


class NodeEnded(AgentFault):
    """The node was deregistered or its passport revoked: somebody wanted that."""

    exit_status = 10


class Superseded(AgentFault):
    """Another agent reports for the same passport, and started later."""

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
    """Answer what ends an agent that has just been started, when a person is there to read it; None: try again."""
    return next((fault(str(error)) for kind, fault in _REFUSALS if isinstance(error, kind)), None)
