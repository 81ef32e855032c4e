"""How the dashboard is used: by address, on a phone, by keyboard or by ear, in the dark, and with the service away."""

from __future__ import annotations

from tests.browser import PHONE, Chromium, Page
from tests.dashboard import CONTRAST, Watched, tab_to, value_of, wait_for_value


def test_an_address_leads_back_to_what_it_showed(own: Watched, page: Page) -> None:
    """Filters, pages and spans stand in it; going back and forth works; an unknown one says so."""
    for number in range(3):
        own.beat(own.add_node(f"node-{number}", region="eu" if number else "us"))
    own.log_in(page, "/nodes?region=eu&sort=name")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 2")
    assert page.texts(".rows tbody th") == ["node-1", "node-2"]
    assert page.run("document.querySelector('#filter-region').value") == "eu"
    page.click(".rows tbody th a")
    page.wait_for_text("node-1", "h1")
    page.run("[...document.querySelectorAll('.choice button')].find((found) => found.innerText === '7 d').click()")
    page.wait_for("location.search === '?span=7d'")
    page.run("history.back()")
    page.wait_for_text("Nodes", "h1")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 2")
    page.fill("#filter-search", "node-2")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 1")
    page.go(f"{own.url}/nodes/no-such")
    page.wait_for_text("No such node", "h1")
    page.go(f"{own.url}/elsewhere")
    page.wait_for_text("There is no such page", "h1")


def test_a_long_list_comes_page_by_page(own: Watched, page: Page) -> None:
    """The service pages it: the table never holds more than fifty."""
    for number in range(53):
        own.add_node(f"node-{number:02}")
    own.log_in(page, "/nodes?sort=name")
    page.wait_for_text("\u201350 of 53 nodes", ".pager")
    page.run("[...document.querySelectorAll('.pager button')].find((found) => found.innerText === 'Next').click()")
    page.wait_for_text("51\u201353 of 53 nodes", ".pager")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 3")
    assert page.run("new URLSearchParams(location.search).get('page')") == "2"


def test_a_provider_sees_its_own_nodes_and_an_admin_all(watched: Watched, page: Page, chromium: Chromium) -> None:
    """As the API has it."""
    watched.add_node("acmes", owner="acme")
    theirs = watched.add_node("globexes", owner="globex")
    watched.log_in(page, "/nodes", key=watched.new_key("compute"))
    page.wait_for_text("1\u20131 of 1 node", ".pager")
    assert page.texts(".rows tbody th") == ["acmes"]
    page.wait_for_text("acme", ".who")
    page.go(f"{watched.url}/nodes/{theirs}")
    page.wait_for_text("No such node", "h1")
    with chromium.page() as admins:
        watched.log_in(admins, "/nodes")
        admins.wait_for_text("1\u20132 of 2 nodes", ".pager")
        admins.wait_for_text("all owners", ".who")


def test_a_service_that_is_away_is_said_to_be_and_found_again(watched: Watched, page: Page) -> None:
    """What was known stays in sight; nothing has to be loaded anew."""
    node = watched.add_node("the-node")
    watched.beat(node)
    watched.log_in(page, "/nodes")
    page.wait_for_text("the-node", ".rows")
    port = watched.served.url.rpartition(":")[2]
    watched.served.stop()
    page.wait_for_text("The service does not answer", ".banner")
    assert "the-node" in page.text(".rows")
    watched.served._environment["LUCID_PORT"] = port
    watched.served.start()
    watched.served.wait_until_ready()
    page.wait_for("!document.querySelector('.banner')")
    page.wait_for_text("the-node", ".rows")


