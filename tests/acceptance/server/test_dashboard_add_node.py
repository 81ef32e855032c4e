"""Adding a node on the dashboard: the command that it shows is run, until the page says that requests can be sent."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser import Page
from tests.dashboard import CONTRAST, Watched, press_button
from tests.llama import llama_server
from tests.lucid_serve import LUCID

MODEL = "my-model"


@contextmanager
def running(command: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as it is typed in the folder of a clone."""
    (folder / ".venv").symlink_to(Path(LUCID).parents[1])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["bash", "-c", command], cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        subprocess.run(["kill", "--", f"-{process.pid}"], check=False)
        process.wait()


def open_dialog(page: Page) -> None:
    """Press the button that adds a node."""
    page.wait_for_text("Add a node", "main")
    page.click("main a.button.primary")
    page.wait_for("document.activeElement.id === 'field-name'")


def test_a_node_is_added_by_running_what_the_page_shows(shared: Watched, page: Page, tmp_path: Path) -> None:
    """A key of the owner, one command with it, and every check until a request was sent."""
    shared.log_in(page)
    with llama_server(tmp_path, model=MODEL) as llama:
        open_dialog(page)
        page.fill("#field-owner", "acme")
        page.fill("#field-url", llama.url)
        page.press("Enter")
        page.wait_for_text("Waiting for the node to register", ".steps")
        command = page.text("dialog pre")
        assert f"LUCID_API_URL={shared.served.url}" in command
        with running(command, tmp_path):
            page.wait_for_text("no registered model yet", ".steps")
            assert page.run(CONTRAST) >= 4.5
            press_button(page, "Register it", ".steps")
            page.wait_for_text("Requests can be sent", ".steps")
            assert page.run("document.querySelectorAll('.step-ok').length") == 6
            press_button(page, "Send one", ".steps")
            page.wait_for("document.querySelector('.steps q')?.innerText.length > 0")
    [key] = [key for key in shared.http.get("/keys").json()["keys"] if key["name"] == "node gpu-1"]
    assert (key["owner"], key["scopes"]) == ("acme", ["compute"])
    [node] = shared.http.get("/compute", params={"search": "gpu-1"}).json()["nodes"]
    assert node["owner"] == "acme"
    page.click("dialog a.button")
    page.wait_for_text("gpu-1", "h1")
    page.wait_for("!document.querySelector('dialog')")


def test_a_provider_adds_a_node_by_curl_with_the_key_of_its_login(shared: Watched, page: Page, tmp_path: Path) -> None:
    """Its key makes no keys, which the page says; and a node that can't be reached is not called ready."""
    key = shared.new_key("compute", owner="globex")
    shared.log_in(page, "/nodes", key=key)
    open_dialog(page)
    page.wait_for_text("Only an admin can make keys", "dialog")
    assert "keys create 'node gpu-1' --owner globex --scope compute" in page.text("dialog pre")
    press_button(page, "curl", "dialog")
    page.fill("#field-name", "by-hand")
    page.fill("#field-url", "http://127.0.0.1:65001")
    page.fill("#field-vram", "24GB")
    page.press("Enter")
    page.wait_for_text("Waiting for the node to register", ".steps")
    command = page.text("dialog pre")
    assert key in command
    with running(command, tmp_path) as process:
        page.wait_for_text("could not be connected to", ".steps")
        assert "It declares no model yet" in page.text(".steps")
        assert "Requests can be sent" not in page.text(".steps")
        assert process.poll() is None
    [node] = shared.http.get("/compute", params={"search": "by-hand"}).json()["nodes"]
    assert node["owner"] == "globex"
    assert node["health"]["status"] == "healthy"


def test_a_refusal_stands_at_its_field_and_another_key_can_be_used(shared: Watched, page: Page) -> None:
    """In the service's own words; Escape closes the dialog, and the focus returns to where it was."""
    shared.log_in(page, "/nodes")
    open_dialog(page)
    page.fill("#field-owner", "x" * 300)
    page.press("Enter")
    page.wait_for("document.querySelector('#field-owner').ariaInvalid === 'true'")
    assert page.text("#field-owner-note")
    page.fill("#field-key", "lk_live_another")
    page.press("Enter")
    page.wait_for_text("LUCID_API_KEY=lk_live_another", "dialog pre")
    page.press("Escape")
    page.wait_for("!document.querySelector('dialog')")
    page.wait_for("location.search === ''")


@pytest.mark.parametrize("way", ["This copy", "pip", "Docker", "systemd", "curl"])
def test_every_way_is_a_command_that_a_shell_reads(shared: Watched, page: Page, way: str) -> None:
    """Also with names that a shell would take apart; the address, the name and the key are in it."""
    shared.log_in(page, "/nodes?add=node")
    page.wait_for("document.activeElement.id === 'field-name'")
    name = "it's; a $(node)"
    page.fill("#field-name", name)
    page.fill("#field-owner", "acme")
    press_button(page, way, "dialog")
    page.fill("#field-vram", "24GB")
    press_button(page, "Make a key and show the command", "dialog")
    page.wait_for_text("Waiting for the node", ".steps")
    command = page.text("dialog pre")
    told = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert "it'\\''s; a $(node)" in command
    if way == "This copy":
        said = f"lucid() {{ printf '%s\\n' \"$@\"; }}; {command.replace('.venv/bin/lucid', 'lucid')}"
        words = subprocess.run(["bash", "-c", said], capture_output=True, text=True, check=True).stdout.splitlines()
        assert words[words.index("--name") + 1] == name
    assert "lk_live_" in command
    assert shared.served.url in command


@pytest.mark.parametrize(("way", "shown"), [("This copy", " --outbound"), ("systemd", "LUCID_AGENT_OUTBOUND=true")])
def test_a_node_behind_a_firewall_connects_by_itself(shared: Watched, page: Page, way: str, shown: str) -> None:
    """Then no address of it is asked for, and the agent is told so; by hand that can't be done."""
    shared.log_in(page, "/nodes?add=node")
    page.wait_for("document.activeElement.id === 'field-name'")
    press_button(page, way, "dialog")
    page.fill("#field-publicUrl", "http://127.0.0.1:65002")
    assert "can't be reached from the service (NAT, firewall)" in page.text("dialog")
    page.run("document.querySelector('#outbound').focus()")
    page.press(" ")
    page.wait_for("!document.querySelector('#field-publicUrl')")
    assert "curl" not in page.texts("dialog .choice button")
    page.fill("#field-owner", "acme")
    press_button(page, "Make a key and show the command", "dialog")
    page.wait_for_text("Waiting for the node", ".steps")
    command = page.text("dialog pre")
    assert shown in command
    assert "65002" not in command
    told = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
