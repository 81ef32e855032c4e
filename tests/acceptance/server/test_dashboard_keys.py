"""Keys and the playground on the dashboard: each action once, with its refusal."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import PHONE, Page
from tests.dashboard import A11Y, CONTRAST, Watched, press_button
from tests.llama import Llama, llama_server
from tests.lucid_serve import eventually

MODEL = "my-model"
ROW = "[...document.querySelectorAll('.rows tbody tr')].find((row) => row.innerText.includes({name!r}))"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """A real inference server."""
    with llama_server(tmp_path_factory.mktemp("llama"), model=MODEL) as llama:
        yield llama


@pytest.fixture
def node(shared: Watched, llama: Llama) -> str:
    """A node that serves the model, with a fresh heartbeat."""
    found = shared.http.get("/compute", params={"search": "chatting"}).json()["nodes"]
    if not found:
        shared.add_model(MODEL, format="gguf")
    node = found[0]["id"] if found else shared.add_node("chatting", inferenceUrl=llama.url, runtimes=["llama.cpp"])
    shared.beat(node, availableModels=[MODEL])
    return str(node)


def press_in_row(page: Page, name: str, button: str) -> None:
    """Press a button in the row of a key."""
    page.wait_for(f"Boolean({ROW.format(name=name)})")
    page.run(
        f"[...{ROW.format(name=name)}.querySelectorAll('button')].find((one) => one.innerText === {button!r}).click()"
    )


def test_a_key_is_made_limited_rotated_and_revoked(shared: Watched, page: Page) -> None:
    """It is shown once; what it may, its limits and its end are the API's."""
    shared.log_in(page, "/keys")
    press_button(page, "Make a key", "main")
    page.wait_for("document.activeElement.id === 'field-name'")
    page.type("for the shop")
    page.fill("#field-owner", "shop")
    page.fill("#field-requestsPerMinute", "none")
    page.press("Enter")
    page.wait_for("Boolean(document.querySelector('dialog [role=alert], dialog [aria-invalid=true]'))")
    page.fill("#field-requestsPerMinute", "30")
    page.run("""(() => {
        const field = document.querySelector('#field-expiresAt');
        field.value = '30';
        field.dispatchEvent(new Event('change', { bubbles: true }));
    })()""")
    press_button(page, "Make it", "dialog")
    page.wait_for_text("It is shown only now", "dialog")
    key = page.text("dialog pre")
    assert shared.http.get("/models", headers={"Authorization": f"Bearer {key}"}).is_success
    [made] = [one for one in shared.http.get("/keys").json()["keys"] if one["name"] == "for the shop"]
    assert (made["scopes"], made["limits"]["requestsPerMinute"], made["owner"]) == (["inference:run"], 30, "shop")
    assert made["expiresAt"]
    press_button(page, "Close", "dialog")
    press_in_row(page, "for the shop", "Rotate")
    page.wait_for_text("24 hours", "dialog")
    page.click("dialog input[type=checkbox]")
    press_button(page, "Rotate", "dialog")
    page.wait_for_text("It is shown only now", "dialog")
    rotated = page.text("dialog pre")
    assert rotated != key
    assert shared.http.get("/models", headers={"Authorization": f"Bearer {key}"}).status_code == 401
    page.press("Escape")
    page.wait_for("!document.querySelector('dialog')")
    press_in_row(page, "for the shop", "Revoke")
    page.wait_for("document.activeElement.id === 'field-word'")
    assert page.run("document.querySelector('dialog .danger').disabled")
    page.type("for the shop")
    page.press("Enter")
    page.wait_for(f"!{ROW.format(name='for the shop')}")
    assert shared.http.get("/models", headers={"Authorization": f"Bearer {rotated}"}).status_code == 401


def test_a_key_is_edited_and_changed_back(shared: Watched, page: Page) -> None:
    """Its name, end and limits: only what was changed is sent; a limit that is no number is refused at its field."""
    limits = {"requestsPerMinute": 30, "budgetUsd": "20", "budgetPeriod": "month", "models": ["llama-*"]}
    body = {"name": "to edit", "owner": "shop", "scopes": ["inference:run"], "limits": limits}
    key = shared.post("/keys", body)

    def read() -> dict[str, Any]:
        [found] = [one for one in shared.http.get("/keys?owner=shop").json()["keys"] if one["id"] == key["id"]]
        return dict(found)

    before = read()
    shared.log_in(page, "/keys?owner=shop")
    press_in_row(page, "to edit", "Edit")
    page.wait_for("document.activeElement.id === 'field-name'")
    assert page.run("document.querySelector('dialog [type=submit]').disabled")
    page.fill("#field-requestsPerMinute", "many")
    page.press("Enter")
    page.wait_for("document.querySelector('#field-requestsPerMinute').ariaInvalid === 'true'")
    page.fill("#field-requestsPerMinute", "600")
    page.fill("#field-concurrency", "4")
    page.click("#field-budgetUsd")
    page.run("document.activeElement.select()")
    page.press("Backspace")
    page.run("""(() => {
        const field = document.querySelector('#field-expiresAt');
        field.value = '90';
        field.dispatchEvent(new Event('change', { bubbles: true }));
    })()""")
    page.fill("#field-name", "edited")
    page.press("Enter")
    page.wait_for_text("to edit was changed", ".undo")
    after = read()
    assert (after["name"], bool(after["expiresAt"])) == ("edited", True)
    assert after["limits"] == {
        **dict.fromkeys(before["limits"]),
        "requestsPerMinute": 600,
        "concurrency": 4,
        "models": ["llama-*"],
    }
    assert shared.http.get("/models", headers={"Authorization": f"Bearer {key['key']}"}).is_success
    press_button(page, "Undo", ".undo")
    page.wait_for(f"Boolean({ROW.format(name='to edit')})")
    page.wait_for("!document.querySelector('.undo')")
    assert {**read(), "lastUsedAt": None} == {**before, "lastUsedAt": None}


