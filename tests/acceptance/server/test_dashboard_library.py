"""The page's own library in a real Chromium, without a service: templates, keyed elements, hooks, axes and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import Chromium, Page, Size
from tests.dashboard import static_site

HOUR = 3_600_000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The page's address, for all tests of the module."""
    with static_site() as address:
        yield address


@pytest.fixture
def library(chromium: Chromium, address: str) -> Iterator[Page]:
    """A page with every export of the library in `lib`, and an empty element `room` to draw in."""
    with chromium.page() as page:
        page.go(address)
        page.wait_for_text("Log in", "h1")
        page.run("""(async () => {
            const folder = document.querySelector('link[rel=modulepreload]').href.replace(/[^/]+$/, '');
            const names = ['html.js', 'scales.js', 'plot.js', 'chart.js', 'format.js', 'zones.js'];
            window.lib = Object.assign({}, ...await Promise.all(names.map((name) => import(folder + name))));
            window.room = document.querySelector('#app');
            window.settled = () => new Promise((done) => setTimeout(done, 0));
            lib.render('', room);
        })()""")
        yield page
        assert page.faults() == []


def test_a_template_makes_elements_and_never_markup_of_text(library: Page) -> None:
    """Attributes, parts of attributes, spreads, what is left out, and lists in lists."""
    shown = library.run("""(() => {
        const { html, render } = lib;
        const Pair = ({ one, children }) => html`<b>${one}</b>${children}`;
        const text = '<img src=x onerror=alert(1)>';
        render(html`
            <p class="a ${'b'} c" title=${text} hidden=${false} aria-busy=${false} data-n=${0}
                    lang=${null} ...${{ id: 'it' }}>
                ${text} ${0}${false}${null}
                ${['x', ['y']]}
            </p>
            <${Pair} one=${1}><i>2</i></${Pair}>
            <svg viewBox="0 0 1 1"><path d="M0 0" /></svg>
        `, room);
        return [room.innerHTML, room.querySelector('path').namespaceURI];
    })()""")
    assert shown[0] == (
        '<p class="a b c" title="&lt;img src=x onerror=alert(1)&gt;" aria-busy="false" data-n="0" id="it">'
        "&lt;img src=x onerror=alert(1)&gt; 0xy</p><b>1</b><i>2</i>"
        '<svg viewBox="0 0 1 1"><path d="M0 0"></path></svg>'
    )
    assert shown[1] == "http://www.w3.org/2000/svg"
    said = library.run("""(() => { try { lib.html`<p><b>${1}</p>`; } catch (error) { return error.message; } })()""")
    assert said == "An element is not closed in: <p><b>${…}</p>"


def test_elements_follow_their_keys(library: Page) -> None:
    """An element moves with its key, and what was typed into it stays; a new one at the top moves no other."""
    moved = library.run("""(async () => {
        const { html, render, useState } = lib;
        let show;
        const List = () => {
            const [keys, setKeys] = useState(['a', 'b', 'c']);
            show = setKeys;
            return html`<ul>${keys.map((key) => html`<li key=${key}><input />${key}</li>`)}</ul>`;
        };
        render(html`<${List} />`, room);
        const items = () => [...room.querySelectorAll('li')];
        const before = Object.fromEntries(items().map((item) => [item.innerText, item]));
        before.b.firstChild.value = 'typed';
        show(['c', 'd', 'b']);
        await settled();
        const after = items();
        const changes = [];
        const observer = new MutationObserver((told) => changes.push(...told));
        observer.observe(room.querySelector('ul'), { childList: true });
        show(['new', 'c', 'd', 'b']);
        await settled();
        observer.disconnect();
        return {
            order: after.map((item) => item.innerText),
            same: after[0] === before.c && after[2] === before.b,
            typed: after[2].firstChild.value,
            isGone: !before.a.isConnected,
            insertions: changes.map(({ addedNodes }) => addedNodes.length),
        };
    })()""")
    assert moved == {"order": ["c", "d", "b"], "same": True, "typed": "typed", "isGone": True, "insertions": [1]}


def test_the_focus_stays_where_it_is_when_its_element_moves(library: Page) -> None:
    """With what is selected in it; and fields keep what is typed while all around them is drawn again."""
    kept = library.run("""(async () => {
        const { html, render, useState } = lib;
        let show;
        const List = () => {
            const [keys, setKeys] = useState(['a', 'b', 'c']);
            show = setKeys;
            return html`${keys.map((key) => html`<input key=${key} id=${key} />`)}`;
        };
        render(html`<${List} />`, room);
        const field = room.querySelector('#a');
        field.value = 'some text';
        field.focus();
        field.setSelectionRange(2, 6);
        show(['c', 'b', 'a']);
        await settled();
        return [document.activeElement.id, field.selectionStart, field.selectionEnd, room.lastChild === field];
    })()""")
    assert kept == ["a", 2, 6, True]


