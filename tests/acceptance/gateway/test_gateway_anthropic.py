"""Anthropic's own client against the gateway, and what else llama.cpp offers: messages, counts, tokens, responses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
import pytest_asyncio

from demo.tiny_gguf import SENTENCE
from tests.gateway import QUESTION, Gateway
from tests.llama import Llama, llama_server

pytestmark = pytest.mark.asyncio(loop_scope="session")

RECITED = f"{SENTENCE} {SENTENCE}".split()[1:]  # what the tiny model says, whatever it is asked


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """A llama.cpp server."""
    folder: Path = tmp_path_factory.mktemp("llama")
    with llama_server(folder) as llama:
        yield llama


@pytest_asyncio.fixture(loop_scope="session")
async def model(gateway: Gateway, llama: Llama) -> str:
    """A model that the real server serves."""
    model = await gateway.add_model()
    await gateway.add_node(f"{llama.url}/v1", model)
    return model


def client_of(gateway: Gateway, key: str) -> anthropic.AsyncAnthropic:
    """Return Anthropic's client, which names its key in `x-api-key` and retries nothing."""
    return anthropic.AsyncAnthropic(
        base_url=gateway.served.url,
        api_key=key,
        max_retries=0,
        timeout=30,
        http_client=anthropic.DefaultAsyncHttpxClient(trust_env=False),
    )


@pytest_asyncio.fixture(loop_scope="session")
async def claude(gateway: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's client with a key of the service."""
    async with client_of(gateway, gateway.key) as client:
        yield client


def words_of(message: anthropic.types.Message) -> list[str]:
    """Return the words of a message in the case that the sentence has."""
    return "".join(block.text for block in message.content if block.type == "text").lower().split()


async def test_a_message_is_answered_and_entered(
    gateway: Gateway, model: str, claude: anthropic.AsyncAnthropic
) -> None:
    """The ledger has all of the input, whichever part of it the server had in its cache."""
    for _ in range(2):
        message = await claude.messages.create(model=model, max_tokens=7, messages=QUESTION)
        assert (words_of(message), message.stop_reason) == (RECITED[:7], "max_tokens")
    jobs = await gateway.jobs(model, 2)
    assert {(job["endpoint"], job["tokensIn"], job["tokensOut"], job["tokensCounted"]) for job in jobs} == {
        ("messages", 14, 7, False)
    }


async def test_a_message_is_streamed(gateway: Gateway, model: str, claude: anthropic.AsyncAnthropic) -> None:
    """As raw events, and by the client's helper, which needs every event of the protocol."""
    stream: Any = await claude.messages.create(model=model, max_tokens=5, messages=QUESTION, stream=True)
    kinds = [event.type async for event in stream]
    assert (kinds[0], kinds[-1], kinds.count("content_block_delta")) == ("message_start", "message_stop", 5)
    async with claude.messages.stream(model=model, max_tokens=9, messages=QUESTION) as helped:
        pieces = [text async for text in helped.text_stream]
        message = await helped.get_final_message()
    assert "".join(pieces).lower().split() == words_of(message) == RECITED[:9]
    jobs = await gateway.jobs(model, 2)
    assert {(job["tokensIn"], job["tokensOut"], job["stream"], job["tokensCounted"]) for job in jobs} == {
        (14, 5, True, False),
        (14, 9, True, False),
    }


async def test_tokens_are_counted_and_cost_nothing(gateway: Gateway, llama: Llama) -> None:
    """Neither a count nor a tokenizer generates anything, so not even a priced node earns by it."""
    model = await gateway.add_model()
    await gateway.add_node(f"{llama.url}/v1", model, pricePer1kTokens="1")
    async with client_of(gateway, gateway.key) as claude:
        counted = await claude.messages.count_tokens(model=model, messages=QUESTION)
    assert counted.input_tokens == 14
    tokens = (await gateway.raw.post("/tokenize", json={"model": model, "content": "node"})).json()["tokens"]
    assert len(tokens) > 0
    text = await gateway.raw.post("/detokenize", json={"model": model, "tokens": tokens})
    assert text.json()["content"].strip("\u2581 ") == "node"  # which the tiny model's tokenizer writes for a space
    jobs = await gateway.jobs(model, 3)
    assert {job["endpoint"] for job in jobs} == {"messages/count_tokens", "/tokenize", "/detokenize"}
    assert {float(job["priceUsd"] or 0) for job in jobs} == {0}


async def test_a_response_is_answered(gateway: Gateway, model: str) -> None:
    """OpenAI's newer endpoint, whole and streamed, at a server that offers it."""
    create = gateway.openai.responses.create
    response = await create(model=model, input="go on", max_output_tokens=5)
    assert response.output_text.lower().split() == RECITED[:5]
    events = [event async for event in await create(model=model, input="go on", max_output_tokens=5, stream=True)]
    assert events[-1].type == "response.completed"
    jobs = await gateway.jobs(model, 2)
    assert {(job["endpoint"], job["tokensOut"], job["tokensCounted"]) for job in jobs} == {("responses", 5, False)}


async def test_documents_are_ranked_by_a_reranker(gateway: Gateway, tmp_path: Path) -> None:
    """As `llama-server --reranking` does it: each with a score, billed by its usage. It has no second version."""
    with llama_server(tmp_path, ranks=True, model="tiny-ranker") as ranker:
        model = await gateway.add_model()
        await gateway.add_node(f"{ranker.url}/v1", model, pricePer1kTokens="1")
        body = {"model": model, "query": "the node", "documents": ["the registry says", "a heartbeat"]}
        ranked = (await gateway.raw.post("/v1/rerank", json=body)).json()
        assert sorted(result["index"] for result in ranked["results"]) == [0, 1]
        assert all(isinstance(result["relevance_score"], float) for result in ranked["results"])
        (job,) = await gateway.jobs(model)
        used = ranked["usage"]["prompt_tokens"]
        assert (job["endpoint"], job["tokensIn"], job["tokensOut"], job["tokensCounted"]) == ("rerank", used, 0, False)
        assert float(job["priceUsd"]) == pytest.approx(used / 1000)
        refused = await gateway.raw.post("/v2/rerank", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "MODEL_UNAVAILABLE")


async def test_the_client_raises_our_refusals_as_its_own_errors(
    gateway: Gateway, claude: anthropic.AsyncAnthropic
) -> None:
    """By their class, with our sentence and code."""
    with pytest.raises(anthropic.NotFoundError) as missing:
        await claude.messages.create(model="unknown", max_tokens=5, messages=QUESTION)
    assert missing.value.body["error"]["code"] == "MODEL_NOT_FOUND"  # type: ignore[index]
    async with client_of(gateway, "lk_live_wrong") as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            await stranger.messages.create(model="unknown", max_tokens=5, messages=QUESTION)
    unserved = await gateway.add_model()
    with pytest.raises(anthropic.InternalServerError) as refused:
        await claude.messages.create(model=unserved, max_tokens=5, messages=QUESTION)
    assert (refused.value.status_code, refused.value.body["error"]["type"]) == (503, "overloaded_error")  # type: ignore[index]
