"""Authentication: the principal of an Authorization header (below /v1 of x-api-key), and the limit of failures.

Also `Admission`, the state of a heartbeat or inference request while it is admitted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime

from starlette.types import Scope

from lucid_compute.errors import RateLimited, Unauthorized
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.key_ring import KeyRing, is_well_formed
from lucid_compute.web.bodies import ClientLeft
from lucid_compute.web.errors import PREFIX
from lucid_compute.web.lanes import CutReason, IncomingRequest, LaneClient, Steps

_BEARER = "bearer "
KEY_HEADERS = _AUTHORIZATION, _API_KEY = (b"authorization", b"x-api-key")
_MAX_ADDRESSES = 10_000


class FailedAttempts:
    """Limits failed authentications per address and minute. Loopback is exempt: it can read admin.key anyway."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._minute = 0
        self._counts: dict[str, int] = {}

    def record(self, address: str | None) -> None:
        """Count one failure.

        Raises:
            RateLimited: the address has exceeded the limit of this minute.
        """
        if not self._per_minute or address is None or address.startswith("127.") or address == "::1":
            return
        seconds = time.monotonic()
        if (minute := int(seconds // 60)) != self._minute or len(self._counts) > _MAX_ADDRESSES:
            self._minute, self._counts = minute, {}
        self._counts[address] = self._counts.get(address, 0) + 1
        if self._counts[address] > self._per_minute:
            wait = 60 - int(seconds % 60)
            message = (
                f"Your address's limit of {self._per_minute} wrong keys a minute is reached: "
                f"{self._counts[address]:,} were sent. Retry in {wait} s, with a valid key."
            )
            raise RateLimited(message, retry_after_seconds=wait)


class Authenticator:
    """Finds the principal of an Authorization header."""

    def __init__(self, keys: KeyRing, feed: ChangeFeed, clock: DatabaseClock, failures_per_minute: int) -> None:
        """Look keys up in `keys`, and again after `feed` has caught up."""
        self._keys = keys
        self._feed = feed
        self._clock = clock
        self._failures = FailedAttempts(failures_per_minute)

    async def authenticate(self, authorization: str | None, address: str | None) -> Principal:
        """Return the principal of the header's key.

        Raises:
            Unauthorized: the header has no valid key.
            RateLimited: too many failures came from this address.
            DatabaseUnavailable: Postgres has not been read for a minute.
        """
        known = self.find_known(authorization, self._clock.now())
        return known or await self._authenticate_after_catch_up(authorization, address)

    def find_known(self, authorization: str | None, now: datetime) -> Principal | None:
        """Return the principal of the header's key; None if this replica does not know the key, which may be new."""
        try:
            return self._keys.authenticate(bearer_token(authorization), now)
        except Unauthorized:
            return None

    async def await_key(self, admission: Admission) -> None:
        """Set the principal of a request whose key this replica does not know yet.

        Raises:
            Unauthorized: the header has no valid key.
            RateLimited: too many failures came from this address.
            DatabaseUnavailable: Postgres has not been read for a minute.
        """
        address = await admission.client.find_address(admission.headers)
        admission.principal = await self._authenticate_after_catch_up(admission.authorization, address)

    async def _authenticate_after_catch_up(self, authorization: str | None, address: str | None) -> Principal:
        """Return the principal of a key that was refused, after reading Postgres once.

        Another replica may have created the key seconds ago. An unknown key and a wrong secret are treated alike.
        """
        token = bearer_token(authorization)
        try:
            if token is not None and is_well_formed(token):
                await self._feed.catch_up()
            return self._keys.authenticate(token, self._clock.now())
        except Unauthorized:
            self._failures.record(address)
            raise


class Admission(Steps):
    """A request that is being admitted: what was received and what is known of it, so that nothing is done twice.

    `body` is None until it has been read. `is_over`: it was answered, or its connection is closed.
    """

    principal: Principal | None = None
    is_over = False

    def __init__(self, client: LaneClient, request: IncomingRequest) -> None:
        self.client = client
        self.path, self.headers, self.body, self.method, self.receive, self.query = request
        self.authorization = _authorization_in(self.path, self.headers)

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        if isinstance(error, ClientLeft):
            self.end(CutReason.CLIENT_LEFT)
        elif not self.is_over:
            self.refuse(error)

    def end(self, reason: CutReason) -> None:
        """End the request before its response is complete."""
        if not self.is_over:
            self.stop_waiting()
            self.cut(reason)

    def refuse(self, error: Exception) -> None:
        """Send an error."""
        raise NotImplementedError

    def cut(self, reason: CutReason) -> None:
        """End the request, which nothing awaits any more."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Continue: the client has read what was written."""


def authorization_of(scope: Scope, headers: Mapping[bytes, bytes]) -> str | None:
    """Return the Authorization header of a raw ASGI request, or what stands for it below `/v1`.

    Return None without one, or if a header that names a key occurs twice.
    """
    sent = scope["headers"]
    if len(headers) != len(sent):
        for name in KEY_HEADERS:
            if sum(other == name for other, _ in sent) > 1:
                return None
    return _authorization_in(scope["path"], headers)


def names_key(scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a raw ASGI request has a header that names a key, valid or not."""
    return _AUTHORIZATION in headers or (_API_KEY in headers and scope["path"].startswith(PREFIX))


def _authorization_in(path: str, headers: Mapping[bytes, bytes]) -> str | None:
    """Return the Authorization header; without one, below `/v1`, the key in `x-api-key` in the same form."""
    value = headers.get(_AUTHORIZATION)
    if value is not None:
        return value.decode("latin-1")
    if path.startswith(PREFIX) and (key := headers.get(_API_KEY)) is not None:
        return f"Bearer {key.decode('latin-1')}"
    return None


def bearer_token(authorization: str | None) -> str | None:
    """Return the token of `Bearer …`; None if the header is missing or has another form.

    Headers are decoded as Latin-1. A bootstrap key may have any format, so valid UTF-8 is decoded again.
    """
    if authorization is None or authorization[:7].lower() != _BEARER:
        return None
    token = authorization[7:].strip()
    if not token.isascii():
        with suppress(UnicodeError):
            token = token.encode("latin-1").decode()
    return token or None
