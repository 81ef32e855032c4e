"""The TypeScript client in Node: the code of the guides as it is written, against a real `lucid serve`."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from lucid_compute.client import AsyncLucid
from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import Served
from tests.node_js import code_blocks, run_node

# What the guide has its readers write themselves. An interval also runs at once: nobody waits for 30 seconds.
BEFORE = """
import { Lucid } from "./lucid.ts";
const lucid = new Lucid();
const getGPUUtilization = async () => 0.42;
const getQueueDepth = async () => 3;
const beats: Promise<void>[] = [];
const intervals: number[] = [];
globalThis.setInterval = ((task: () => Promise<void>, milliseconds: number) => {
  intervals.push(milliseconds);
  beats.push(task());
}) as unknown as typeof setInterval;
"""
BETWEEN = "await Promise.all(beats);"
DECLARED = """
const { models } = await lucid.compute.declaredModels(passport.id);
console.log("Declared:", JSON.stringify(models.map((model) => [model.id, model.maxTokens, model.quantization])));
"""
AFTER = 'console.log("Intervals:", JSON.stringify(intervals));'
_owners = count()


async def new_key(admin: AsyncLucid, *scopes: str) -> str:
    """The key of a new owner."""
    made = await admin.keys.create(name="k", owner=f"typescript-{next(_owners)}", scopes=scopes)
    return made.key


async def test_the_providers_guide_runs_as_it_is_written(served: Served, admin: AsyncLucid, tmp_path: Path) -> None:
    blocks = code_blocks("compute-providers")
    assert len(blocks) == 5
    program = f"\n{BETWEEN}\n".join([BEFORE, *blocks[:4], DECLARED, *blocks[4:], AFTER])
    key = await new_key(admin, "compute")
    ran = await run_node(program, tmp_path, LUCID_API_URL=served.url, LUCID_API_KEY=key)
    assert (ran.status, ran.errors) == (0, ""), ran
    said = dict(line.split(": ", 1) for line in ran.out.splitlines())
    node = await admin.passports.get(said["Compute node registered"])
    assert node.metadata == {**GUIDE_PASSPORT["metadata"], "vramGb": 80}
    assert (said["Status"], said["Jobs completed"], said["Intervals"]) == ("healthy", "0", "[30000]")
    assert float(said["Uptime"]) >= 0
    assert (said["Avg latency"], said["Error rate"]) == ("null ms", "null")
    assert json.loads(said["Declared"]) == [
        ["llama-3-70b", 4096, "fp16"],
        ["mistral-7b", 8192, "awq-4bit"],
        ["deepseek-coder-33b", 16384, "gptq"],
    ]
    events = [event.type async for event in admin.compute.events(node.id)]
    assert {"registered", "draining", "deregistered"} <= set(events)


MODELS = """
import { Lucid } from "./lucid.ts";
const lucid = new Lucid();
const names = async (available?: boolean) =>
  (await lucid.models.list({ available, search: "guide/" }).all()).map((model) => model.name).sort();
