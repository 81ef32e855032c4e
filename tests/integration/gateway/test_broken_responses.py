"""A stream of `/v1/responses` is done when one of its events says so, and broken when it just ends."""

from __future__ import annotations

import json

import pytest

from tests.api import Api
from tests.fault_answers import respond_in_chunks
from tests.fault_node import Behaviour, FaultNode

DELTA = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hello"}\n\n'
COMPLETED = (
    b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"r",'
    b'"usage":{"input_tokens":3,"output_tokens":1,"total_tokens":4}}}\n\n'
)


@pytest.mark.parametrize(("events", "is_whole"), [([DELTA, COMPLETED], True), ([DELTA], False)])
async def test_a_responses_stream_that_just_ends_is_an_error_to_the_client(
    api: Api, events: list[bytes], is_whole: bool
) -> None:
    """A whole one is passed on as it is; a broken one ends with an error event that OpenAI's clients raise."""
    async with FaultNode(Behaviour(answer=respond_in_chunks(*events))) as node:
        await api.add_model("tiny", "gguf")
        passport_id = await api.register("node", {"inferenceUrl": node.url, "runtimes": ["llama.cpp"]})
        assert (await api.beat(passport_id, availableModels=["tiny"])).status_code == 200
        body = {"model": "tiny", "input": "Say hello.", "stream": True}
        answer = await api.http.post("/v1/responses", json=body)
    assert answer.status_code == 200
    assert answer.content.startswith(DELTA)
    if is_whole:
        assert answer.content == DELTA + COMPLETED
        return
    last = answer.text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\n")
    assert json.loads(last.split("data: ", 1)[1])["error"]["code"] == "NODE_FAILED"
