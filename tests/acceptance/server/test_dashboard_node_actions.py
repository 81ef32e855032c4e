"""What is done to nodes on the dashboard: each action once, with its refusal, by button and by keyboard."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from lucid_compute.gateway.breakers import FAILURES_TO_OPEN
from tests.browser import DESK, PHONE, Page, Size
from tests.dashboard import A11Y, CONTRAST, Watched, press_button, tab_to
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, open_gateway
from tests.lucid_serve import eventually

READ_ONLY = "This key lacks the scope"


@contextmanager
def busy_node(watched: Watched) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """A node that never answers a request that it has: its id, its name, and what ends the request."""
    told: queue.Queue[tuple[str, str, Callable[[], object]]] = queue.Queue()
    done = threading.Event()

    async def serve() -> None:
        async with open_gateway(watched.served) as gateway, FaultNode(Behaviour(delay_seconds=120)) as server:
            model = await gateway.add_model()
            node = await gateway.add_node(server.url, model)
            request = asyncio.create_task(gateway.chat(model))

            async def is_busy() -> bool:
                return bool((await gateway.health(node))["inFlight"])

            await eventually(is_busy)
            name = (await gateway.admin.get(f"/passports/{node}")).json()["name"]
            loop = asyncio.get_running_loop()
            told.put((node, name, lambda: loop.call_soon_threadsafe(request.cancel)))
            while not done.is_set():
                await asyncio.sleep(0.05)
                with suppress(AssertionError):  # a node that has ended sends no more
                    await gateway.beat(node, model)
            request.cancel()
            await asyncio.wait([request])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield told.get(timeout=30)
    finally:
        done.set()
        thread.join()


def test_a_drain_shows_what_is_in_flight_and_can_be_undone(shared: Watched, page: Page) -> None:
    """Before, during and after; and why the node would be sent no request now."""
    with busy_node(shared) as (node, _, end):
        shared.log_in(page, f"/nodes/{node}")
        page.wait_for_text("● yes", "[aria-label='Would it be sent a request now?']")
        press_button(page, "Drain", ".actions")
        page.wait_for_text("1 request in flight now ends as usual", "dialog")
        press_button(page, "Drain", "dialog")
        page.wait_for_text("Draining: 1 request in flight", ".actions")
        page.wait_for_text("DRAINING", "[aria-label='Would it be sent a request now?']")
        end()
        page.wait_for_text("Drained: no request runs on it", ".actions")
        press_button(page, "Resume", ".actions")
        page.wait_for_text("healthy", ".heading .status")
        page.wait_for("!document.querySelector('.actions').innerText.includes('Resume')")


def test_a_node_is_deregistered_by_its_name_and_not_while_a_request_runs(shared: Watched, page: Page) -> None:
    """The service's sentence stands in the dialog; once nothing is in flight, it is done."""
    with busy_node(shared) as (node, name, end):
        shared.log_in(page, f"/nodes/{node}")
        press_button(page, "Deregister", ".actions")
        page.wait_for_text("1 request is in flight now", "dialog")
        assert page.run("document.querySelector('dialog .danger').disabled")
        page.type(name)
        page.press("Enter")
        page.wait_for_text("request", "dialog [role=alert]")
        assert shared.http.get(f"/compute/health/{node}").is_success
        end()
        page.wait_for_text("No request is in flight now", "dialog")
        press_button(page, "Deregister", "dialog")
        page.wait_for_text("This node has ended")
    assert shared.http.get(f"/compute/health/{node}").status_code == 410


def test_price_and_limit_are_saved_and_refused_at_their_fields(shared: Watched, page: Page) -> None:
    node = shared.add_node("priced")
    shared.log_in(page, f"/nodes/{node}")
    press_button(page, "Price and limit", ".actions")
    page.wait_for("document.activeElement.id === 'field-pricePer1kTokens'")
    page.type("a lot")
    page.press("Enter")
    page.wait_for("document.querySelector('#field-pricePer1kTokens').ariaInvalid === 'true'")
    page.fill("#field-pricePer1kTokens", "0.002")
    page.fill("#field-maxConcurrency", "4")
    page.press("Enter")
    page.wait_for("!document.querySelector('dialog')")
    page.wait_for_text("$0.002 for 1,000 tokens", "[aria-label='What it is']")
    metadata = shared.http.get(f"/passports/{node}").json()["metadata"]
    assert (metadata["pricePer1kTokens"], metadata["maxConcurrency"]) == ("0.002", 4)
    assert metadata["region"] == "us-east-1"  # what was left alone stays
    press_button(page, "Undo", ".actions")
    page.wait_for("!document.querySelector('.undo')")
    restored = shared.http.get(f"/passports/{node}").json()["metadata"]
    assert "pricePer1kTokens" not in restored
    assert (restored["maxConcurrency"], restored["region"]) == (8, "us-east-1")


