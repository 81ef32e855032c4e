"""The words of a database's URL: each is passed on, translated, ignored with a line, or refused by name."""

from __future__ import annotations

import pytest

from lucid_compute.postgres.connection_url import DatabaseNotUsable, Server, normalise_url, read_target

BASE = "postgresql://user:secret@db.example"


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        (f"{BASE}/lucid", [Server("db.example")]),
        (f"{BASE}:6432/lucid", [Server("db.example", 6432)]),
        ("postgresql://u:p@h1:5432,h2:5433/db", [Server("h1", 5432), Server("h2", 5433)]),
        ("postgresql://u:p@h1,h2:5433,h3/db", [Server("h1"), Server("h2", 5433), Server("h3")]),
        ("postgresql://u@/db?host=h1,h2&port=5432", [Server("h1", 5432), Server("h2", 5432)]),
        ("postgresql://u@/db?host=h1,h2&port=5432,6432", [Server("h1", 5432), Server("h2", 6432)]),
        ("postgresql://u@/db?host=h1:1,h2:2", [Server("h1", 1), Server("h2", 2)]),
        ("postgresql://u@[::1]:5432,[fe80::1]/db", [Server("::1", 5432), Server("fe80::1")]),
        ("postgresql://u@/db?host=::1", [Server("::1")]),
        ("postgresql://u@/db?host=/run/postgresql&port=5433", [Server("/run/postgresql", 5433)]),
        ("postgresql://u@%2Frun%2Fpostgresql/db", [Server("/run/postgresql")]),
        ("postgresql:///db", [Server()]),
        ("postgres://h/db?service=lucid", [Server("h")]),
    ],
)
def test_every_form_of_several_servers_is_read(url: str, servers: list[Server]) -> None:
    """In their order, with their ports."""
    assert list(read_target(url).servers) == servers


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        ("", ""),
        ("sslmode=verify-full&sslrootcert=%2Fproc%2Fstat", "sslmode=verify-full&sslrootcert=%2Fproc%2Fstat"),
        ("ssl=true", "sslmode=require"),
        ("ssl=false", "sslmode=disable"),
        ("sslmode=no-verify", "sslmode=require"),
        ("sslmode=verify-ca&ssl=true", "sslmode=verify-ca"),
        ("sslmode=require&sslnegotiation=direct", "sslmode=require&sslnegotiation=direct"),
        ("options=endpoint%3Dep-1%20-c%20x%3Dy", "options=endpoint%3Dep-1%20-c%20x%3Dy"),
        ("statement_timeout=5000", "statement_timeout=5000"),
        ("channel_binding=prefer", ""),
        ("channel_binding=require", "sslmode=require"),
        ("sslmode=disable&channel_binding=require", "sslmode=require"),
        ("sslmode=verify-full&channel_binding=require", "sslmode=verify-full"),
        ("gssencmode=disable", ""),
        ("gssencmode=prefer&krbsrvname=pg&gsslib=gssapi", "krbsrvname=pg&gsslib=gssapi"),
        ("client_encoding=UTF-8", ""),
        ("keepalives=1&keepalives_idle=30&keepalives_interval=5&keepalives_count=3&tcp_user_timeout=9", ""),
        ("pgbouncer=true&connection_limit=1&pool_timeout=0&supa=base-pooler.x", ""),
        ("connect_timeout=10&application_name=prod&schema=lucid", ""),
        ("load_balance_hosts=random&fallback_application_name=x&sslsni=1&sslcertmode=allow", ""),
    ],
)
def test_what_the_driver_takes_is_passed_on_and_nothing_else(words: str, passed: str) -> None:
    """It refuses words that it does not know."""
    read = read_target(f"{BASE}/lucid?{words}").url
    before, _, rest = read.partition("?")
    assert before == "postgresql://user:secret@/lucid"
    assert rest.split("&") == [*filter(None, passed.split("&")), "target_session_attrs=read-write"]


