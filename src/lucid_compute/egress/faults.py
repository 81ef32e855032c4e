"""Failures of requests to providers, by responsible party and by what to do next."""

from __future__ import annotations

from enum import StrEnum


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


TIMEOUTS = frozenset(
    {FaultKind.FIRST_BYTE_TIMEOUT, FaultKind.ANSWER_TIMEOUT, FaultKind.IDLE_TIMEOUT, FaultKind.TOTAL_TIMEOUT}
)


class EgressFault(Exception):
    """A request to a provider failed. The message is for the provider's owner and the log; it quotes no secret."""

    def __init__(self, kind: FaultKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message

    @property
    def reason(self) -> str:
        """The reason in the job ledger."""
        return self.kind.value


class ConnectTimedOut(EgressFault):
    """No address of a provider accepted the connection in time."""

    def __init__(self, authority: str) -> None:
        super().__init__(FaultKind.CONNECT_FAILED, f"{authority} did not answer the connection.")


class BadStatus(EgressFault):
    """A provider responded with a status for which it is responsible."""

    def __init__(self, status: int) -> None:
        super().__init__(FaultKind.BAD_STATUS, f"The node answered status {status}.")
        self.status = status

    @property
    def reason(self) -> str:
        """The reason in the job ledger, such as `http_503`."""
        return f"http_{self.status}" if 300 <= self.status < 600 else "http_other"  # noqa: PLR2004 - bounded: it is a label too


class NotOffered(BadStatus):
    """A provider responded that it lacks the endpoint, or the model if `is_model`. It may be healthy."""

    def __init__(self, status: int, *, is_model: bool) -> None:
        super().__init__(status)
        self.is_model = is_model

    @property
    def reason(self) -> str:
        """The reason in the job ledger."""
        return "model_not_offered" if self.is_model else "endpoint_not_offered"
