"""A real Chromium below a test, spoken to over its debugging pipe: no driver, no port, no package in between.

    with Chromium() as chromium, chromium.page() as page:
        page.go("http://127.0.0.1:8000/dashboard")
        page.fill("#key", key); page.press("Enter")
        page.wait_for_text("Fleet")

Each page has a context of its own: storage, cache and cookies of no other. Protocol:
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "There is no Chromium here. Run scripts/install_chromium.sh as root, or install your system's package."
TIMEOUT_SECONDS = 30.0
_POLL_SECONDS = 0.02
_CHUNK = 1 << 16
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# The pipe is the descriptors 3 and 4 of the browser. The process that becomes it puts them there, by way of higher
# ones: either end may be 3 or 4 already.
_LAUNCH = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(descriptor), fcntl.F_DUPFD, 10) for descriptor in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {
    "Enter": ("\r", 13),
    "Tab": ("", 9),
    "Escape": ("", 27),
    "Backspace": ("", 8),
    "ArrowDown": ("", 40),
    " ": (" ", 32),
    "/": ("/", 191),
}
_SHIFT = 8


def find_chromium() -> str | None:
    """Where the browser is; None when there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class BrowserFault(AssertionError):
    """What the browser says went wrong, or what did not come to be in time."""


class NavigatedAway(BrowserFault):
    """The page went to another place while it was asked something."""


class Size(NamedTuple):
    """The size of a window in CSS pixels."""

    width: int
    height: int


DESK, PHONE = Size(1280, 900), Size(390, 844)


class Chromium:
    """One headless browser, with a profile that is gone afterwards."""

    def __init__(self) -> None:
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._commands = self._answers = -1
        self._pending = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        """Start it."""
        if (binary := find_chromium()) is None:
            raise BrowserFault(MISSING)
        self._folder = Path(tempfile.mkdtemp(prefix="lucid-chromium-"))
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        os.set_blocking(self._answers, False)
        flags = [*_FLAGS, f"--user-data-dir={self._folder / 'profile'}"]
        command = [sys.executable, "-c", _LAUNCH, str(read_commands), str(write_answers), binary, *flags]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=(read_commands, write_answers),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.defpath, "HOME": str(self._folder), "TZ": "UTC", "LANG": "C.UTF-8"},
            )
        os.close(read_commands)
        os.close(write_answers)
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and all that it left."""
        process = self._process
        if process is not None:
            try:
                self.send("Browser.close")
                process.wait(TIMEOUT_SECONDS)
            except (BrowserFault, OSError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()
        for descriptor in (self._commands, self._answers):
            os.close(descriptor)
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def page(self, size: Size = DESK) -> Iterator[Page]:
        """A new page in a context of its own."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.resize(size)
        try:
            yield page
        finally:
            self.send("Target.disposeBrowserContext", browserContextId=context)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Have the browser do something, and return what came of it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (answer := self._next(deadline, method)).get("id") != self._number:
            self._events.append(answer)
        if "error" in answer:
            kind = NavigatedAway if "navigated" in answer["error"]["message"] else BrowserFault
            raise kind(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def events(self, session: str, *methods: str) -> list[dict[str, Any]]:
        """Return what was told of a page so far, by the events' names."""
        told = [event for event in self._events if event.get("sessionId") == session]
        return [event["params"] for event in told if event["method"] in methods]

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self._answers, _CHUNK) if ready else b""
            if not data:
                log = (self._folder / "log").read_text(errors="replace")[-2000:]
                raise BrowserFault(f"{method}: the browser ended or says nothing. {log}")
            self._pending += data
        message, _, self._pending = self._pending.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