def test_keys_need_an_admin_which_the_page_says(shared: Watched, page: Page) -> None:
    shared.log_in(page, "/keys", key=shared.new_key("compute"))
    page.wait_for_text("This key lacks the scope admin", "main [role=alert]")
    press_button(page, "Make a key", "main")
    page.fill("#field-name", "mine")
    page.fill("#field-owner", "acme")
    page.press("Enter")
    page.wait_for_text("This key lacks the scope admin", "dialog [role=alert]")


def test_a_model_answers_in_the_playground_with_node_and_speed(shared: Watched, page: Page, node: str) -> None:
    """Streamed, with the job's id, which the records know; and the tab "why" ranks the nodes."""
    shared.log_in(page, f"/playground?model={MODEL}")
    page.wait_for_text("Say something to the model")
    page.fill("[aria-label=Message]", "Say hello.")
    page.press("Enter")
    page.wait_for_text("tokens a second", ".turn-assistant")
    said = page.text(".turn-assistant")
    assert "first token after" in said
    assert page.run("document.querySelector('.turn-assistant a').pathname").endswith(node)
    job = page.text(".turn-assistant code")

    async def is_recorded() -> bool:
        return job in {one["id"] for one in shared.http.get("/compute/jobs").json()["jobs"]}

    asyncio.run(eventually(is_recorded))
    press_button(page, "Why?", "main")
    page.wait_for_text("chatting", "main table")
    page.wait_for_text("Expected wait", "main table")


def test_a_refusal_stands_in_the_conversation(shared: Watched, page: Page, node: str) -> None:
    """A key without the scope, and a model that nobody knows: the service's sentence, and the chat goes on."""
    shared.log_in(page, f"/playground?model={MODEL}", key=shared.new_key("passports:read"))
    page.fill("[aria-label=Message]", "Hello")
    page.press("Enter")
    page.wait_for_text("lacks the scope", ".turn-assistant [role=alert]")
    press_button(page, "Why?", "main")
    page.wait_for_text("lacks the scope", "main [role=alert]")
    page.go(f"{shared.url}/playground?model=no-such-model")
    page.fill("[aria-label=Message]", "Hello")
    page.press("Enter")
    page.wait_for("Boolean(document.querySelector('.turn-assistant [role=alert]'))")


def test_the_request_as_python_runs_and_says_what_the_page_says(
    shared: Watched, page: Page, node: str, tmp_path: Path
) -> None:
    """As curl too; no key stands in any of them."""
    shared.log_in(page, f"/playground?model={MODEL}&tab=code")
    environment = {"LUCID_API_KEY": shared.served.admin_key, "PATH": "/usr/bin:/bin"}
    page.wait_for_text("curl", "main pre")
    answer = subprocess.run(["bash", "-c", page.text("main pre")], env=environment, capture_output=True, check=True)
    assert json.loads(answer.stdout)["choices"]
    press_button(page, "Python", "main")
    page.wait_for_text("openai", "main pre")
    (tmp_path / "request.py").write_text(page.text("main pre"))
    ran = subprocess.run([sys.executable, tmp_path / "request.py"], env=environment, capture_output=True, check=True)
    assert ran.stdout.strip()
    press_button(page, "TypeScript", "main")
    page.wait_for_text("baseURL", "main pre")
    assert shared.served.admin_key not in page.text()


@pytest.mark.parametrize("path", ["/keys", f"/playground?model={MODEL}", f"/playground?model={MODEL}&tab=why"])
def test_keys_and_playground_are_legible_and_named(shared: Watched, page: Page, node: str, path: str) -> None:
    """On a phone in the dark and on a desk in the light: width, contrast, names and targets."""
    page.prefer("dark")
    page.resize(PHONE)
    shared.log_in(page, path)
    page.wait_for("!document.querySelector('.loading') && Boolean(document.querySelector('main h2, main table'))")
    assert page.run("document.documentElement.scrollWidth") <= PHONE.width
    assert page.run(CONTRAST) >= 4.5
    assert page.run(A11Y) == []
    page.prefer("light")
    page.wait_for("document.documentElement.dataset.theme === 'light'")
    assert page.run(CONTRAST) >= 4.5
