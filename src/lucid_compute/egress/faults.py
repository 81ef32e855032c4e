"""Failures of requests to providers, by responsible party and by what to do next."""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from http import HTTPStatus


class FaultKind(StrEnum):
    """Why a request to a provider failed. The values are in the job ledger and in metrics."""

    ADDRESS_REFUSED = "address_refused"  # the egress policy denies where the name leads
    ROUTING_LOOP = "routing_loop"  # it leads back to this service
    NAME_UNKNOWN = "name_unknown"  # DNS has no address for it
    CONNECT_FAILED = "connect_failed"
    TLS_FAILED = "tls_failed"
    CONNECTION_LOST = "connection_lost"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"  # of a stream
    ANSWER_TIMEOUT = "answer_timeout"  # of a response without a stream
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    BAD_RESPONSE = "bad_response"  # not HTTP, or not the content that was asked for
    TOO_LARGE = "response_too_large"  # over a limit of this service, which is no failure of the provider
    BAD_STATUS = "bad_status"  # an HTTP status for which the client is not responsible
    BROKEN_STREAM = "broken_stream"  # it reported an error, or ended without saying that it is done
    NODE_LEFT = "node_left"  # it was drained or ended while it was connected to; nothing was sent
    NOT_CONNECTED = "not_connected"  # an outbound node's agent has no connection to this replica; nothing was sent
    OUR_RESOLVER = "our_resolver"  # DNS did not answer in time, or not at all
    OUR_SOCKETS = "our_sockets"  # no file descriptor, port or memory is left for a connection


TIMEOUTS = frozenset(
    {FaultKind.FIRST_BYTE_TIMEOUT, FaultKind.ANSWER_TIMEOUT, FaultKind.IDLE_TIMEOUT, FaultKind.TOTAL_TIMEOUT}
)


class Blame(Enum):
    """Who caused a failure. `PERHAPS_THE_REQUEST`: the provider if another one serves the same request."""

    PROVIDER = auto()
    PERHAPS_THE_REQUEST = auto()
    NOT_THE_PROVIDER = auto()


OURS = frozenset({FaultKind.OUR_RESOLVER, FaultKind.OUR_SOCKETS})
_NOT_THE_PROVIDERS = OURS | {FaultKind.TOO_LARGE, FaultKind.NODE_LEFT, FaultKind.NOT_CONNECTED}
# After the provider has read the request, which may be what breaks it.
_PERHAPS_THE_REQUESTS = frozenset(
    {FaultKind.CONNECTION_LOST, FaultKind.BAD_RESPONSE, FaultKind.ANSWER_TIMEOUT, FaultKind.FIRST_BYTE_TIMEOUT}
)


class EgressFault(Exception):
    """A request to a provider failed. The message is for the provider's owner and the log; it quotes no secret.

    `number` is the request's on its node, as `FleetStats.record_start` returned it.
    """

    number = 0

    def __init__(self, kind: FaultKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message

    @property
    def blame(self) -> Blame:
        """Who caused it, as far as one failure tells."""
        if self.kind in _NOT_THE_PROVIDERS:
            return Blame.NOT_THE_PROVIDER
        return Blame.PERHAPS_THE_REQUEST if self.kind in _PERHAPS_THE_REQUESTS else Blame.PROVIDER

    @property
    def reason(self) -> str:
        """The reason in the job ledger."""
        return self.kind.value


class ConnectTimedOut(EgressFault):
    """No address of a provider accepted the connection in time."""

    def __init__(self, authority: str) -> None:
        super().__init__(FaultKind.CONNECT_FAILED, f"{authority} did not answer the connection.")


_PROVIDERS_OWN = frozenset({401, 402, 403, 407, 408})


class BadStatus(EgressFault):
    """A provider responded with a status for which the client is not responsible, or not alone.

    `said` is the provider's message, if it sent one. `is_requests_own`: that says that the request is the cause.
    """

    def __init__(self, status: int, said: str = "", *, is_requests_own: bool = False) -> None:
        super().__init__(FaultKind.BAD_STATUS, f"The node answered status {status}.")
        self.status = status
        self.said = said
        self.is_requests_own = is_requests_own

    @property
    def reason(self) -> str:
        """The reason in the job ledger, such as `http_503`."""
        return f"http_{self.status}" if 300 <= self.status < 600 else "http_other"  # noqa: PLR2004 - bounded: it is a label too

    @property
    def blame(self) -> Blame:
        """Who caused it, as far as one failure tells."""
        if self.is_requests_own:
            return Blame.NOT_THE_PROVIDER
        is_providers = self.status < HTTPStatus.BAD_REQUEST or self.status in _PROVIDERS_OWN
        return Blame.PROVIDER if is_providers else Blame.PERHAPS_THE_REQUEST


class NodeBusy(BadStatus):
    """A provider responded that it takes no more requests for `retry_after_seconds`. It is healthy."""

    def __init__(self, status: int, retry_after_seconds: float, said: str = "") -> None:
        super().__init__(status, said)
        self.retry_after_seconds = retry_after_seconds

    @property
    def blame(self) -> Blame:
        """Nobody failed."""
        return Blame.NOT_THE_PROVIDER


class ContextTooShort(BadStatus):
    """A provider refused a request as too long for its context, by the response `body`. Others may have more."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.body = body

    @property
    def blame(self) -> Blame:
        """Nobody failed."""
        return Blame.NOT_THE_PROVIDER


class NotOffered(BadStatus):
    """A provider responded that it lacks the endpoint, or the model if `is_model`. It may be healthy.

    `is_learned`: it is not asked again by this owner for a while. Otherwise the request may name a thing that another
    provider has stored, such as a response, and `said` is for its client.
    """

    def __init__(self, status: int, said: str = "", *, is_model: bool, is_learned: bool = True) -> None:
        super().__init__(status, said)
        self.is_model = is_model
        self.is_learned = is_learned

    @property
    def reason(self) -> str:
        """The reason in the job ledger."""
        if not self.is_learned:
            return super().reason
        return "model_not_offered" if self.is_model else "endpoint_not_offered"

    @property
    def blame(self) -> Blame:
        """Nobody failed."""
        return Blame.NOT_THE_PROVIDER