def test_effects_run_once_drawn_and_are_cleaned_up(library: Page) -> None:
    """Children's before their parents', only when what they are about changed, and at the end once more."""
    log = library.run("""(async () => {
        const { html, render, useEffect, useState } = lib;
        const log = [];
        let set, count = 0;
        const Inner = ({ about }) => {
            useEffect(() => {
                log.push(`inner ${about} ${Boolean(document.querySelector('#inner'))}`);
                return () => log.push(`inner ${about} ends`);
            }, [about]);
            return html`<i id="inner"></i>`;
        };
        const Outer = () => {
            const [state, setState] = useState({ about: 1, other: 0, isShown: true });
            set = (change) => setState((former) => ({ ...former, ...change }));
            count += 1;
            useEffect(() => log.push('outer'), []); // what it returns is no function, and is left alone
            return state.isShown && html`<${Inner} about=${state.about} />`;
        };
        render(html`<${Outer} />`, room);
        await settled();
        set({ other: 1 });
        set({ other: 2 });
        await settled();
        log.push(`drawn ${count}`);
        set({ about: 2 });
        await settled();
        set({ isShown: false });
        await settled();
        return log;
    })()""")
    assert log == ["inner 1 true", "outer", "drawn 2", "inner 1 ends", "inner 2 true", "inner 2 ends"]


def test_what_is_set_in_an_effect_or_at_an_end_is_drawn(library: Page) -> None:
    """Nothing that is set while the page is being drawn is lost; and one component's fault stops no other."""
    shown = library.run("""(async () => {
        const { html, render, useEffect, useState } = lib;
        let hide, harm;
        const Ends = ({ onEnd }) => { useEffect(() => onEnd, []); return 'here'; };
        const Faulty = () => {
            const [isHarmed, set] = useState(false);
            harm = set;
            if (isHarmed) throw new Error('on purpose');
            return 'fine';
        };
        const Outer = () => {
            const [text, setText] = useState('first');
            const [isShown, setShown] = useState(true);
            hide = () => setShown(false);
            useEffect(() => setText('second'), []);
            return html`<p>${text}</p>${isShown && html`<${Ends} onEnd=${() => setText('third')} />`}<${Faulty} />`;
        };
        window.onerror = () => true; // the test expects it
        render(html`<${Outer} />`, room);
        await settled();
        const texts = [room.innerText];
        harm(true);
        hide();
        await settled();
        return [...texts, room.innerText].map((text) => text.replace(/\\s+/g, ' '));
    })()""")
    assert shown == ["second herefine", "third fine"]


@pytest.mark.parametrize(
    ("highest", "is_whole", "expected"),
    [
        (1.44, False, [0, 0.5, 1, 1.5]),
        (36, True, [0, 20, 40]),
        (1, True, [0, 1]),
        (0, False, [0, 0.5, 1]),
        (0.0003, False, [0, 0.0001, 0.0002, 0.0003]),
        (99_999, False, [0, 50_000, 100_000]),
    ],
)
def test_the_top_mark_is_at_or_above_the_highest_value(
    library: Page, highest: float, is_whole: bool, expected: list[float]
) -> None:
    """Marks are round; of what is counted they are whole."""
    assert library.run(f"lib.valueMarks({highest}, 3, {json.dumps(is_whole)})") == expected


def test_marks_reach_every_value(library: Page) -> None:
    """From a millionth to a billion: the last one reaches the value, and there are few."""
    wrong = library.run("""Array.from({ length: 2000 }, (_, place) => 10 ** (place / 130 - 6)).filter((highest) => {
        const marks = lib.valueMarks(highest, 4);
        return marks.at(-1) < highest || marks.at(-2) >= highest || marks.length > 5;
    })""")
    assert wrong == []


def marks_of(page: Page, start: str, hours: float, most: int, zone: str) -> list[str]:
    """Return the marks of a span as the zone's clock shows them."""
    return list(
        page.run(f"""(() => {{
            const from = Date.parse({start!r});
            const style = {{ dateStyle: 'short', timeStyle: 'short', timeZone: {zone!r} }};
            const write = new Intl.DateTimeFormat('sv-SE', style);
            const {{ marks }} = lib.timeMarks(from, from + {hours} * {HOUR}, {most}, {zone!r});
            return marks.map((mark) => write.format(mark));
        }})()""")
    )


def test_times_are_round_on_the_clock_of_the_zone(library: Page) -> None:
    """Also where that is half an hour off, and across the hours that a clock skips or has twice."""
    utc = marks_of(library, "2026-06-01T10:07Z", 1, 4, "UTC")
    assert utc == [f"2026-06-01 {at}" for at in ("10:15", "10:30", "10:45", "11:00")]
    assert marks_of(library, "2026-06-01T10:07Z", 6, 6, "Asia/Kolkata")[:2] == ["2026-06-01 16:00", "2026-06-01 17:00"]
    assert marks_of(library, "2026-06-01T10:00Z", 96, 5, "America/New_York") == [
        f"2026-06-0{day} 00:00" for day in (2, 3, 4, 5)
    ]
    spring = marks_of(library, "2026-03-28T12:00Z", 72, 4, "Europe/Berlin")
    assert spring == ["2026-03-29 00:00", "2026-03-30 00:00", "2026-03-31 00:00"]
    autumn = marks_of(library, "2026-10-24T22:00Z", 8, 9, "Europe/Berlin")
    assert [mark.split()[1] for mark in autumn] == [f"0{hour}:00" for hour in range(8)]
    assert library.run("lib.offsetOf(Date.parse('2026-10-25T00:30Z'), 'Europe/Berlin')") == 2 * HOUR
    assert library.run("lib.offsetOf(Date.parse('2026-10-25T01:30Z'), 'Europe/Berlin')") == HOUR