def test_declared_models_are_replaced(shared: Watched, page: Page) -> None:
    """With context and quantization; the same one twice is refused in the dialog."""
    node = shared.add_node("declaring")
    shared.add_model("known-model")
    shared.log_in(page, f"/nodes/{node}")
    page.wait_for_text("It declares no model", "[aria-label='What it is']")
    press_button(page, "Models", ".actions")
    for number, name in enumerate(("known-model", "known-model"), 1):
        press_button(page, "Add a model", "dialog")
        page.wait_for(f"document.querySelectorAll('.model-line').length === {number}")
        page.fill(f".model-line:nth-of-type({number}) input", name)
    page.press("Enter")
    page.wait_for("Boolean(document.querySelector('dialog [role=alert]'))")
    page.fill(".model-line:nth-of-type(2) input", "unknown-model")
    page.fill(".model-line:nth-of-type(1) input:nth-of-type(2)", "8192")
    page.fill(".model-line:nth-of-type(1) input:nth-of-type(3)", "awq-4bit")
    page.press("Enter")
    page.wait_for("!document.querySelector('dialog')")
    page.wait_for_text("nobody can ask for it", "[aria-label='What it is']")
    models = shared.http.get(f"/compute/models/{node}").json()["models"]
    assert [(one["id"], one["maxTokens"], one["quantization"]) for one in models] == [
        ("known-model", 8192, "awq-4bit"),
        ("unknown-model", None, None),
    ]
    press_button(page, "Undo", ".actions")
    page.wait_for("!document.querySelector('.undo')")
    assert shared.http.get(f"/compute/models/{node}").json()["models"] == []


def test_a_probe_says_what_it_found(shared: Watched, page: Page) -> None:
    node = shared.add_node("unreachable", inferenceUrl="http://127.0.0.1:65001/v1")
    shared.log_in(page, f"/nodes/{node}")
    page.wait_for_text("none in this tab yet")
    press_button(page, "Probe", ".actions")
    page.wait_for_text("▲ not reached", "[aria-label='What it is']")
    press_button(page, "Probe", ".actions")  # too early: a host is probed once in ten seconds
    page.wait_for("Boolean(document.querySelector(\"[aria-label='What it is'] [role=alert]\"))")


@pytest.mark.parametrize("action", ["Drain", "Price and limit", "Models"])
def test_a_key_that_may_only_read_is_told_which_scope_is_missing(shared: Watched, page: Page, action: str) -> None:
    node = shared.add_node(f"read-only-{action}", owner="acme")
    shared.log_in(page, f"/nodes/{node}", key=shared.new_key("passports:read"))
    press_button(page, action, ".actions")
    page.wait_for("Boolean(document.querySelector('dialog[open]'))")
    press_button(page, {"Drain": "Drain"}.get(action, "Save"), "dialog")
    page.wait_for_text(READ_ONLY, "dialog [role=alert]")
    assert "compute" in page.text("dialog [role=alert]")


def test_several_nodes_are_drained_and_resumed_at_once(shared: Watched, page: Page) -> None:
    """By keyboard; one that can't be is named with the reason, and stops no other."""
    nodes = {name: shared.add_node(name, region="bulk") for name in ("bulk-a", "bulk-b", "bulk-c")}
    for node in nodes.values():
        shared.beat(node)
    shared.log_in(page, "/nodes?region=bulk&sort=name")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 3")
    for row in (1, 2):
        page.run(f"document.querySelectorAll('.rows input')[{row - 1}].focus()")
        page.press(" ")
    page.wait_for_text("2 selected", ".bulk")
    shared.post(f"/compute/deregister/{nodes['bulk-a']}")
    press_button(page, "Drain", ".bulk")
    page.wait_for_text("Drain: 2 nodes", "dialog")
    press_button(page, "Drain", "dialog")
    page.wait_for("[...document.querySelectorAll('dialog li')].every((one) => one.querySelector('[class^=tone]'))")
    first, second = page.texts("dialog li")
    assert "deregistered" in first
    assert "done" in second

    def states() -> list[str]:
        health = [shared.http.get(f"/compute/health/{nodes[name]}").json() for name in ("bulk-b", "bulk-c")]
        return [state["status"] for state in health]

    assert states() == ["draining", "healthy"]
    press_button(page, "Undo: resume them", "dialog")
    page.wait_for_text("Resume: 2 nodes", "dialog")
    press_button(page, "Resume", "dialog")
    page.wait_for("[...document.querySelectorAll('dialog li')].every((one) => one.querySelector('[class^=tone]'))")
    assert states() == ["healthy", "healthy"]
    press_button(page, "Close", "dialog")
    page.wait_for("!document.querySelector('.bulk')")


