"""The dashboard by axe-core's rules: each page, in both themes, from a phone to a wide screen."""

from __future__ import annotations

import pytest

from tests.browser import DESK, PHONE, Page, Size
from tests.dashboard import Watched, axe_faults

WIDE = Size(2560, 1400)
LOOKS = [("light", PHONE), ("dark", DESK), ("light", WIDE), ("dark", PHONE), ("light", DESK), ("dark", WIDE)]
PATHS = [
    "",
    "/nodes",
    "/nodes/{node}",
    "/models",
    "/models/a-model",
    "/models/a-model?reason=VRAM_TOO_LOW",
    "/playground",
    "/jobs",
    "/events",
    "/usage",
    "/payouts",
    "/webhooks",
    "/keys",
    "/keys?add=key",
    "/audit",
    "/settings",
    "/nodes?add=node",
]


@pytest.fixture(scope="module")
def node(shared: Watched) -> str:
    """A node with events, beside a model that it serves and one that it can't."""
    shared.add_model("a-model", minVramGb=100)
    shared.add_model("m")
    node = shared.add_node("the-node")
    shared.beat(node)
    shared.add_node("silent")
    shared.new_key("inference:run")
    return node


def faults_in_every_look(page: Page) -> dict[str, list[str]]:
    """Return what axe finds on the page as it is, by theme and width."""
    found = {}
    for scheme, size in LOOKS:
        page.prefer(scheme)
        page.resize(size)
        page.wait_for(f"document.documentElement.dataset.theme === {scheme!r} && innerWidth === {size.width}")
        found[f"{scheme} {size.width}"] = axe_faults(page)
        if page.run("document.documentElement.scrollWidth") > size.width:
            found[f"{scheme} {size.width}"].append("scrolls sideways")
    return {look: faults for look, faults in found.items() if faults}


@pytest.mark.parametrize("path", PATHS)
def test_axe_finds_no_fault(shared: Watched, page: Page, node: str, path: str) -> None:
    """Names, roles, contrast, landmarks, order of headings, labels and targets; no page scrolls sideways."""
    shared.beat(node)
    shared.log_in(page, path.format(node=node))
    page.wait_for("!document.querySelector('.loading') && Boolean(document.querySelector('main h1'))")
    assert faults_in_every_look(page) == {}


def test_axe_finds_no_fault_in_the_login(shared: Watched, page: Page) -> None:
    page.go(shared.url)
    page.wait_for_text("Log in", "h1")
    assert faults_in_every_look(page) == {}


def test_a_fault_is_found(shared: Watched, page: Page) -> None:
    """The rules run: a button without a name and grey text on grey are told."""
    page.go(shared.url)
    page.wait_for_text("Log in", "h1")
    page.run("""(() => {
        const [button, text] = [document.createElement('button'), document.createElement('p')];
        text.innerText = 'hardly seen';
        Object.assign(text.style, { color: '#999', background: '#aaa' });
        document.querySelector('main').append(button, text);
    })()""")
    assert {fault.split(":")[0] for fault in axe_faults(page)} == {"button-name", "color-contrast"}
