"""The connection to the service: its address, the key, and the sentence and exit status for each error."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

import typer

from lucid_compute.cli.failures import CommandFailed, ExitStatus
from lucid_compute.cli.profiles import choose_service
from lucid_compute.cli.settings import data_dir
from lucid_compute.client import Lucid
from lucid_compute.client.errors import (
    ConfigurationFault,
    Forbidden,
    InvalidRequest,
    LucidApiError,
    LucidClientError,
    NotFound,
    ServiceFailed,
    Unauthorized,
)
from lucid_compute.client.settings import DEFAULT_URL

ApiOption = Annotated[
    str | None,
    typer.Option("--api", metavar="URL", help=f"The service's address; {DEFAULT_URL} if unset. [LUCID_API_URL]"),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="API key. Unset: the admin key of a `lucid serve` in this folder, if there is one. [LUCID_API_KEY]",
    ),
]
SECONDS_TO_ANSWER = 10.0
RETRIES = 1  # a person waits, so an outage is reported soon
API_CALLS_AS_COMMANDS = {
    "GET /passports lists the ones this key can see": "`lucid passports` lists the ones this key can see",
    "Register it with POST /passports, or list yours with GET /compute": "`lucid nodes` lists yours",
    "GET /models lists them": "`lucid models` lists them",
    "GET /keys lists them": "`lucid keys` lists them",
    "PUT /compute/models/{passportId}, or load it": "load it, or declare it",
    "POST /compute/resume/{passportId} ends that": "`lucid resume` ends that",
    "Drain it and wait for drained, pass waitSeconds, or pass force=true to cut requests off": "Wait with "
    "--wait-seconds or `lucid drain`, or cut them off with --force",
}


class Connection:
    """The service at one address, over one connection; to be used in a `with` block."""

    def __init__(
        self, api: str | None, key: str | None, *, timeout_seconds: float = SECONDS_TO_ANSWER, retries: int = RETRIES
    ) -> None:
        """Use this address and key, or those of the environment or a profile. A loopback address may need no key.

        Raises:
            CommandFailed: they can't be used as written.
        """
        self.service = choose_service(api, key, DEFAULT_URL)
        self._local_key = None if self.service.key else find_local_key(self.service.url, data_dir())
        with self._explained():
            self._lucid = Lucid(
                base_url=self.service.url,
                api_key=self.service.key or self._local_key or "",
                timeout_seconds=timeout_seconds,
                retries=retries,
            )

    def __enter__(self) -> Self:
        """Return the connection; it connects at the first call."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._lucid.close()

    @contextmanager
    def session(self) -> Iterator[Lucid]:
        """Yield the SDK. After a failure a new session may follow.

        Raises:
            CommandFailed: with the message of the service, or of the failed connection.
        """
        with self._explained():
            yield self._lucid

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except LucidClientError as error:
            raise CommandFailed(self._sentence(error), status_of(error)) from error

    def _sentence(self, error: LucidClientError) -> str:
        if isinstance(error, Unauthorized):
            return self._key_sentence()
        is_fault = isinstance(error, ServiceFailed) and error.request_id
        message = _each_fault(error) or with_commands(error.message)
        return message + (f" The service's log has it under {error.request_id}." if is_fault else "")

    def _key_sentence(self) -> str:
        if self.service.key:
            if (profile := self.service.profile) is not None:
                return f"The key of the profile {profile} is not valid. Store another one: lucid profiles add {profile}"
            return "The key is not valid. Set another one: LUCID_API_KEY or --key."
        if self._local_key:
            return f"The key in {data_dir() / ADMIN_KEY_FILE} is not valid there. Set LUCID_API_KEY or --key."
        sentence = "This needs a key. Set LUCID_API_KEY or --key; an admin creates one with `lucid keys create`."
        if is_loopback(self.service.url):
            sentence += (
                " Or go where `lucid serve` was started: the admin key in its data folder is found there, "
                "and elsewhere with LUCID_DATA_DIR."
            )
        return sentence


def _each_fault(error: LucidClientError) -> str:
    """Return all faults of a request's fields; the error's message has only the first."""
    fields = error.details.get("fields") if isinstance(error, InvalidRequest) else None
    faults = [field for field in fields or () if isinstance(field, dict)]
    return " ".join(f"{fault.get('path')}: {str(fault.get('message')).rstrip('.')}." for fault in faults)


@contextmanager
def connected(
    api: str | None, key: str | None, *, timeout_seconds: float = SECONDS_TO_ANSWER, retries: int = RETRIES
) -> Iterator[Lucid]:
    """Yield the SDK for the service at that address.

    Raises:
        CommandFailed: with the message of the service, or of the failed connection.
    """
    connection = Connection(api, key, timeout_seconds=timeout_seconds, retries=retries)
    with connection, connection.session() as lucid:
        yield lucid


def status_of(error: LucidClientError) -> ExitStatus:
    """Return the exit status for the error."""
    if isinstance(error, ConfigurationFault):
        return ExitStatus.USAGE
    if isinstance(error, Unauthorized | Forbidden):
        return ExitStatus.NOT_AUTHORISED
    if isinstance(error, NotFound):
        return ExitStatus.NOT_FOUND
    if isinstance(error, LucidApiError) and not error.is_transient:
        return ExitStatus.REFUSED
    return ExitStatus.UNREACHABLE


def with_commands(message: str) -> str:
    """Return a message of the service with the API calls in it replaced by commands."""
    for call, command in API_CALLS_AS_COMMANDS.items():
        message = message.replace(call, command)
    return message


ADMIN_KEY_FILE = "admin.key"
LONGEST_KEY = 512


def service_and_key(api: str | None, key: str | None) -> tuple[str, str | None]:
    """Return the address and the key to use, among them the key of a service in this folder."""
    service = choose_service(api, key, DEFAULT_URL)
    return service.url, service.key or find_local_key(service.url, data_dir())


def find_local_key(api_url: str, data_dir: Path) -> str | None:
    """Return the key in the data folder's `admin.key`; None for an address that is not loopback.

    The key never leaves this machine. A file of another user, or one that others may read, is ignored: `lucid serve`
    did not write it, and its content would be sent to whatever listens there.
    """
    if not is_loopback(api_url):
        return None
    try:
        with (data_dir / ADMIN_KEY_FILE).open(encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                return None
            return file.read(LONGEST_KEY + 1).strip() or None
    except (OSError, ValueError):  # no such file, or no key in it
        return None


def is_loopback(url: str) -> bool:
    """Return whether the URL names this machine by a loopback address, or as localhost."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