def test_several_nodes_are_priced_probed_and_deregistered_at_once(shared: Watched, page: Page) -> None:
    """What is final asks for their number; a price that is none is refused for each; probes say what they found."""
    nodes = [
        shared.add_node(name, region="ending", inferenceUrl="http://127.0.0.1:65002") for name in ("end-a", "end-b")
    ]
    shared.log_in(page, "/nodes?region=ending")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 2")
    page.run("document.querySelectorAll('.rows input').forEach((box) => box.click())")
    outcomes = "[...document.querySelectorAll('dialog li')].every((one) => one.querySelector('[class^=tone]'))"
    for price, said in (("a lot", "metadata.pricePer1kTokens"), ("0.004", "done")):
        press_button(page, "Price and limit", ".bulk")
        assert page.run("document.querySelector('dialog .primary').disabled")
        page.fill("#field-pricePer1kTokens", price)
        press_button(page, "Price and limit", "dialog")
        page.wait_for(outcomes)
        assert all(said in line for line in page.texts("dialog li"))
        page.press("Escape")
        page.wait_for("!document.querySelector('dialog')")
        page.run("document.querySelectorAll('.rows input').forEach((box) => box.checked || box.click())")
    prices = [shared.http.get(f"/passports/{node}").json()["metadata"]["pricePer1kTokens"] for node in nodes]
    assert prices == ["0.004", "0.004"]
    press_button(page, "Probe", ".bulk")
    press_button(page, "Probe", "dialog")
    page.wait_for(outcomes)
    press_button(page, "Close", "dialog")
    page.wait_for("!document.querySelector('dialog')")
    page.run("document.querySelectorAll('.rows input').forEach((box) => box.checked || box.click())")
    press_button(page, "Deregister", ".bulk")
    page.wait_for("document.activeElement.id === 'field-word'")
    assert page.run("document.querySelector('dialog .danger').disabled")
    page.type("2 nodes")
    page.press("Enter")
    page.wait_for(outcomes)
    press_button(page, "Close", "dialog")
    page.wait_for_text("No node is like that")
    assert {shared.http.get(f"/compute/health/{node}").status_code for node in nodes} == {410}


def test_several_nodes_are_refused_to_a_key_that_may_only_read(shared: Watched, page: Page) -> None:
    shared.add_node("kept", owner="keeper")
    shared.log_in(page, "/nodes", key=shared.new_key("passports:read", owner="keeper"))
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 1")
    page.run("document.querySelector('.rows input').click()")
    press_button(page, "Deregister", ".bulk")
    page.wait_for("document.activeElement.id === 'field-word'")
    page.type("1 node")
    page.press("Enter")
    page.wait_for_text(READ_ONLY, "dialog li")


def test_an_idle_node_says_why_to_its_provider(shared: Watched, page: Page) -> None:
    """Without a registered model, with one that nobody asked for, and with an open breaker, and since when."""
    node, other = (shared.add_node(name, owner="acme", inferenceUrl="http://127.0.0.1:65003") for name in ("idle", "x"))
    shared.beat(node, availableModels=["idle-model"])
    would = "[aria-label='Would it be sent a request now?']"
    shared.log_in(page, f"/nodes/{node}", key=shared.new_key("compute"))
    page.wait_for_text("neither declares nor reports a registered model", would)
    shared.add_model("idle-model")
    page.wait_for_text("nobody asked for its models in the last hour", would)
    page.wait_for_text("place 1 of 1", would)
    page.wait_for_text("closed: it is sent requests", "[aria-label='What it is']")
    shared.beat(other, availableModels=["idle-model"])  # a breaker never blocks more than half of a model's nodes
    body = {"model": "idle-model", "messages": QUESTION, "lucid": {"nodeIds": [node]}}
    for _ in range(FAILURES_TO_OPEN):  # nothing listens there
        shared.http.post("/v1/chat/completions", json=body)
    page.wait_for_text("open since", "[aria-label='What it is']")
    page.wait_for_text("BREAKER_OPEN", would)
    page.wait_for_text("it may not be sent requests", would)


def test_dialogs_are_reached_by_keyboard_and_return_the_focus(shared: Watched, page: Page) -> None:
    node = shared.add_node("by-keyboard")
    shared.log_in(page, f"/nodes/{node}")
    page.wait_for_text("by-keyboard", "h1")
    tab_to(page, "Drain")
    page.press("Enter")
    page.wait_for("Boolean(document.activeElement.closest('dialog'))")
    page.press("Escape")
    page.wait_for("!document.querySelector('dialog')")
    assert page.run("document.activeElement.innerText") == "Drain"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK, Size(2560, 1400)], ids=["390", "1280", "2560"])
def test_the_nodes_page_is_legible_and_named_everywhere(shared: Watched, page: Page, scheme: str, size: Size) -> None:
    """At every width, in both themes: no sideways scrolling, contrast, names, labels, targets; dialogs too."""
    node = shared.add_node(f"wide-{scheme}-{size.width}")
    shared.beat(node)
    page.prefer(scheme)
    page.resize(size)
    shared.log_in(page, f"/nodes/{node}")
    page.wait_for_text("What happened", "main")
    page.wait_for("!document.querySelector('.loading')")
    for button in ("", "Drain", "Price and limit", "Models", "Deregister"):
        if button:
            press_button(page, button, ".actions")
            page.wait_for("Boolean(document.querySelector('dialog[open]'))")
        assert page.run("document.documentElement.scrollWidth") <= size.width, button
        assert page.run(CONTRAST) >= 4.5, button
        assert page.run(A11Y) == [], button
        if button:
            page.press("Escape")
            page.wait_for("!document.querySelector('dialog')")