def test_records_that_cannot_be_read_are_said_where_they_are_missing(own: Watched, page: Page) -> None:
    """What comes from memory stays live beside them, and no banner comes and goes."""
    own.beat(own.add_node("the-node"))
    own.log_in(page)
    page.wait_for("document.querySelectorAll('.chart').length === 8")
    page.run("""new MutationObserver(() => { window.banners ||= document.querySelector('.banner'); })
        .observe(document.body, { childList: true, subtree: true })""")
    with own.records_held_back():
        page.wait_for_text("As it was last known.", "[aria-label='Over time']")
        page.wait_for_text("The records can't be read at the moment.", "[aria-label='Last hour']")
        own.beat(own.add_node("another"))
        wait_for_value(page, "healthy", "2")
        assert page.text(".live") == "live"
    page.wait_for("!document.querySelector('.failure')")
    assert not page.run("Boolean(window.banners)")


def test_an_age_goes_on_between_two_readings(watched: Watched, page: Page) -> None:
    """Also while the service does not answer: nothing looks fresher than it is."""
    node = watched.add_node("the-node")
    watched.beat(node)
    watched.log_in(page, f"/nodes/{node}")
    page.wait_for_text("heartbeat", ".figures")
    watched.served.kill()
    page.wait_for_text("The service does not answer", ".banner")
    shown = value_of(page, "heartbeat")
    page.wait_for(
        f"{shown!r} !== [...document.querySelectorAll('.figure')].find((found) => "
        "found.querySelector('dt').innerText === 'heartbeat').querySelector('.value').innerText"
    )


def test_colours_are_the_systems_until_others_are_chosen(own: Watched, page: Page) -> None:
    """Dark and light, with enough contrast in both; a choice lasts."""
    own.add_model("in-the-dark")
    page.prefer("dark")
    own.log_in(page)
    page.wait_for_text("Fleet", "h1")
    dark = page.run("getComputedStyle(document.documentElement).backgroundColor")
    assert page.run(CONTRAST) >= 4.5
    page.prefer("light")
    page.wait_for(f"getComputedStyle(document.documentElement).backgroundColor !== {dark!r}")
    assert page.run(CONTRAST) >= 4.5
    page.click("[aria-label='Switch to dark colours']")
    page.wait_for(f"getComputedStyle(document.documentElement).backgroundColor === {dark!r}")
    page.go(own.url)
    assert page.run("getComputedStyle(document.documentElement).backgroundColor") == dark


def test_a_phone_shows_everything_without_scrolling_sideways(own: Watched, page: Page) -> None:
    """Tables become lists; no view is wider than the screen."""
    node = own.add_node("a-node-with-a-rather-long-name-that-goes-on-and-on-for-quite-a-while-to-be-broken")
    own.add_model("a/model-with-a-long-name-" + "x" * 60, minVramGb=100)
    own.beat(node)
    page.resize(PHONE)
    own.log_in(page)
    for path in (
        "",
        "/nodes",
        f"/nodes/{node}",
        "/models",
        "/models/a%2Fmodel-with-a-long-name-" + "x" * 60,
        "/payouts",
    ):
        page.go(f"{own.url}{path}")
        page.wait_for("!document.querySelector('.loading') && Boolean(document.querySelector('h1'))")
        assert page.run("document.documentElement.scrollWidth") <= PHONE.width, path


def test_the_keyboard_is_enough(own: Watched, page: Page) -> None:
    """Log in, skip, go from link to link, filter and come back, with the focus in sight at every step."""
    node = own.add_node("the-node")
    own.beat(node)
    page.go(own.url)
    page.wait_for("document.activeElement?.id === 'key'")
    page.type(own.key)
    page.press("Tab")
    page.press(" ")  # shows the key
    assert page.run("document.querySelector('#key').type") == "text"
    page.press("Tab")
    page.press("Enter")
    page.wait_for_text("Fleet", "h1")
    page.wait_for_text("All nodes")
    page.run("document.activeElement.blur()")
    tab_to(page, "Skip to the content")
    page.press("Enter")
    assert page.run("document.activeElement.id") == "main"
    page.press("Tab")
    assert page.run("document.activeElement.innerText") == "All nodes"
    page.press("Enter")
    page.wait_for_text("Nodes", "h1")
    page.wait_for_text("the-node", ".rows")
    tab_to(page, "the-node")
    page.press("Enter")
    page.wait_for_text("the-node", "h1")
    page.wait_for("document.activeElement.tagName === 'H1'")
    tab_to(page, "6 h")
    page.press(" ")
    page.wait_for("location.search === '?span=6h'")


