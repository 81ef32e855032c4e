"""What can go wrong on the way to a provider, told apart by whose fault it is and what to do next."""

from __future__ import annotations

from enum import StrEnum


class FaultKind(StrEnum):
    """Why an exchange with a provider failed; the values stand in the job ledger and in metrics."""

    ADDRESS_REFUSED = "address_refused"  # the egress policy denies where the name leads
    ROUTING_LOOP = "routing_loop"  # it leads back to this service
    NAME_UNKNOWN = "name_unknown"  # DNS has no address for it
    CONNECT_FAILED = "connect_failed"
    TLS_FAILED = "tls_failed"
    CONNECTION_LOST = "connection_lost"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"  # of a stream
    ANSWER_TIMEOUT = "answer_timeout"  # of a whole answer
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    BAD_RESPONSE = "bad_response"  # not HTTP, not the content that was asked for, or over a limit
    BAD_STATUS = "bad_status"  # an HTTP status that is not the client's fault
    BROKEN_STREAM = "broken_stream"  # the stream said itself that it failed, or ended without saying that it is done


TIMEOUTS = frozenset(
    {FaultKind.FIRST_BYTE_TIMEOUT, FaultKind.ANSWER_TIMEOUT, FaultKind.IDLE_TIMEOUT, FaultKind.TOTAL_TIMEOUT}
)


class EgressFault(Exception):
    """An exchange with a provider failed. The text is for the provider's owner and the log, and quotes no secret."""

    def __init__(self, kind: FaultKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message

    @property
    def reason(self) -> str:
        """What the job ledger says of it."""
        return self.kind.value


class ConnectTimedOut(EgressFault):
    """No address of a provider answered the connection in time."""

    def __init__(self, authority: str) -> None:
        super().__init__(FaultKind.CONNECT_FAILED, f"{authority} did not answer the connection.")


class BadStatus(EgressFault):
    """A provider answered a status that is its own fault."""

    def __init__(self, status: int) -> None:
        super().__init__(FaultKind.BAD_STATUS, f"The node answered status {status}.")
        self.status = status

    @property
    def reason(self) -> str:
        """Such as `http_503`."""
        return f"http_{self.status}" if 300 <= self.status < 600 else "http_other"  # noqa: PLR2004 - bounded: it is a label too


class NotOffered(BadStatus):
    """A provider answered that it has no such endpoint, or no such model; it may be as healthy as any."""

    def __init__(self, status: int, *, is_model: bool) -> None:
        super().__init__(status)
        self.is_model = is_model

    @property
    def reason(self) -> str:
        """Which of the two."""
        return "model_not_offered" if self.is_model else "endpoint_not_offered"
