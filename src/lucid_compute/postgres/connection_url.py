"""LUCID_DATABASE_URL: its servers and its words, as libpq, hosts of Postgres and other drivers write them.

A word is passed on to the driver, translated, ignored with a line in the log, or refused with a sentence that names it.
Words that are not listed here are passed to Postgres as settings; it names those that it does not know.
"""

from __future__ import annotations

import re
import ssl
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

EXAMPLE = "postgresql://user:password@host:5432/database"
Words = dict[str, str]


class DatabaseNotUsable(Exception):
    """The database can't be used as configured; the text says what to change."""


class Server(NamedTuple):
    """Where a Postgres listens: a name, an address or a folder with a socket. None is what the environment says."""

    host: str | None = None
    port: int | None = None


class ConnectionTarget(NamedTuple):
    """What a URL says: a URL for the driver without servers, the servers in order, and what the service does itself."""

    url: str
    servers: tuple[Server, ...]
    connect_timeout_seconds: float | None
    application_prefix: str
    search_path: str | None
    notes: tuple[str, ...]


_PATIENCE = "each statement has its own time limit"
_NO_POOL = "LUCID_DATABASE_POOL_SIZE and LUCID_DATABASE_TIMEOUT_SECONDS say this"
_OF_ANOTHER_DRIVER = "it is for another driver"
_IGNORED = {
    **dict.fromkeys(("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"), _PATIENCE),
    **dict.fromkeys(("tcp_user_timeout", "socket_timeout"), _PATIENCE),
    **dict.fromkeys(("connection_limit", "pool_timeout", "pool_size", "max_overflow"), _NO_POOL),
    **dict.fromkeys(("pgbouncer", "statement_cache_size", "prepared_statements"), _OF_ANOTHER_DRIVER),
    **dict.fromkeys(("prepareThreshold", "binary_parameters", "sslaccept", "uselibpqcompat"), _OF_ANOTHER_DRIVER),
    **dict.fromkeys(("supa", "workaround", "pool"), _OF_ANOTHER_DRIVER),
    **dict.fromkeys(("sslcompression", "sslsni", "sslcertmode", "gssdelegation"), "the driver has no such choice"),
    **dict.fromkeys(("min_protocol_version", "max_protocol_version"), "the driver has no such choice"),
    "load_balance_hosts": "servers are tried in order, from the last that answered",
    "fallback_application_name": "each connection is named by what it is for",
}
_REFUSED = {
    "hostaddr": "Put the address in the place of the host.",
    "require_auth": "The driver can't promise how the server asks for a password. Use sslmode=verify-full.",
    "requirepeer": "The driver can't check which user runs the server. Leave it out.",
    "replication": "The service needs ordinary sessions. Leave it out.",
    "sslcrldir": "The driver reads one file. Name it in sslcrl.",
}
_OWN = ("connect_timeout", "application_name", "schema", "currentSchema")
_FILES = ("sslcert", "sslkey", "sslrootcert", "sslcrl")
_SERVER = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::(\d*))?")
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def normalise_url(url: str) -> str:
    """Return the URL with the scheme that the driver takes, for any Postgres scheme.

    Raises:
        DatabaseNotUsable: `url` is not a Postgres URL, or it has a word that can't be obeyed.
    """
    read_target(url)
    return urlunsplit(urlsplit(url)._replace(scheme="postgresql"))


@lru_cache(maxsize=16)
def read_target(url: str) -> ConnectionTarget:
    """Return what the URL says.

    Raises:
        DatabaseNotUsable: `url` is not a Postgres URL, or it has a word that can't be obeyed.
    """
    try:
        parts = urlsplit(url)
        words = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        login, _, hosts = parts.netloc.rpartition("@")
        login = login.replace("@", "%40")  # in a password
        servers = _read_servers(words.pop("host", "") or unquote(hosts), words.pop("port", ""))
    except ValueError:
        message = "LUCID_DATABASE_URL can't be read. Percent-encode its password: %2F stands for /, %23 for #."
        raise DatabaseNotUsable(message) from None
    if parts.scheme.split("+")[0] not in {"postgres", "postgresql"}:
        raise DatabaseNotUsable(f"LUCID_DATABASE_URL must look like {EXAMPLE}.")
    for word, sentence in _REFUSED.items():
        if word in words:
            raise _refuse(word, sentence)
    ignored = [word for word in words if word in _IGNORED]
    notes = [f"LUCID_DATABASE_URL: {word} is ignored: {_IGNORED[word]}" for word in ignored]
    _translate_encryption(words, notes)
    words["target_session_attrs"] = _read_session_attributes(words.get("target_session_attrs", ""))
    own = {word: words.pop(word, "") for word in _OWN}
    others = {word: value for word, value in words.items() if word not in _IGNORED}
    return ConnectionTarget(
        url=urlunsplit(
            ("postgresql", f"{login}@" if login else "", parts.path, urlencode(others, quote_via=quote), "")
        ),
        servers=servers,
        connect_timeout_seconds=_read_connect_timeout(own["connect_timeout"]),
        application_prefix=own["application_name"],
        search_path=own["schema"] or own["currentSchema"] or None,
        notes=tuple(notes),
    )


