"""The dashboard in a real Chromium, on a real service: who gets in, and what is seen of nodes and models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import Chromium, Page
from tests.dashboard import Watched, value_of, wait_for_value
from tests.lucid_serve import serving_on_a_clone


@pytest.fixture(scope="module")
def empty(postgres_and_template: tuple[str, str]) -> Iterator[Watched]:
    """A service in which nothing is registered, for the tests of logins."""
    with serving_on_a_clone(postgres_and_template) as served:
        opened = Watched(served)
        yield opened
        opened.http.close()


def test_a_wrong_key_is_refused_with_what_to_do_and_a_right_one_kept_in_the_tab(empty: Watched, page: Page) -> None:
    """It never stands in an address, in a cookie or in what outlives the tab; logging out forgets it."""
    page.go(empty.url)
    page.wait_for_text("Log in", "h1")
    for wrong, said in {
        "nonsense": "This key is not valid",
        "two words": "no spaces",
    }.items():
        page.fill("#key", wrong)
        page.press("Enter")
        page.wait_for_text(said, "[role=alert]")
        assert page.run("document.activeElement.id") == "key"
    page.fill("#key", empty.served.admin_key)
    page.press("Enter")
    page.wait_for_text("Nothing is registered yet")
    assert empty.served.admin_key not in page.run("location.href + document.cookie + JSON.stringify({...localStorage})")
    assert not [asked for asked in page.requests() if empty.served.admin_key in asked["url"]]
    assert {asked["url"].split("/")[2] for asked in page.requests()} == {empty.served.url.split("/")[2]}
    page.go(empty.url)
    page.wait_for_text("Nothing is registered yet")  # loaded anew, still logged in
    page.run("[...document.querySelectorAll('button')].find((found) => found.innerText === 'Log out').click()")
    page.wait_for_text("Log in", "h1")
    assert page.run("sessionStorage.length") == 0


def test_another_tab_is_not_logged_in(empty: Watched, page: Page, chromium: Chromium) -> None:
    """A tab forgets its key when it is closed, and no other has it."""
    empty.log_in(page)
    with chromium.page() as other:
        other.go(empty.url)
        other.wait_for_text("Log in", "h1")


def test_a_login_is_kept_on_the_device_only_when_that_is_wanted(empty: Watched, page: Page) -> None:
    """Another tab of the browser is logged in then, until one logs out."""
    page.go(empty.url)
    page.wait_for_text("Log in", "h1")
    page.fill("#key", empty.served.admin_key)
    page.click("#keep")
    page.click("button[type=submit]")
    page.wait_for_text("Nothing is registered yet")
    page.run("sessionStorage.clear()")  # as in another tab
    page.go(empty.url)
    page.wait_for_text("Nothing is registered yet")
    page.run("[...document.querySelectorAll('button')].find((found) => found.innerText === 'Log out').click()")
    page.wait_for_text("Log in", "h1")
    assert page.run("localStorage.length + sessionStorage.length") == 0


def test_a_key_that_is_revoked_logs_out_with_the_reason(empty: Watched, page: Page) -> None:
    """And not with an empty page."""
    made = empty.post("/keys", {"name": "short-lived", "owner": "acme", "scopes": ["passports:read"]})
    empty.log_in(page, key=made["key"])
    page.wait_for_text("Fleet", "h1")
    assert empty.http.delete(f"/keys/{made['id']}").is_success
    page.wait_for_text("This key is no longer valid", "[role=alert]")


def test_a_node_dies_and_recovers_before_ones_eyes(watched: Watched, page: Page) -> None:
    """The page is not touched meanwhile: counts, list, reasons and events follow by themselves."""
    node = watched.add_node("the-node")
    watched.add_model("m")
    watched.beat(node)
    watched.log_in(page)
    wait_for_value(page, "healthy", "1")
    wait_for_value(page, "available", "1")
    watched.fall_silent(node)
    wait_for_value(page, "unhealthy", "1")
    wait_for_value(page, "healthy", "0")
    wait_for_value(page, "available", "0")
    page.wait_for_text("see whether the sender still runs", ".pair")
    watched.beat(node)
    wait_for_value(page, "healthy", "1")
    wait_for_value(page, "unhealthy", "0")
    page.wait_for_text("Every node is well", ".pair")


def test_a_nodes_page_says_what_to_fix(own: Watched, page: Page) -> None:
    """The reasons in the service's words, and what the node said of itself, while it lasts."""
    node = own.add_node("the-node")
    gpu = {"index": 0, "name": "A100", "utilization": 0.7, "memoryUsedMb": 40960, "memoryTotalMb": 81920}
    own.beat(node, gpus=[gpu])
    own.log_in(page, f"/nodes/{node}")
    page.wait_for_text("healthy", ".heading .status")
    assert value_of(page, "load") == "42 %"
    assert value_of(page, "queue") == "3"
    assert "40 GB of 80 GB" in page.text(".gpu")
    assert not page.text(".fix")
    own.beat(node, status="unhealthy", detail="the server answers 500")
    page.wait_for_text("REPORTED_UNHEALTHY", ".fix")
    assert "the server answers 500" in page.text(".fix")
    assert f"lucid doctor {node}" in page.text(".fix")
    page.wait_for_text("unhealthy", ".heading .status")
    own.post(f"/compute/deregister/{node}")
    page.wait_for_text("This node has ended")