const explained = await lucid.models.availability("guide/waits");
const page = await lucid.models.list({ search: "guide/" }).page(2, 1);
console.log(JSON.stringify({
  available: await names(true),
  missing: await names(false),
  all: await names(),
  one: (await lucid.models.get("guide/api")).available,
  explained: [explained.available, explained.nodes.length],
  page: [page.items.length, page.pagination.total, page.pagination.page],
}));
"""


async def test_models_are_filtered_by_three_states_as_the_models_guide_says(
    served: Served, admin: AsyncLucid, tmp_path: Path
) -> None:
    """Names have slashes, and no key is needed."""
    await admin.passports.create(name="guide/api", type="model", metadata={"format": "api"})
    await admin.passports.create(name="guide/waits", type="model", metadata={"format": "gguf"})
    ran = await run_node(MODELS, tmp_path, LUCID_API_URL=served.url)
    assert (ran.status, ran.errors) == (0, ""), ran
    assert json.loads(ran.out) == {
        "available": ["guide/api"],
        "missing": ["guide/waits"],
        "all": ["guide/api", "guide/waits"],
        "one": True,
        "explained": [False, 0],
        "page": [1, 2, 2],
    }


REST = """
import { BudgetExceeded, Conflict, Forbidden, InvalidRequest, Lucid, LucidError, NotFound } from "./lucid.js";
const lucid = new Lucid({ baseUrl: process.argv[2] ?? process.env.URL, apiKey: process.env.KEY });
const limits = { concurrency: 2, budgetUsd: "1.5", budgetPeriod: "day", models: ["llama-*"] };
const key = await lucid.keys.create({ name: "k", owner: "javascript", scopes: ["inference:run"], limits });
const rotated = await lucid.keys.rotate(key.id, { now: true });
const consumer = new Lucid({ baseUrl: process.env.URL, apiKey: rotated.key });
const usage = await consumer.usage.get({ groupBy: ["day", "model"], from: "-7d" });
const csv = await consumer.usage.csv({ groupBy: [] });
const mine = await consumer.compute.jobs().all();
const errors = [];
const metadata = { vram: 8, inferenceUrl: "http://gpu" };
await lucid.passports.create({ name: "twice", type: "compute", metadata });
for (const call of [
  () => lucid.passports.create({ name: "twice", type: "compute", metadata }),
  () => lucid.passports.create({ name: "n", type: "compute" }),
  () => consumer.keys.list().all(),
  () => lucid.compute.health("another"),
]) {
  errors.push(await call().catch((error) => [error.name, error.code, error.status, typeof error.requestId]));
}
const matched = await consumer.match({ model: "none" }).catch((error) => error.code);
const changed = await lucid.passports.create({ name: "t", type: "tool" }, { idempotencyKey: "once" });
const again = await lucid.passports.create({ name: "t", type: "tool" }, { idempotencyKey: "once" });
await lucid.passports.update(changed.id, { description: "d" });
await lucid.passports.revoke(changed.id);
await lucid.keys.revoke(key.id);
console.log(JSON.stringify({
  limits: key.limits, budgets: usage.budgets.length, csv, mine, errors, matched, same: changed.id === again.id,
  status: (await lucid.passports.get(changed.id)).status,
}));
"""
STRIP = """
import { readFileSync, writeFileSync } from "node:fs";
import { stripTypeScriptTypes } from "node:module";
writeFileSync("{folder}/lucid.js", stripTypeScriptTypes(readFileSync("{folder}/lucid.ts", "utf8")));
"""


async def test_keys_usage_and_errors_are_those_of_the_contract_also_without_types(
    served: Served, tmp_path: Path
) -> None:
    """The file with its types erased is what browsers and older versions of Node run."""
    stripped = await run_node(STRIP.replace("{folder}", str(tmp_path)), tmp_path, suffix=".mjs")
    assert stripped.status == 0, stripped
    ran = await run_node(REST, tmp_path, suffix=".mjs", URL=served.url, KEY=served.admin_key)
    assert (ran.status, ran.errors) == (0, ""), ran
    found = json.loads(ran.out)
    assert found["limits"] == {
        "requestsPerMinute": None,
        "tokensPerMinute": None,
        "concurrency": 2,
        "budgetUsd": "1.5",
        "budgetPeriod": "day",
        "models": ["llama-*"],
    }
    assert (found["budgets"], found["mine"], found["same"], found["status"]) == (1, [], True, "revoked")
    assert found["csv"].startswith("requests,completed,errors,cancelled,tokensIn,tokensOut,priceUsd")
    assert found["errors"] == [
        ["Conflict", "PASSPORT_EXISTS", 409, "string"],
        ["InvalidRequest", "INVALID_REQUEST", 422, "string"],
        ["Forbidden", "FORBIDDEN", 403, "string"],
        ["NotFound", "NODE_NOT_FOUND", 404, "string"],
    ]
    assert found["matched"] == "MODEL_NOT_FOUND"
