"""The clients that others wrote, in their current versions, against the service and a real llama.cpp server.

The examples of docs/clients.md run as they are written; Node and its packages come with the development dependencies.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.tiny_gguf import SENTENCE
from lucid_compute.client import AsyncLucid
from tests import ROOT
from tests.gateway import Gateway, open_gateway
from tests.llama import Llama, llama_server
from tests.lucid_serve import Served
from tests.node_js import run_node

EXAMPLES = re.findall(
    r"^## ([^\n]+)\n\n```(\w+)\n(.*?)^```$", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE | re.DOTALL
)
PACKAGES = Path(sys.prefix) / "node-clients" / "node_modules"
MODEL = "llama-3-70b"
RECITED = f"{SENTENCE} {SENTENCE}".split()[1:]  # what the tiny model says, whatever it is asked
SECONDS = 60.0
needs_packages = pytest.mark.skipif(not PACKAGES.is_dir(), reason="the clients for Node are not installed")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """A llama.cpp server, which knows the model of the examples."""
    with llama_server(tmp_path_factory.mktemp("llama"), model=MODEL) as llama:
        yield llama


@pytest.fixture
async def gateway(served: Served, admin: AsyncLucid, llama: Llama) -> AsyncIterator[Gateway]:
    """The service, with the model of the examples and a node that serves it."""
    if not [model async for model in admin.models.list(search=MODEL)]:
        await admin.passports.create(name=MODEL, type="model", metadata={"format": "gguf"})
    async with open_gateway(served) as gateway:
        node = await gateway.add_node(f"{llama.url}/v1", MODEL, pricePer1kTokens="1")
        yield gateway
        await gateway.admin.post(f"/compute/deregister/{node}", params={"force": True})


def filled_in(example: str, gateway: Gateway) -> str:
    """Return an example with the service's address and a key."""
    assert "lk_live_…" in example
    return example.replace("http://127.0.0.1:8000", gateway.served.url).replace("lk_live_…", gateway.key)


