"""The service's settings: what is read in another way than it is written, and what is refused."""

from __future__ import annotations

import pytest

from lucid_compute.server.settings import SettingsNotUsable, read_settings


@pytest.mark.parametrize("link", ["tcp://10.96.0.12:8000", "udp://10.96.0.12:53", "sctp://[fd00::1]:1"])
def test_the_address_of_a_service_called_lucid_is_no_port(monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    """Kubernetes gives it to every pod of the namespace; a flag and a number count as ever."""
    monkeypatch.setenv("LUCID_PORT", link)
    monkeypatch.setenv("LUCID_PORT_8000_TCP", link)
    monkeypatch.setenv("LUCID_SERVICE_HOST", "10.96.0.12")
    assert read_settings().port == 8000
    assert read_settings(port=9000).port == 9000
    monkeypatch.setenv("LUCID_PORT", "8100")
    assert read_settings().port == 8100


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        (
            "CORS_ORIGINS",
            "https://chat.example/, HTTP://localhost:3000,",
            ("https://chat.example", "http://localhost:3000"),
        ),
        ("CORS_ORIGINS", "*", ("*",)),
        ("CORS_ORIGINS", "", ()),
        ("ROOT_PATH", "/lucid/", "/lucid"),
        ("ROOT_PATH", "/a/b-c_d", "/a/b-c_d"),
        ("ROOT_PATH", "/", ""),
        ("ROOT_PATH", "/modelshop", "/modelshop"),
        ("KEEP_ALIVE_SECONDS", "", 75),
        ("INFERENCE_MAX_BODY_MIB", "", 32),
    ],
)
def test_a_setting_is_read(monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: object) -> None:
    monkeypatch.setenv(f"LUCID_{name}", value)
    assert getattr(read_settings(), name.lower()) == read


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "tcp"),
        ("CORS_ORIGINS", "chat.example"),
        ("CORS_ORIGINS", "https://chat.example/page"),
        ("CORS_ORIGINS", "https://*.example, https://a b"),
        ("ROOT_PATH", "lucid"),
        ("ROOT_PATH", "/lu cid"),
        ("ROOT_PATH", '/"><script>'),
        ("ROOT_PATH", "/v1"),
        ("ROOT_PATH", "/models/mine"),
        ("KEEP_ALIVE_SECONDS", "0"),
        ("INFERENCE_MAX_BODY_MIB", "257"),
    ],
)
def test_a_setting_that_can_not_be_meant_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """With a sentence that names it."""
    monkeypatch.setenv(f"LUCID_{name}", value)
    with pytest.raises(SettingsNotUsable, match=f"LUCID_{name}: "):
        read_settings()