class Page:
    """One page, as a person uses it: by what it shows, by mouse and by keyboard."""

    def __init__(self, chromium: Chromium, session: str) -> None:
        self._chromium = chromium
        self._session = session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Have the page do something."""
        return self._chromium.send(method, self._session, **params)

    def go(self, url: str) -> None:
        """Load an address, and wait until it is loaded."""
        told = self.send("Page.navigate", url=url)
        assert "errorText" not in told, told
        self.wait_for("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """Return what an expression of JavaScript comes to."""
        told = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise BrowserFault(str(told["exceptionDetails"].get("exception", {}).get("description")))
        return told["result"].get("value")

    def wait_for(self, expression: str, timeout_seconds: float = TIMEOUT_SECONDS) -> Any:
        """Return what an expression comes to, once that is true; it may be of the page that comes after this one."""
        deadline = time.monotonic() + timeout_seconds
        while not (value := self._run_if_it_stays(expression)):
            if time.monotonic() > deadline:
                raise BrowserFault(f"never: {expression}\nThe page shows: {self.text()}\nIt said: {self.faults()}")
            time.sleep(_POLL_SECONDS)
        return value

    def _run_if_it_stays(self, expression: str) -> Any:
        try:
            return self.run(expression)
        except NavigatedAway:
            return None

    def wait_for_text(self, text: str, selector: str = "body", timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Return once an element shows the text."""
        self.wait_for(
            f"(document.querySelector({json.dumps(selector)})?.innerText ?? '').includes({json.dumps(text)})",
            timeout_seconds,
        )

    def text(self, selector: str = "body") -> str:
        """Return what an element shows; nothing when it is not there."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def texts(self, selector: str) -> list[str]:
        """Return what each of the elements shows."""
        return list(self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.innerText)"))

    def click(self, selector: str) -> None:
        """Press the mouse on the first such element, where it is seen."""
        x, y = self.wait_for(f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found?.scrollIntoView({{ block: 'center' }});
            const box = found?.getBoundingClientRect();
            return box && box.width && [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point_at(self, selector: str, share: float = 0.5) -> None:
        """Move the mouse over an element, so far along its width."""
        x, y = self.run(f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{ block: 'center' }});
            const box = found.getBoundingClientRect();
            return [box.x + box.width * {share}, box.y + box.height / 2];
        }})()""")
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Drag the mouse over an element, from one share of its width to another."""
        x, y, width = self.run(f"""(() => {{
            const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();
            return [box.x, box.y + box.height / 2, box.width];
        }})()""")
        for kind, share in (("mousePressed", start), ("mouseMoved", (start + end) / 2), ("mouseMoved", end)):
            held = {"button": "left", "buttons": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x + width * share, y=y, clickCount=1, **held)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=x + width * end, y=y, button="left", clickCount=1)

    def fill(self, selector: str, text: str) -> None:
        """Click a field and type into it, over what it held."""
        self.click(selector)
        self.run("document.activeElement.select()")
        self.type(text)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and let go of a key: one of `_KEYS`."""
        text, code = _KEYS[key]
        about: dict[str, Any] = {
            "key": key,
            "code": {" ": "Space", "/": "Slash"}.get(key, key),
            "windowsVirtualKeyCode": code,
            "modifiers": _SHIFT if shift else 0,
        }
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def resize(self, size: Size, *, scale: float = 1) -> None:
        """Give the window another size; a narrow one is a phone's."""
        is_phone = size.width < 500
        metrics = {"width": size.width, "height": size.height, "deviceScaleFactor": scale, "mobile": is_phone}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)

    def prefer(self, scheme: str) -> None:
        """Have the system ask for `dark` or `light` colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, *, height: int | None = None, quality: int = 90) -> bytes:
        """Return what the window shows, down to `height`, as WebP."""
        clip = {}
        if height is not None:
            width = self.run("innerWidth")
            clip = {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}
        form: dict[str, Any] = {"format": "webp", "quality": quality, "captureBeyondViewport": True}
        return base64.b64decode(self.send("Page.captureScreenshot", **form, **clip)["data"])

    def requests(self) -> list[dict[str, Any]]:
        """Return every request that the page made."""
        self.run("0")
        told = self._chromium.events(self._session, "Network.requestWillBeSent")
        return [event["request"] for event in told]

    def faults(self) -> list[str]:
        """Return what the page complained of: exceptions, refused files and breaches of its policy."""
        self.run("0")  # what was said before this is told by now
        told = self._chromium.events(self._session, "Runtime.exceptionThrown", "Log.entryAdded")
        entries = [event["entry"]["text"] for event in told if event.get("entry", {}).get("level") == "error"]
        return entries + [str(event["exceptionDetails"]) for event in told if "exceptionDetails" in event]

    def accessible(self) -> list[tuple[str, str]]:
        """Return the page as a screen reader is told it: role and name of each element."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node.get("ignored")]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in shown if "role" in node]