def test_what_stopped_is_not_called_well_and_told_from_what_vanished(own: Watched, page: Page) -> None:
    """Both are nodes to look after; the fix of a reported drain is the agent's start, of an operator's `resume`."""
    stopped, vanished, drained = (own.add_node(name) for name in ("stopped-one", "vanished-one", "drained-one"))
    own.beat(stopped, status="draining", detail="the agent is stopping")
    own.beat(vanished)
    own.beat(drained)
    own.post(f"/compute/drain/{drained}")
    own.log_in(page, f"/nodes/{stopped}")
    page.wait_for_text("lucid agent run", ".fix")
    assert "lucid resume" not in page.text(".fix")
    for node in (stopped, vanished):
        own.fall_silent(node)
    page.wait_for_text("stopped", ".heading .status")
    assert "lucid agent run" in page.text(".fix")
    assert "lucid resume" not in page.text(".fix")
    assert "HEARTBEAT_STALE" not in page.text(".fix")
    page.go(f"{own.url}/nodes/{drained}")
    page.wait_for_text(f"lucid resume {drained}", ".fix")
    page.go(own.url)
    wait_for_value(page, "unhealthy", "2")
    wait_for_value(page, "draining", "1")
    page.wait_for_text("stopped-one", ".pair")
    page.wait_for_text("vanished-one", ".pair")
    assert sorted(page.texts(".pair .list .status")) == ["▲\nunhealthy", "◇\nstopped"]


def test_a_node_that_is_known_for_seconds_has_no_verdict(own: Watched, page: Page) -> None:
    """Only since when it is known; and a legend shows no value of a step that is over for long."""
    node = own.add_node("the-node")
    own.beat(node)
    own.is_in_state(node, "healthy", seconds_ago=44)
    own.log_in(page, f"/nodes/{node}")
    page.wait_for_text("since ", "[aria-label=Uptime]")
    shown = page.text("[aria-label=Uptime]")
    assert "100 %" not in shown
    assert "error budget" not in shown
    module = page.run("[...document.querySelectorAll('link')].find((link) => link.href.endsWith('/chart.js')).href")
    series = "[[1, null, null], [1, 2, null], [1, null, 3], [1], []]"
    steps = page.run(f"import('{module}').then((chart) => {series}.map((values) => chart.lastStep([['', values]])))")
    assert steps == [1, 1, 2, 0, None]


def test_a_charts_numbers_can_be_read(own: Watched, page: Page) -> None:
    """Every chart has its figures in a table; they are the API's."""
    node = own.add_node("the-node")
    for _ in range(3):
        own.beat(node)
    own.log_in(page, f"/nodes/{node}")
    page.wait_for_text("GPU and load", ".charts")
    page.wait_for("""[...document.querySelectorAll('.chart')].some((found) =>
        found.querySelector('h3').innerText === 'GPU and load' && found.querySelector('canvas'))""")
    page.run("""[...document.querySelectorAll('.chart')].find((found) =>
        found.querySelector('h3').innerText === 'GPU and load').id = 'load'""")
    page.click("#load summary")
    page.wait_for("document.querySelectorAll('#load tbody tr').length > 1")
    heads = page.texts("#load thead th")
    assert heads == ["From", "GPU busy", "load"]
    cells = {row.split("\t")[-1] for row in page.texts("#load tbody tr")}
    assert "42 %" in cells
    told = own.http.get(f"/compute/metrics/{node}?series=load").json()["series"]["load"]
    assert 0.42 in told
    assert len(page.texts("#load tbody tr")) in {len(told), len(told) - 1}


def test_events_stand_in_line_with_the_charts(own: Watched, page: Page) -> None:
    """What happened is listed, and told where the mouse points in a chart."""
    node = own.add_node("the-node")
    own.beat(node)
    own.post(f"/compute/drain/{node}")
    own.log_in(page, f"/nodes/{node}")
    page.wait_for_text("drain began", ".events")
    page.wait_for_text("registered", ".events")
    page.wait_for("Boolean(document.querySelector('.chart canvas'))")
    page.point_at(".chart canvas", 0.98)
    page.wait_for_text("drain began", ".tooltip")
    page.wait_for_text("drain began", "[aria-label='Marks over the charts']")


def test_a_model_says_why_nobody_can_get_it_node_by_node(own: Watched, page: Page) -> None:
    """The reasons of each node, the nearest first, and a choice of one reason that stands in the address."""
    near, far = own.add_node("near", vram="200GB"), own.add_node("far", vram="24GB")
    own.add_model("meta-llama/Llama-3-70B", minVramGb=100)
    own.beat(far)
    own.log_in(page, "/models/meta-llama%2FLlama-3-70B")
    page.wait_for_text("Nobody can run it right now", ".answer")
    assert page.texts(".explained tbody th") == ["near", "far"]
    assert "HEARTBEAT_MISSING" in page.texts(".explained tbody tr")[0]
    assert "needs 100 GB of VRAM; the node has 24 GB" in page.texts(".explained tbody tr")[1]
    assert page.run("document.querySelectorAll('.group[aria-expanded=true]').length") == 0
    page.run("""[...document.querySelectorAll('.group')].find((found) =>
        found.innerText.includes('too little VRAM')).click()""")
    page.wait_for("document.querySelectorAll('.explained tbody tr').length === 1")
    assert page.run("location.search") == "?reason=VRAM_TOO_LOW"
    own.beat(near)
    page.wait_for_text("nobody serves it", ".answer")
    page.wait_for_text("near", ".could")
    own.beat(near, availableModels=["meta-llama/Llama-3-70B"])
    page.wait_for_text("You can get it now", ".answer")