async def run(*command: str) -> str:
    """Run a program; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={"PATH": os.defpath},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(SECONDS):
        out, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    return out.decode()


async def run_javascript(program: str, folder: Path, **environment: str) -> str:
    """Run a program in Node, which may import the clients of others; return what it printed."""
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(PACKAGES)
    ran = await run_node(program, folder, suffix=".mjs", **environment)
    assert (ran.status, ran.errors) == (0, ""), ran
    return ran.out


def test_there_is_an_example_for_each_client() -> None:
    assert [name for name, _, _ in EXAMPLES] == [
        "curl",
        "OpenAI for Python",
        "Anthropic for Python",
        "OpenAI for JavaScript",
        "Anthropic for JavaScript",
        "Vercel AI SDK",
    ]


@pytest.mark.parametrize(("name", "language", "example"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
async def test_an_example_runs_as_it_is_written(
    gateway: Gateway, tmp_path: Path, name: str, language: str, example: str
) -> None:
    """And prints what the model says."""
    program = filled_in(example, gateway)
    if language == "bash":
        out = await run("bash", "-c", program)
        said = json.loads(out)["choices"][0]["message"]["content"]
    elif language == "python":
        said = await run(sys.executable, "-c", program)
    elif PACKAGES.is_dir():
        said = await run_javascript(program, tmp_path)
    else:
        pytest.skip("the clients for Node are not installed")
    assert said.lower().split()[:5] == RECITED[:5], name


OPENAI = """
import OpenAI from "openai";
const client = new OpenAI({ maxRetries: 0 });
const { MODEL: model } = process.env;
const messages = [{ role: "user", content: "go on" }];
const asked = { model, messages, max_tokens: 5 };
const { data: chat, response: raw } = await client.chat.completions.create(asked).withResponse();
const streamed = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
const final = await streamed.finalChatCompletion();
const wanted = { model, input: "go on", max_output_tokens: 5 };
const response = await client.responses.create(wanted);
const events = [];
for await (const event of await client.responses.create({ ...wanted, stream: true })) events.push(event.type);
const models = (await client.models.list()).data.map((each) => each.id);
const refused = [];
for (const call of [
  () => client.chat.completions.create({ model: "none", messages }),
  () => client.responses.retrieve("resp_none"),
  () => client.responses.retrieve(response.id),
  () => client.responses.cancel(response.id),
  () => new OpenAI({ apiKey: "lk_live_wrong", maxRetries: 0 }).models.list(),
]) {
  refused.push(await call().catch((error) => [error.constructor.name, error.status, error.code]));
}
console.log(JSON.stringify({
  chat: chat.choices[0].message.content, price: raw.headers.get("x-lucid-price-usd"), tokens: chat.usage.total_tokens,
  streamed: final.choices[0].message.content, usage: final.usage,
  response: response.output_text, events, models, refused,
}));
"""


@needs_packages
async def test_openais_client_for_javascript(gateway: Gateway, tmp_path: Path) -> None:
    """Whole, streamed, and by its helpers; refusals are its own classes. llama.cpp stores no response."""
    url = f"{gateway.served.url}/v1"
    found = json.loads(
        await run_javascript(OPENAI, tmp_path, OPENAI_BASE_URL=url, OPENAI_API_KEY=gateway.key, MODEL=MODEL)
    )
    assert [found[each].lower().split() for each in ("chat", "streamed", "response")] == [RECITED[:5]] * 3
    assert float(found["price"]) == pytest.approx(found["tokens"] / 1000)
    assert found["usage"]["completion_tokens"] == 5
    assert (found["events"][0], found["events"][-1]) == ("response.created", "response.completed")
    assert MODEL in found["models"]
    assert found["refused"] == [
        ["NotFoundError", 404, "MODEL_NOT_FOUND"],
        ["NotFoundError", 404, "RESPONSE_NOT_FOUND"],
        ["NotFoundError", 404, "RESPONSE_NOT_FOUND"],
        ["NotFoundError", 404, "RESPONSE_NOT_FOUND"],
        ["AuthenticationError", 401, "UNAUTHORIZED"],
    ]


ANTHROPIC = """
import Anthropic from "@anthropic-ai/sdk";
const client = new Anthropic({ maxRetries: 0 });
const { MODEL: model } = process.env;
const messages = [{ role: "user", content: "go on" }];
const message = await client.messages.create({ model, max_tokens: 5, messages });
const final = await client.messages.stream({ model, max_tokens: 5, messages }).finalMessage();
const counted = await client.messages.countTokens({ model, messages });
const refused = [];
for (const call of [
  () => client.messages.create({ model: "none", max_tokens: 5, messages }),
  () => new Anthropic({ apiKey: "lk_live_wrong", maxRetries: 0 }).messages.create({ model, max_tokens: 5, messages }),
]) {
  refused.push(await call().catch((error) => [error.constructor.name, error.status, error.error?.error?.code]));
}
console.log(JSON.stringify({
  said: [message.content[0].text, final.content[0].text], usage: final.usage, stop: final.stop_reason,
  counted: counted.input_tokens, refused,
}));
"""


@needs_packages
async def test_anthropics_client_for_javascript(gateway: Gateway, tmp_path: Path) -> None:
    found = json.loads(
        await run_javascript(
            ANTHROPIC, tmp_path, ANTHROPIC_BASE_URL=gateway.served.url, ANTHROPIC_API_KEY=gateway.key, MODEL=MODEL
        )
    )
    assert [each.lower().split() for each in found["said"]] == [RECITED[:5]] * 2
    assert (found["usage"]["output_tokens"], found["stop"]) == (5, "max_tokens")
    assert found["counted"] > 0
    assert found["refused"] == [
        ["NotFoundError", 404, "MODEL_NOT_FOUND"],
        ["AuthenticationError", 401, "UNAUTHORIZED"],
    ]


VERCEL = """
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
const { URL: baseURL, KEY: apiKey, MODEL: model } = process.env;
const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "lucid", baseURL, apiKey, includeUsage: true });
const found = {};
const faults = {};
for (const [name, each] of Object.entries({
  chat: openai.chat(model), responses: openai.responses(model), completion: compatible.completionModel(model),
  compatible: compatible(model), anthropic: createAnthropic({ baseURL, apiKey })(model),
})) {
  const asked = { model: each, prompt: "go on", maxOutputTokens: 5, maxRetries: 0 };
  const whole = await generateText(asked);
  const stream = streamText({ ...asked, onError: ({ error }) => { faults[name] = error.name; } });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  found[name] = [whole.text, text, whole.usage.outputTokens, (await stream.usage).outputTokens];
}
const refused = await generateText({ model: compatible("none"), prompt: "go on", maxRetries: 0 })
  .catch((error) => [error.name, error.statusCode, JSON.parse(error.responseBody).error.code]);
console.log(JSON.stringify({ found, faults, refused }));
"""


@needs_packages
async def test_vercels_sdk_with_each_of_its_providers(gateway: Gateway, tmp_path: Path) -> None:
    """Chats, completions, responses and messages, whole and streamed, with their tokens.

    The SDK misses `created_at` in the first event of llama.cpp's responses, says so, and reads on.
    """
    url = f"{gateway.served.url}/v1"
    told: dict[str, Any] = json.loads(await run_javascript(VERCEL, tmp_path, URL=url, KEY=gateway.key, MODEL=MODEL))
    assert told["faults"] in ({}, {"responses": "AI_TypeValidationError"})
    assert told["refused"] == ["AI_APICallError", 404, "MODEL_NOT_FOUND"]
    for name, (whole, streamed, *tokens) in told["found"].items():
        assert tokens == [5, 5], name
        assert whole.lower().split() == streamed.lower().split(), name
        assert len(streamed.split()) == 5, name
    assert sorted(told["found"]) == ["anthropic", "chat", "compatible", "completion", "responses"]