def test_a_screen_reader_is_told_what_there_is(own: Watched, page: Page) -> None:
    """Landmarks, headings, names of fields and buttons, and charts by their titles with their tables."""
    own.beat(own.add_node("the-node"))
    own.log_in(page)
    page.wait_for_text("Nodes by state", ".charts")
    page.wait_for_text("All nodes")
    told = page.accessible()
    roles = {role for role, _ in told}
    assert {"banner", "navigation", "main", "heading", "figure"} <= roles
    assert ("navigation", "Sections") in told
    assert ("figure", "Latency") in told
    assert any(role == "image" and name.startswith("1 healthy, 0 unhealthy") for role, name in told)
    assert all(name for role, name in told if role in {"button", "link", "textbox", "combobox", "searchbox"})
    page.go(f"{own.url}/nodes")
    page.wait_for_text("the-node", ".rows")
    told = page.accessible()
    assert {"table", "columnheader", "rowheader", "search"} <= {role for role, _ in told}
    assert all(name for role, name in told if role in {"button", "link", "textbox", "combobox", "searchbox"})


def test_what_others_named_is_shown_and_never_run(own: Watched, page: Page) -> None:
    """A node's name is anyone's text."""
    name = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    node = own.add_node(name)
    own.log_in(page, f"/nodes/{node}")
    page.wait_for_text(name, "h1")
    assert "owned" not in page.run("document.title").replace(name, "")
    assert page.run("document.querySelectorAll('main img, main script').length") == 0


def test_an_address_that_means_harm_or_nothing_shows_a_page(shared: Watched, page: Page) -> None:
    """One that was cut in an encoded sign, and ones that lead out of the part of the API that the view asks."""
    shared.log_in(page)
    for path, said in {
        "/models/%E0%A4%A": "No such model",
        "/nodes/%": "No such node",
        "/models/..%2F..%2Fkeys": "No such model",
        "/models/..%2f": "No such model",
        "/nodes/..%2F..%2Fkeys": "No such node",
        "/nodes/x?status=%3Cb%3E&page=-5&span=__proto__": "No such node",
    }.items():
        page.go(f"{shared.url}{path}")
        page.wait_for_text(said, "h1")
    asked = [one["url"].removeprefix(shared.served.url) for one in page.requests()]
    assert not [path for path in asked if path.startswith("/keys")]
    assert not [fault for fault in page.faults() if "exception" in fault.lower()]


def test_going_back_after_logging_out_shows_nothing(shared: Watched, page: Page) -> None:
    """Also where the browser has kept the page before, as it was."""
    node = shared.add_node("the-node")
    shared.log_in(page, f"/nodes/{node}")
    page.wait_for_text("the-node", "h1")
    page.go(f"{shared.url}/models")
    page.wait_for_text("Models", "h1")
    page.run("[...document.querySelectorAll('button')].find((found) => found.innerText === 'Log out').click()")
    page.wait_for_text("Log in", "h1")
    page.run("history.back()")
    page.wait_for(f"location.pathname.endsWith('{node}')")
    page.wait_for_text("Log in", "h1")
    assert "the-node" not in page.text()


def test_a_page_that_nobody_looks_at_asks_for_nothing(own: Watched, page: Page) -> None:
    """It goes on at once when it is looked at again."""
    own.add_model("unseen")
    own.log_in(page)
    page.wait_for_text("Models nobody can get")
    page.run("Object.defineProperty(document, 'hidden', { configurable: true, get: () => window.isAway ?? false })")
    page.run("window.isAway = true")
    page.run("new Promise((done) => setTimeout(() => done(true), 500))")
    asked = len(page.requests())
    page.run("new Promise((done) => setTimeout(() => done(true), 4000))")
    assert len(page.requests()) == asked
    page.run("window.isAway = false; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for("true")
    page.run("new Promise((done) => setTimeout(() => done(true), 300))")
    assert len(page.requests()) > asked
