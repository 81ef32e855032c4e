"""The way to the service: which address, which key, and what a refusal means to a person at the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from lucid_compute.cli.exit_status import ExitStatus
from lucid_compute.cli.failures import CommandFailed
from lucid_compute.cli.local_key import ADMIN_KEY_FILE, find_local_key
from lucid_compute.cli.settings import data_dir
from lucid_compute.client import Lucid
from lucid_compute.client.errors import (
    ConfigurationFault,
    Forbidden,
    LucidApiError,
    LucidClientError,
    NotFound,
    ServiceFailed,
    Unauthorized,
)
from lucid_compute.client.settings import DEFAULT_URL

ApiOption = Annotated[
    str | None,
    typer.Option(
        "--api", metavar="URL", envvar="LUCID_API_URL", help=f"The service's address; {DEFAULT_URL} if unset."
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        envvar="LUCID_API_KEY",
        help="API key; better set in the environment. Unset: the admin key of a `lucid serve` here, if one is.",
    ),
]
SECONDS_TO_ANSWER = 10.0
RETRIES = 1  # a person waits: an outage is better told soon
PROGRAMMERS_WORDS = {
    "GET /passports lists the ones this key can see": "`lucid passports` lists the ones this key can see",
    "Register it with POST /passports, or list yours with GET /compute": "`lucid nodes` lists yours",
    "GET /models lists them": "`lucid models` lists them",
    "GET /keys lists them": "`lucid keys` lists them",
    "PUT /compute/models/{passportId}, or load it": "load it, or declare it",
    "POST /compute/resume/{passportId} ends that": "`lucid resume` ends that",
    "Drain it and wait for drained, pass waitSeconds, or pass force=true to cut requests off": "Wait with "
    "--wait-seconds or `lucid drain`, or cut them off with --force",
}


@contextmanager
def connected(
    api: str | None, key: str | None, *, timeout_seconds: float = SECONDS_TO_ANSWER, retries: int = RETRIES
) -> Iterator[Lucid]:
    """Answer the SDK for the address and key, or those of the environment; a loopback address may need no key.

    Raises:
        CommandFailed: with what the service, or the way to it, says.
    """
    local_key = None if key else find_local_key(api or DEFAULT_URL, data_dir())
    try:
        with Lucid(
            base_url=api or DEFAULT_URL,
            api_key=key or local_key or "",
            timeout_seconds=timeout_seconds,
            retries=retries,
        ) as lucid:
            yield lucid
    except LucidClientError as error:
        sentence = _key_sentence(key, local_key) if isinstance(error, Unauthorized) else _sentence(error)
        raise CommandFailed(sentence, status_of(error)) from error


def status_of(error: LucidClientError) -> ExitStatus:
    """Answer what the error means to a script."""
    if isinstance(error, ConfigurationFault):
        return ExitStatus.USAGE
    if isinstance(error, Unauthorized | Forbidden):
        return ExitStatus.NOT_AUTHORISED
    if isinstance(error, NotFound):
        return ExitStatus.NOT_FOUND
    if isinstance(error, LucidApiError) and not error.is_transient:
        return ExitStatus.REFUSED
    return ExitStatus.UNREACHABLE


def in_commands(message: str) -> str:
    """Answer a sentence of the service with the calls of its API that it names as commands of ours."""
    for call, command in PROGRAMMERS_WORDS.items():
        message = message.replace(call, command)
    return message


def _key_sentence(key: str | None, local_key: str | None) -> str:
    if key:
        return "The key is not valid. Set another one: LUCID_API_KEY or --key."
    if local_key:
        return f"The key in {data_dir() / ADMIN_KEY_FILE} is not valid there. Set LUCID_API_KEY or --key."
    return "This needs a key. Set LUCID_API_KEY or --key; an admin makes one with `lucid keys create`."


def _sentence(error: LucidClientError) -> str:
    is_fault = isinstance(error, ServiceFailed) and error.request_id
    return in_commands(error.message) + (f" The service's log has it under {error.request_id}." if is_fault else "")