def test_what_the_service_does_itself_is_read() -> None:
    target = read_target(f"{BASE}/lucid?connect_timeout=10&application_name=prod&schema=lucid")
    assert (target.connect_timeout_seconds, target.application_prefix, target.search_path) == (10, "prod", "lucid")
    assert read_target(f"{BASE}/lucid?connect_timeout=0").connect_timeout_seconds is None
    assert read_target(f"{BASE}/lucid?currentSchema=other").search_path == "other"


@pytest.mark.parametrize(
    ("attribute", "taken"),
    [("any", "read-write"), ("read-write", "read-write"), ("primary", "primary"), ("", "read-write")],
)
def test_a_server_that_takes_no_writes_is_never_taken(attribute: str, taken: str) -> None:
    """Also when the URL says that any would do: the service writes."""
    assert f"target_session_attrs={taken}" in read_target(f"{BASE}/lucid?target_session_attrs={attribute}").url


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("keepalives_idle=30", "keepalives_idle"),
        ("pgbouncer=true", "pgbouncer"),
        ("connection_limit=5", "LUCID_DATABASE_POOL_SIZE"),
        ("channel_binding=require", "sslmode=verify-full"),
    ],
)
def test_a_word_that_is_ignored_is_named_in_the_log(word: str, named: str) -> None:
    (note,) = read_target(f"{BASE}/lucid?{word}").notes
    assert named in note
    assert "secret" not in note


def test_neons_own_url_is_fine_and_says_what_it_does_not_do() -> None:
    """It is told at each start; with a checked certificate there is nothing to tell."""
    neon = "postgresql://u:p@ep-1.neon.tech/neondb?sslmode=require&channel_binding=require"
    assert len(read_target(neon).notes) == 1
    assert read_target(neon.replace("=require&", "=verify-full&sslrootcert=system&")).notes == ()
    assert "system" not in read_target(neon.replace("=require&", "=verify-full&sslrootcert=system&")).url


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("hostaddr=10.0.0.1", "hostaddr"),
        ("require_auth=scram-sha-256", "require_auth"),
        ("requirepeer=postgres", "requirepeer"),
        ("replication=database", "replication"),
        ("sslcrldir=%2Fx", "sslcrldir"),
        ("sslmode=very", "sslmode"),
        ("sslrootcert=%2Fnone%2Fca.pem", "sslrootcert, .* no file /none/ca.pem"),
        ("sslmode=require&sslcert=%2Fnone.crt&sslkey=%2Fnone.key", "sslcert"),
        ("gssencmode=require", "gssencmode=require"),
        ("client_encoding=latin1", "client_encoding"),
        ("target_session_attrs=standby", "target_session_attrs=standby"),
        ("target_session_attrs=prefer-standby", "target_session_attrs=prefer-standby"),
        ("connect_timeout=soon", "connect_timeout"),
    ],
)
def test_a_word_that_can_not_be_obeyed_is_refused_by_name(words: str, named: str) -> None:
    with pytest.raises(DatabaseNotUsable, match=named) as refused:
        normalise_url(f"{BASE}/lucid?{words}")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["postgresql://u:se/cret@h:5432/db", "postgresql://u:se#cret@h/db", "postgresql://u@h1:x/db", f"{BASE}/db?x"],
)
def test_a_url_that_can_not_be_read_says_what_to_look_at_and_not_the_password(url: str) -> None:
    with pytest.raises(DatabaseNotUsable, match="Percent-encode") as refused:
        normalise_url(url)
    assert "cret" not in str(refused.value)


def test_an_at_sign_in_the_password_needs_no_encoding() -> None:
    target = read_target("postgresql://u:p@ss@h:5432/db")
    assert target.servers == (Server("h", 5432),)
    assert target.url.startswith("postgresql://u:p%40ss@/db")


def test_the_scheme_of_another_driver_is_fine() -> None:
    assert normalise_url("postgresql+asyncpg://h/db") == "postgresql://h/db"
    with pytest.raises(DatabaseNotUsable, match="must look like"):
        normalise_url("mysql://h/db")