def test_every_time_follows_the_zone_that_is_chosen(chromium: Chromium, address: str) -> None:
    """The browser's own until UTC is chosen; the choice lasts and has no key in it."""
    with chromium.page() as page:
        page.send("Emulation.setTimezoneOverride", timezoneId="Asia/Tokyo")
        page.go(address)
        page.wait_for_text("local time", "header")
        folder = page.run("document.querySelector('link[rel=modulepreload]').href.replace(/[^/]+$/, '')")
        shown = f"import('{folder}format.js').then((format) => format.moment('2026-06-01T20:00:00Z'))"
        assert page.run(shown) == "2 Jun 2026, 05:00:00"
        page.click("header button[title='Times are in Asia/Tokyo']")
        page.wait_for_text("UTC", "header")
        assert page.run(shown) == "1 Jun 2026, 20:00:00"
        page.go(address)
        page.wait_for_text("UTC", "header")
        assert page.run("({ ...localStorage })") == {"lucid.zone": "UTC"}


def edges(page: Page, selector: str) -> list[float]:
    """Return where an element begins and ends, from left to right."""
    told: list[float] = page.run(f"""(() => {{
        const box = document.querySelector({selector!r}).getBoundingClientRect();
        return [box.left, box.right];
    }})()""")
    return told


DRAW = """(async () => {
    const { html, render, useState } = lib;
    const from = Date.parse('2026-06-01T10:00Z');
    const times = Array.from({ length: 61 }, (_, place) => new Date(from + place * 60_000).toISOString());
    const values = times.map((_, place) => (place > 20 && place < 30 ? null : place));
    const events = [{ at: times[40], type: 'draining' }];
    window.zoomed = [];
    room.replaceChildren();
    room.style.width = '500px';
    const zoom = (...span) => zoomed.push(span);
    render(html`<${lib.Chart} title="Load" unit="requests" times=${times} lines=${[['load', values]]}
        events=${events} onZoom=${zoom} />`, room);
    await settled();
    await settled();
})()"""


def dots(page: Page) -> dict[str, Any]:
    """Return the size of the canvas in dots and in pixels, and how many dots were painted."""
    return dict(
        page.run("""(() => {
            const canvas = document.querySelector('canvas');
            const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const box = canvas.getBoundingClientRect();
            return { across: canvas.width / box.width, down: canvas.height / box.height,
                     painted: data.filter((_, place) => place % 4 === 3).filter(Boolean).length };
        })()""")
    )


def test_a_plot_has_a_dot_for_every_dot_of_the_screen(library: Page) -> None:
    """Also after the window was moved to a screen with more of them: twice as many each way."""
    library.run(DRAW)
    library.wait_for("document.querySelector('canvas')?.width > 400")
    once = dots(library)
    library.resize(Size(1100, 900), scale=2)
    library.wait_for("document.querySelector('canvas').width > 900")
    twice = dots(library)
    assert (once["across"], once["down"]) == (1, 1)
    assert (twice["across"], twice["down"]) == (2, 2)
    assert 2.5 < twice["painted"] / once["painted"] < 4.5


def test_a_plot_leaves_gaps_and_tells_what_the_mouse_points_at(library: Page) -> None:
    """A tooltip with time, value and what happened then, in the chart; a drag zooms, a double click goes back."""
    assert library.run("lib.stretchesOf([1, 2, 3, 4, 5], [null, 1, null, 2, 3])") == [[[2, 1]], [[4, 2], [5, 3]]]
    library.run(DRAW)
    library.wait_for("document.querySelector('canvas')?.width > 400")
    assert library.text("h3") == "Load, requests"
    start, end = edges(library, "canvas")
    width, left = end - start, 32
    share = (left + (width - 12 - left) * 40 / 60) / width
    library.point_at("canvas", share)
    library.wait_for_text("10:40:00", ".tooltip")
    assert "drain began" in library.text(".tooltip")
    assert "40" in library.text(".tooltip li")
    tip, canvas = edges(library, ".tooltip"), edges(library, "canvas")
    assert canvas[0] <= tip[0] < tip[1] <= canvas[1] + 1
    library.drag("canvas", 0.3, 0.6)
    [[begin, end]] = library.wait_for("zoomed.length && zoomed")
    assert 0.25 * HOUR < end - begin < 0.35 * HOUR
    library.run("document.querySelector('canvas').dispatchEvent(new MouseEvent('dblclick', { bubbles: true }))")
    assert library.run("zoomed.at(-1)") == []
    library.drag("canvas", 0.3, 0.305)
    assert library.run("zoomed.length") == 2
