"""A form is searched in steps: what stands at the edge of a step is found, and one part too many is refused."""

from __future__ import annotations

import asyncio

import pytest

from lucid_compute.errors import InvalidRequest
from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.form_body import MAX_PARTS, STEP_BYTES, FormRequest, read_form

TYPE = b"multipart/form-data; boundary=edge"


def part(name: str, value: bytes, *heads: bytes) -> bytes:
    """Return a part of a form."""
    head = b'Content-Disposition: form-data; name="%b"' % name.encode()
    return b"--edge\r\n%b\r\n\r\n%b\r\n" % (b"\r\n".join([head, *heads]), value)


def read(*parts: bytes) -> FormRequest:
    """Return the request of a form with these parts."""
    body = b"".join([*parts, b"--edge--\r\n"])
    return asyncio.run(_read(body))


async def _read(body: bytes) -> FormRequest:
    return await read_form(ENDPOINTS["audio/transcriptions"], body, TYPE)


@pytest.mark.parametrize("before", range(12))
def test_a_boundary_at_the_edge_of_a_step_is_found(before: int) -> None:
    """However much of it is in the step: the model behind the recording is read."""
    form = read(part("file", b"\r" * (STEP_BYTES - before)), part("model", b"whisper"))
    assert form.model == "whisper"


def test_a_part_with_two_names_is_refused() -> None:
    """Another parser could read the other name."""
    twice = b'Content-Disposition: form-data; name="model"'
    for parts in ([part("x", b"a", twice)], [part('x"; name="model', b"a")]):
        with pytest.raises(InvalidRequest, match="does not say one name"):
            read(*parts, part("model", b"m"))


def test_a_form_has_so_many_parts_and_no_more() -> None:
    others = [part(f"p{number}", b"") for number in range(MAX_PARTS - 1)]
    assert read(*others, part("model", b"m")).model == "m"
    with pytest.raises(InvalidRequest, match="over 100 parts"):
        read(*others, part("one more", b""), part("model", b"m"))


def test_our_policy_is_taken_out_though_the_model_keeps_its_name() -> None:
    form = read(part("lucid", b'{"routeStale":false}'), part("model", b"m"), part("file", b"sound"))
    assert form.body_for("m") == part("model", b"m") + part("file", b"sound") + b"--edge--\r\n"
