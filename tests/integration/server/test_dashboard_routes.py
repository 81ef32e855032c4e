"""The dashboard's page over HTTP: for everyone, under any address of it, behind a policy that lets in nothing else."""

from __future__ import annotations

import gzip
import re

import pytest

from tests.api import Api, error_code


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/", "/dashboard/nodes", "/dashboard/models/a/b?span=7d"])
async def test_every_address_of_the_dashboard_is_its_page(api: Api, path: str) -> None:
    """Links work when they are sent to somebody; they hold nothing secret, so no key is asked for."""
    answer = await api.with_key(None).http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert '<div id="app">' in answer.text
    assert (await api.http.head(path)).status_code == 200


async def test_the_policy_lets_in_our_own_files_alone(api: Api) -> None:
    """No inline script, no inline style, no frame, no other origin."""
    answer = await api.http.get("/dashboard")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.findall(r"<script(?![^>]* src=)|<style| style=", answer.text)
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in str(policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_files_are_packed_for_whoever_unpacks_them(api: Api) -> None:
    """And kept: their address changes with their contents."""
    page = (await api.http.get("/dashboard")).text
    script = re.findall(r'src="([^"]+/app\.js)"', page)[0]
    plain = await api.http.get(script, headers={"Accept-Encoding": "identity"})
    packed = await api.http.get(script, headers={"Accept-Encoding": "gzip"})
    assert plain.content == packed.content == gzip.decompress(gzip.compress(plain.content))
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"])
    assert "immutable" in plain.headers["cache-control"]
    assert plain.headers["content-type"] == "text/javascript; charset=utf-8"


async def test_an_unchanged_page_is_not_sent_again(api: Api) -> None:
    """It is asked about at each visit, and answered without a body."""
    first = await api.http.get("/dashboard")
    again = await api.http.get("/dashboard/nodes", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "../site.py", "%2e%2e/site.py", "vendor"])
async def test_what_is_no_file_of_it_is_not_found(api: Api, name: str) -> None:
    """Nothing outside its folder can be reached."""
    answer = await api.http.get(f"/dashboard/assets/0123456789abcdef/{name}")
    assert (answer.status_code, error_code(answer)) == (404, "ROUTE_NOT_FOUND")


async def test_the_dashboard_is_no_part_of_the_api(api: Api) -> None:
    """Its document describes the API alone."""
    paths = (await api.http.get("/openapi.json")).json()["paths"]
    assert not [path for path in paths if path.startswith("/dashboard")]
    assert (await api.http.post("/dashboard", json={})).status_code == 405
