"""The dashboard below a test: a service with nodes, and what a person reads off its page."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from threading import Thread
from typing import Any

import httpx

from lucid_compute.postgres.database import connect
from lucid_compute.server.dashboard.site import ADDRESS, Site
from tests.browser import Page
from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import Served

NODE = {"gpu": "NVIDIA A100", "vram": "80GB", "region": "us-east-1", "runtimes": ["vllm"], "maxConcurrency": 8}

# The session is as any of the service's, which would be ended for waiting so long.
_HOLD_BACK = "SET idle_in_transaction_session_timeout = 0; BEGIN; LOCK TABLE job_minutes IN ACCESS EXCLUSIVE MODE"


class Watched:
    """A service with a few nodes, as their providers speak to it.

    With an `owner` the page is looked at as that provider, who sees its own nodes alone: so tests share a service.
    """

    def __init__(self, served: Served, owner: str | None = None) -> None:
        self.served = served
        self.owner = owner
        self.url = f"{served.url}/dashboard"
        headers = {"Authorization": f"Bearer {served.admin_key}"}
        self.http = httpx.Client(base_url=served.url, headers=headers, trust_env=False)
        self.key = served.admin_key if owner is None else self.new_key("compute", owner=owner)

    def new_key(self, *scopes: str, owner: str = "acme") -> str:
        """A new key."""
        return str(self.post("/keys", {"name": "a key", "owner": owner, "scopes": list(scopes)})["key"])

    def add_node(self, name: str, *, owner: str | None = None, **metadata: Any) -> str:
        """Register a node; return its id."""
        body = {**GUIDE_PASSPORT, "name": name, "metadata": {**GUIDE_PASSPORT["metadata"], **NODE, **metadata}}
        owner = owner or self.owner
        return str(self.post("/passports", {**body, **({"owner": owner} if owner else {})})["id"])

    def add_model(self, name: str, **metadata: Any) -> str:
        """Register a model; return its id."""
        body = {"name": name, "type": "model", "metadata": {"format": "safetensors", **metadata}}
        return str(self.post("/passports", body)["id"])

    def beat(self, node: str, **changes: Any) -> None:
        """Let a node be heard."""
        body = {"passportId": node, "status": "healthy", "load": 0.42, "availableModels": ["m"], "queueDepth": 3}
        self.post("/compute/heartbeat", {**body, **changes})

    def fall_silent(self, node: str) -> None:
        """Let a node's last heartbeat be three minutes old."""
        asyncio.run(self.served.fall_silent(node, 180))

    def is_in_state(self, node: str, state: str, *, seconds_ago: float) -> None:
        """Let it be recorded that a node has been in a state since then, and in none before."""

        async def record() -> None:
            connection = await connect(self.served.database_url, application="lucid tests")
            try:
                await connection.execute("DELETE FROM node_states WHERE node_id = $1", node)
                statement = "INSERT INTO node_states VALUES ($1, now() - make_interval(secs => $2), $3, 'admin')"
                await connection.execute(statement, node, seconds_ago, state)
            finally:
                await connection.close()

        asyncio.run(record())

    @contextmanager
    def records_held_back(self) -> Iterator[None]:
        """Let nobody read the records of jobs for as long as the block runs."""
        with asyncio.Runner() as runner:
            connection = runner.run(connect(self.served.database_url, application="lucid tests"))
            try:
                runner.run(connection.execute(_HOLD_BACK))
                yield
            finally:
                runner.run(connection.close())

    def post(self, path: str, body: Any = None) -> Any:
        """Do something over the API."""
        answer = self.http.post(path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    def log_in(self, page: Page, path: str = "", key: str | None = None) -> None:
        """Go to an address of the dashboard, and log in there."""
        page.go(f"{self.url}{path}")
        page.wait_for_text("Log in", "h1")
        page.fill("#key", self.key if key is None else key)
        page.press("Enter")
        page.wait_for("Boolean(document.querySelector('.sections'))")

    def log_in_anew(self, page: Page, path: str, key: str) -> None:
        """Log out, and in with another key."""
        page.run("sessionStorage.clear()")
        self.log_in(page, path, key)


@contextmanager
def static_site() -> Iterator[str]:
    """The dashboard's files alone, as the service sends them: return the address of the page."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, found, rest = self.path.partition(f"{ADDRESS}/assets/")
            asset = site.find(*rest.split("/", 1)) if found else site.index
            self.send_response(200 if asset else 404)
            for name, value in (asset.headers if asset else {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(asset.body if asset else b"")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{ADDRESS}"
        finally:
            server.shutdown()
            thread.join()


def value_of(page: Page, figure: str) -> str:
    """What a figure of the page says, by its label."""
    return str(
        page.run(f"""[...document.querySelectorAll('.figure')].find((found) =>
            found.querySelector('dt').innerText === {figure!r})?.querySelector('.value').innerText ?? ''""")
    )


def wait_for_value(page: Page, figure: str, value: str) -> None:
    """Return once a figure says so."""
    page.wait_for(f"""[...document.querySelectorAll('.figure')].some((found) =>
        found.querySelector('dt').innerText === {figure!r} &&
        found.querySelector('.value').innerText === {value!r})""")


def press_button(page: Page, text: str, within: str = "body") -> None:
    """Press the button that shows the text, once it can be pressed."""
    found = f"[...document.querySelectorAll({within + ' button'!r})].find((one) => one.innerText.trim() === {text!r})"
    page.wait_for(f"{found} && !{found}.disabled")
    page.run(f"{found}.click()")


def tab_to(page: Page, text: str) -> None:
    """Press Tab until what shows the text has the focus, and see that it is seen to have it."""
    _tab_until(page, "document.activeElement.innerText?.trim()", text)


def tab_to_field(page: Page, element_id: str) -> None:
    """Press Tab until the field with this id has the focus, and see that it is seen to have it."""
    _tab_until(page, "document.activeElement.id", element_id)


def _tab_until(page: Page, expression: str, wanted: str) -> None:
    for _ in range(60):
        page.press("Tab")
        if page.run(expression) == wanted:
            assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"no way to {wanted!r} by Tab; the focus is on {page.run('document.activeElement.outerHTML')}")


# Which of axe-core's rules: those of WCAG 2.2, levels A and AA, and good practice.
_AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@cache
def _axe() -> str:
    return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


def axe_faults(page: Page) -> list[str]:
    """Return the faults that axe-core finds on the page: the rule, and the element."""
    if page.run("typeof axe") == "undefined":
        page.run(_axe() + "; true")
    told = page.run(f"axe.run(document, {{ runOnly: {_AXE_TAGS}, resultTypes: ['violations'] }})")
    return [f"{rule['id']}: {node['html'][:150]}" for rule in told["violations"] for node in rule["nodes"]]


# The least contrast (WCAG 2) of any text with the colour behind it.
CONTRAST = """(() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => numbers(colour).slice(0, 3).map((part) => part / 255)
        .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
        .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
    const behind = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const colour = getComputedStyle(each).backgroundColor;
            if ((numbers(colour)[3] ?? 1) > 0.9) return colour;
        }
        return getComputedStyle(document.documentElement).backgroundColor;
    };
    const texts = [...document.querySelectorAll('body *')].filter((element) => element.checkVisibility()
        && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
        && !element.closest('.dot, :disabled'));
    return Math.min(...texts.map((element) => {
        const [one, other] = [light(getComputedStyle(element).color), light(behind(element))];
        return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    }));
})()"""

# Faults of a page for those who don't see it or can't point well, by axe's rules: names of what can be used,
# unique ids, references that lead somewhere, headings in order, lists and tables, and targets of 24 pixels.
A11Y = """(() => {
    const seen = (element) => element.checkVisibility() && !element.closest('[aria-hidden=true]');
    const all = (selector) => [...document.querySelectorAll(selector)].filter(seen);
    const call = (element) => element.outerHTML.slice(0, 120);
    const named = (element) => element.getAttribute('aria-label')?.trim()
        || [...(element.labels ?? [])].map((label) => label.innerText.trim()).join('')
        || element.innerText?.trim() || element.title;
    const faults = [];
    const fault = (rule, element) => faults.push(`${rule}: ${call(element)}`);
    const usable = all('a[href], button, input, select, textarea, summary, [tabindex="0"]');
    for (const element of usable) if (!named(element) && !element.matches('pre')) fault('no name', element);
    const ids = all('[id]').map((element) => element.id);
    for (const element of all('[id]')) if (ids.filter((id) => id === element.id).length > 1) fault('id twice', element);
    for (const name of ['aria-labelledby', 'aria-describedby', 'aria-controls', 'for'])
        for (const element of all(`[${name}]`))
            if (!element.getAttribute(name).split(' ').every((id) => document.getElementById(id))) fault(name, element);
    const within = document.querySelector('dialog[open]') ? 'dialog ' : '';
    let level = within ? 1 : 0;
    for (const element of all(['h1', 'h2', 'h3', 'h4'].map((one) => within + one).join())) {
        if (Number(element.tagName[1]) > level + 1) fault('heading skips', element);
        level = Number(element.tagName[1]);
    }
    for (const element of all('ul, ol'))
        if ([...element.children].some((one) => one.tagName !== 'LI')) fault('list', element);
    for (const element of all('dialog, nav, section, form[role]'))
        if (!element.ariaLabel && !element.hasAttribute('aria-labelledby')) fault('region', element);
    for (const element of all('table')) if (!element.caption) fault('caption', element);
    for (const element of all('button, select, input:not([type=checkbox]), summary')) {
        const { width, height } = element.getBoundingClientRect();
        if (width < 23.5 || height < 23.5) fault(`target ${Math.round(width)}x${Math.round(height)}`, element);
    }
    return faults;
})()"""