def _refuse(word: str, sentence: str) -> DatabaseNotUsable:
    return DatabaseNotUsable(f"LUCID_DATABASE_URL has the word {word}, which can't be obeyed. {sentence}")


def _read_servers(hosts: str, ports: str) -> tuple[Server, ...]:
    """Return the servers of `h1:5432,h2`; `ports` are those that stand in a word of their own, one or one for each.

    Raises:
        ValueError: a port is no number, or there are more or fewer ports than hosts.
    """
    names = hosts.split(",") if hosts else [""]
    numbers = ports.split(",") if ports else [""]
    if len(numbers) == 1:
        numbers *= len(names)
    return tuple(_read_server(name.strip(), number) for name, number in zip(names, numbers, strict=True))


def _read_server(name: str, number: str) -> Server:
    port = int(number) if number else None
    if name.startswith("/") or (name.count(":") > 1 and not name.startswith("[")):  # a socket's folder, or IPv6
        return Server(name, port)
    if (found := _SERVER.fullmatch(name)) is None:
        msg = "no server"
        raise ValueError(msg)
    return Server(found[1].strip("[]") or None, int(found[2]) if found[2] else port)


def _translate_encryption(words: Words, notes: list[str]) -> None:
    """Change the words of encryption to those that the driver takes."""
    if "ssl" in words:
        is_on = words.pop("ssl").lower() not in {"false", "0", "off", "no", ""}
        words.setdefault("sslmode", "require" if is_on else "disable")
    if words.get("sslmode") == "no-verify":
        words["sslmode"] = "require"
    if words.get("sslmode", "require") not in _SSL_MODES:
        raise _refuse("sslmode", f"It is one of {', '.join(_SSL_MODES)}.")
    if words.pop("gssencmode", "") == "require":
        raise _refuse("gssencmode=require", "The driver has no GSS encryption. Use sslmode=verify-full.")
    if words.pop("client_encoding", "utf8").lower().replace("-", "") not in {"utf8", "unicode", "auto"}:
        raise _refuse("client_encoding", "The service speaks UTF-8. Leave it out.")
    if words.pop("channel_binding", "") == "require":
        _require_channel_binding(words, notes)
    if words.get("sslrootcert") == "system":
        words["sslrootcert"] = _system_authorities()
    for word in _FILES:
        if words.get(word) and not Path(words[word]).is_file():
            raise _refuse(word, f"There is no file {words[word]}.")


def _require_channel_binding(words: Words, notes: list[str]) -> None:
    """Connect by TLS at least. The driver binds no channels: a checked certificate protects as well."""
    if words.get("sslmode", "prefer") in {"disable", "allow", "prefer"}:
        words["sslmode"] = "require"
    if words["sslmode"] != "verify-full":
        notes.append(
            "LUCID_DATABASE_URL: channel_binding=require is not enforced, since the driver has no channel binding; TLS "
            "is. Add sslmode=verify-full and sslrootcert=system to have the server's certificate checked instead"
        )


def _system_authorities() -> str:
    paths = ssl.get_default_verify_paths()
    if (file := paths.cafile) is None:
        raise _refuse("sslrootcert=system", "This system has no file of certificate authorities. Name one.")
    return file


def _read_session_attributes(value: str) -> str:
    """Return which servers are taken. The service writes: it can use none that is read-only."""
    if value in {"", "any", "read-write"}:
        return "read-write"
    if value == "primary":
        return value
    raise _refuse(f"target_session_attrs={value}", "The service writes: use read-write or primary.")


def _read_connect_timeout(value: str) -> float | None:
    try:
        seconds = float(value or 0)
    except ValueError:
        raise _refuse("connect_timeout", "It is a number of seconds.") from None
    return seconds if seconds > 0 else None
