"""OpenAI's own client against the gateway: chats, completions, embeddings, models, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from demo.tiny_gguf import SENTENCE
from tests.gateway import QUESTION, Gateway, text_of
from tests.llama import Llama, llama_servers

pytestmark = pytest.mark.asyncio(loop_scope="session")

RECITED = f"{SENTENCE} {SENTENCE}".split()[1:]  # what the tiny model says, whatever it is asked


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """A llama.cpp server that answers chats, completions and embeddings."""
    folder: Path = tmp_path_factory.mktemp("llama")
    with llama_servers(folder, 1, embeds=True) as (llama,):
        yield llama


@pytest_asyncio.fixture(loop_scope="session")
async def model(gateway: Gateway, llama: Llama) -> str:
    """A model that the real server serves, by its own name for it."""
    model = await gateway.add_model()
    await gateway.add_node(f"{llama.url}/v1", model)
    return model


def words_of(text: str) -> list[str]:
    """Return the words of a text in the case that the sentence has."""
    return text.lower().split()


async def test_a_chat_is_answered_and_entered_with_the_nodes_own_count(gateway: Gateway, llama: Llama) -> None:
    """The headers name the node and the job; the ledger has what the node counted, in and out."""
    model = await gateway.add_model()
    node = await gateway.add_node(llama.url, model, region="eu", pricePer1kTokens="0.5")
    raw = await gateway.openai.chat.completions.with_raw_response.create(model=model, messages=QUESTION, max_tokens=7)
    chat = raw.parse()
    assert words_of(chat.choices[0].message.content or "") == RECITED[:7]
    assert (raw.headers["x-lucid-node"], raw.headers["x-lucid-attempts"]) == (node, "1")
    (job,) = await gateway.jobs(model)
    assert job["id"] == raw.headers["x-lucid-job"] == raw.headers["x-request-id"]
    assert chat.usage is not None
    assert (job["tokensIn"], job["tokensOut"]) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    assert job["tokensOut"] == 7
    known = {"outcome": "completed", "status": 200, "attempt": 1, "passportId": node, "endpoint": "chat/completions"}
    assert {name: job[name] for name in known} == known
    assert (job["stream"], job["tokensCounted"], job["consumer"], job["reason"]) == (False, False, "a consumer", None)
    assert float(job["priceUsd"]) == pytest.approx(0.0005 * chat.usage.total_tokens)
    health = await gateway.health(node)
    assert (health["jobsCompleted"], health["errorRate"], health["inFlight"]) == (1, 0, 0)


async def test_completions_and_embeddings_are_answered(gateway: Gateway, model: str) -> None:
    """The other endpoints go the same way."""
    completion = await gateway.openai.completions.create(model=model, prompt="go on", max_tokens=3)
    assert words_of(completion.choices[0].text) == RECITED[:3]
    embeddings = await gateway.openai.embeddings.create(model=model, input=["one", "two"])
    assert [len(entry.embedding) for entry in embeddings.data] == [64, 64]
    jobs = {job["endpoint"]: job for job in await gateway.jobs(model, 2)}
    assert jobs["completions"]["tokensOut"] == 3
    assert (jobs["embeddings"]["tokensIn"], jobs["embeddings"]["tokensOut"]) == (embeddings.usage.prompt_tokens, 0)


async def test_a_stream_shows_its_usage_only_to_who_asked(gateway: Gateway, model: str) -> None:
    """We ask the node for it in any case, for the ledger; the chunk is passed on only if the client asked too."""
    create = gateway.openai.chat.completions.create
    options: Any
    for options in (openai.omit, {"include_usage": False}, {"include_usage": True}):
        stream = await create(model=model, messages=QUESTION, max_tokens=9, stream=True, stream_options=options)
        chunks = [chunk async for chunk in stream]
        assert words_of(text_of(chunks)) == RECITED[:9]
        shown = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
        assert shown == ([9] if options == {"include_usage": True} else [])
        assert all(chunk.choices or chunk.usage for chunk in chunks)
    prompts = {(job["tokensIn"], job["tokensOut"], job["tokensCounted"]) for job in await gateway.jobs(model, 3)}
    assert prompts == {(14, 9, False)}
    completion = await gateway.openai.completions.create(model=model, prompt="go on", max_tokens=4, stream=True)
    pieces = [chunk.choices[0].text async for chunk in completion]
    assert words_of("".join(pieces)) == RECITED[:4]


async def test_the_synchronous_client_and_its_helpers_work(gateway: Gateway, model: str) -> None:
    """A program that knows nothing of us: a plain client, a stream as a context manager."""

    def talk() -> tuple[str, str]:
        http_client = openai.DefaultHttpx2Client(trust_env=False)
        url = f"{gateway.served.url}/v1"
        with openai.OpenAI(base_url=url, api_key=gateway.key, http_client=http_client) as client:
            chat = client.chat.completions.create(model=model, messages=QUESTION, stop=" says")
            with client.chat.completions.stream(model=model, messages=QUESTION, stop=" says") as stream:
                streamed = stream.get_final_completion().choices[0].message.content
            return chat.choices[0].message.content or "", streamed or ""

    assert [words_of(text) for text in await asyncio.to_thread(talk)] == [RECITED[:7], RECITED[:7]]


async def test_the_list_of_models_is_of_what_is_served(gateway: Gateway, model: str) -> None:
    """Both clients' shapes are in one body; a model without a node is not in it, and can still be read."""
    unserved = await gateway.add_model(format="safetensors")
    listed = {entry.id: entry async for entry in await gateway.openai.models.list()}
    assert model in listed
    assert unserved not in listed
    assert (listed[model].object, listed[model].owned_by) == ("model", "admin")
    assert (await gateway.openai.models.retrieve(f"{unserved}/alias")).id == unserved
    body = (await gateway.raw.get("/v1/models")).json()
    assert [entry["id"] for entry in body["data"]] == [entry["name"] for entry in body["models"]]
    assert body["pagination"]["total"] == len(body["data"])
    with pytest.raises(openai.NotFoundError) as refused:
        await gateway.openai.models.retrieve("nobody-s/model")
    assert refused.value.code == "MODEL_NOT_FOUND"


