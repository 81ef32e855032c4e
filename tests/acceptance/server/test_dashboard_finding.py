"""Finding things on the dashboard, copying them, and doing what it says: by keyboard, by column, by command."""

from __future__ import annotations

import re
import subprocess

from tests.browser import Page
from tests.dashboard import Watched
from tests.lucid_serve import LUCID
from tests.test_dashboard_files import STATIC


def test_a_slash_leads_to_finding_a_node_by_its_id(own: Watched, page: Page) -> None:
    """From any page; in the list of nodes by its own field; Escape empties the field, then leaves it."""
    nodes = [own.add_node(f"node-{number}") for number in range(3)]
    own.log_in(page, "/models?search=no-such-model")
    page.wait_for_text("Models", "h1")
    page.wait_for_text("No model is like that.")
    page.run("document.activeElement.blur()")
    page.press("/")
    page.wait_for("document.activeElement.id === 'find'")
    page.press("Escape")
    page.wait_for("document.activeElement === document.body")
    page.go(f"{own.url}/nodes")
    page.wait_for_text("node-1")
    page.press("/")
    page.wait_for("document.activeElement.id === 'filter-search'")
    page.go(own.url)
    page.wait_for_text("Fleet", "h1")
    page.press("/")
    page.wait_for("document.activeElement.id === 'find'")
    page.type(f" {nodes[1][:13]} ")
    page.press("Enter")
    page.wait_for_text("Nodes", "h1")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 1")
    assert page.texts(".rows tbody th") == ["node-1"]
    assert page.run("new URLSearchParams(location.search).get('search')") == nodes[1][:13]


def test_columns_order_the_list_and_stand_in_the_address(own: Watched, page: Page) -> None:
    """The highest first, then the lowest; the column says which; going back to the address brings it back."""
    for name, load in (("a", 0.5), ("b", 0.9), ("c", 0.1)):
        own.beat(own.add_node(name), load=load)
    own.log_in(page, "/nodes")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 3")
    by_load = "[...document.querySelectorAll('.sort')].find((found) => found.innerText.startsWith('Load'))"
    for order, expected, direction in (("-load", "bac", "descending"), ("load", "cab", "ascending")):
        page.run(f"{by_load}.click()")
        page.wait_for(
            f"[...document.querySelectorAll('.rows tbody th')].map((one) => one.innerText).join('') === '{expected}'"
        )
        assert page.run("new URLSearchParams(location.search).get('sort')") == order
        assert page.run(f"{by_load}.closest('th').ariaSort") == direction
    page.go(f"{own.url}/nodes?sort=-load")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 3")
    assert page.texts(".rows tbody th") == ["b", "a", "c"]
    assert page.run("document.querySelector('#filter-order').value") == "-load"


def test_what_is_copied_is_what_is_shown_and_never_the_key(own: Watched, page: Page) -> None:
    """An id, and a request whose key is a variable's; also where a page may not use the clipboard."""
    node = own.add_node("the-node")
    own.log_in(page, f"/nodes/{node}")
    page.wait_for_text("What to fix")
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("[aria-label='Copy the id']")
    page.wait_for_text("Copied", ".lead")
    assert page.run("window.copied") == node
    page.click("[aria-label='Copy this as a curl command']")
    page.wait_for(f"window.copied.includes('/compute/health/{node}')")
    assert "$LUCID_API_KEY" in page.run("window.copied")
    assert own.key not in page.run("window.copied")
    page.run("navigator.clipboard.writeText = async () => { throw new Error('not here'); }")
    page.run("document.execCommand = (what) => { window.copied = getSelection().toString(); return true; }")
    page.click("[aria-label='Copy the id']")
    page.wait_for(f"window.copied === '{node}'")


def test_commands_that_the_dashboard_gives_are_commands() -> None:
    """The command line knows each of them and each of its options, and none lacks an option that it requires."""
    text = "".join(path.read_text() for path in STATIC.glob("*.js"))
    given = set(re.findall(r"\blucid ((?:(?:agent|keys|passports) )?[a-z]+)([^`\"<\n]*)", text))
    assert {command for command, _ in given} >= {"agent run", "doctor", "resume", "jobs", "keys create"}
    for command, rest in given:
        told = subprocess.run([LUCID, *command.split(), "--help"], capture_output=True, text=True, check=False)
        assert told.returncode == 0, command
        options = set(re.findall(r"--[a-z-]+", rest))
        for option in options:
            assert option in told.stdout, (command, option)
        if options:  # else the command is only named
            assert options >= set(re.findall(r"\* +(--[a-z-]+)", told.stdout)), command


def test_the_first_view_asks_for_nothing_twice(own: Watched, page: Page) -> None:
    """What is asked before the page's modules are there is what the view then uses."""
    own.beat(own.add_node("the-node"))
    own.add_model("maker/model")
    own.log_in(page)
    for path, there in (
        ("", "document.querySelectorAll('.chart').length === 8"),
        ("/nodes", "document.querySelectorAll('.rows tbody tr').length === 1"),
        ("/models/maker%2Fmodel", "document.querySelectorAll('.could li').length === 1"),
    ):
        page.go(f"{own.url}{path}")
        page.wait_for(there)
        assert page.run("[...(window.lucidEarly?.asked ?? new Map()).keys()]") == [], path