async def test_refusals_raise_what_openais_users_expect(gateway: Gateway, model: str) -> None:
    """Who may not, what is not there, what is not sound: the status's own exception, with our code."""
    compute = (await gateway.new_key("compute"))["key"]
    create = gateway.openai.chat.completions.create
    async with gateway.openai_with("lk_live_nobody-s") as stranger, gateway.openai_with(compute) as provider:
        cases: list[tuple[type[openai.APIStatusError], str, Awaitable[Any]]] = [
            (openai.AuthenticationError, "UNAUTHORIZED", ask(stranger, model)),
            (openai.PermissionDeniedError, "FORBIDDEN", ask(provider, model)),
            (openai.PermissionDeniedError, "FORBIDDEN", provider.models.list()),
            (openai.NotFoundError, "MODEL_NOT_FOUND", ask(gateway.openai, "nobody-s")),
            (openai.NotFoundError, "ROUTE_NOT_FOUND", gateway.openai.get("/nowhere", cast_to=object)),
            (openai.APIStatusError, "METHOD_NOT_ALLOWED", gateway.openai.get("/chat/completions", cast_to=object)),
            (openai.UnprocessableEntityError, "INVALID_REQUEST", ask(gateway.openai, "")),
            (openai.UnprocessableEntityError, "INVALID_REQUEST", ask(gateway.openai, model, stream="yes")),
            (openai.UnprocessableEntityError, "INVALID_REQUEST", ask(gateway.openai, model, lucid={"allowRegions": 1})),
            (openai.APIStatusError, "PAYLOAD_TOO_LARGE", ask(gateway.openai, model, filler="x" * (32 << 20))),
        ]
        for kind, code, call in cases:
            with pytest.raises(kind) as refused:
                await call
            assert (refused.value.code, type(refused.value.message)) == (code, str), code
            assert refused.value.request_id, code
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        await create(model=model, messages=QUESTION, extra_body={"stream": "yes"})
    assert refused.value.param == "stream"


async def test_a_body_that_is_no_json_is_refused_in_openais_shape(gateway: Gateway, model: str) -> None:
    """400; one that two readers could read differently is refused too."""
    for body in (b"", b"{", b"[]", b'{"model":' + b"[" * 100_000, f'{{"model":"x","model":"{model}"}}'.encode()):
        answer = await gateway.raw.post("/v1/chat/completions", content=body)
        assert answer.status_code in {400, 422}, (body[:40], answer.text)
        assert answer.json()["error"]["code"] == "INVALID_REQUEST"


async def test_a_key_with_limits_is_told_what_it_has_left(gateway: Gateway, model: str) -> None:
    """Every answer carries the headers; one too many is 429 with Retry-After; other keys go on."""
    key = (await gateway.new_key(limits={"requestsPerMinute": 2, "tokensPerMinute": 4000}))["key"]
    async with gateway.openai_with(key) as client:
        raw = await client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, max_tokens=1)
        headers = raw.headers
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "1")
        assert headers["x-ratelimit-limit-tokens"] == "4000"
        assert '"requests";q=2;w=60' in headers["ratelimit-policy"]
        await ask(client, model)
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(client, model)
    assert refused.value.code == "RATE_LIMITED"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 64
    assert refused.value.response.headers["x-ratelimit-limit-requests"] == "2"
    await ask(gateway.openai, model)
    owing = (await gateway.new_key(limits={"tokensPerMinute": 20}))["key"]
    async with gateway.openai_with(owing) as client:
        await ask(client, model, max_tokens=30)
        with pytest.raises(openai.RateLimitError):
            await ask(client, model)


async def test_a_model_that_no_node_can_serve_says_why_not(gateway: Gateway, llama: Llama) -> None:
    """503 MODEL_UNAVAILABLE with every reason counted; what the same question to the model's page says."""
    model = await gateway.add_model(minVramGb=100)
    node = await gateway.add_node(llama.url, model)
    await gateway.beat(node, model, status="unhealthy")
    with pytest.raises(openai.InternalServerError) as refused:
        await ask(gateway.openai, model)
    assert refused.value.status_code == 503
    assert refused.value.code == "MODEL_UNAVAILABLE"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    rejections = refused.value.body["details"]["rejections"]  # type: ignore[index]
    assert (rejections["VRAM_TOO_LOW"], rejections["REPORTED_UNHEALTHY"]) >= (1, 1)


async def ask(client: openai.AsyncOpenAI, model: str, **body: Any) -> Any:
    """Ask for a chat; OpenAI's client passes on whatever stands in `body`."""
    return await client.chat.completions.create(model=model, messages=QUESTION, extra_body={"max_tokens": 1, **body})
