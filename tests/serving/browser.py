"""A headless Chromium, driven by the DevTools protocol over a pipe: real clicks and keys, and no package for it."""

import base64
import fcntl
import json
import os
import select
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""What a page may take to come to what is waited for."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def found() -> str | None:
    """Where a Chromium is."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Page:
    """A tab."""

    def __init__(self, write: int, read: int, width: int, height: int) -> None:
        self._write, self._read, self._rest, self._ids = write, read, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """What the console and the page's policies said."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._ids += 1
        message: dict[str, Any] = {"id": self._ids, "method": method, "params": values}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            came = self._message()
            if came.get("id") == self._ids:
                assert "error" not in came, (method, came["error"])
                return came["result"]
            self._told(came)

    def open(self, url: str) -> None:
        """Go there."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to; a promise is waited for."""
        came = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in came, came["exceptionDetails"]
        return came["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for the page to change so that this holds."""
        self.value(
            f"""new Promise((done) => {{
                const look = () => {{ if ({condition}) {{ watch.disconnect(); clearInterval(turn); done(true); }} }};
                const watch = new MutationObserver(look);
                const turn = setInterval(look, 50);
                watch.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
                look();
            }})"""
        )

    def click(self, selector: str) -> None:
        """The left button, on the middle of what the selector finds first."""
        box = self.value(
            f"""(() => {{
                const found = document.querySelector({json.dumps(selector)});
                found.scrollIntoView({{ block: "center" }});
                const box = found.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Where the cursor stands."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, text: str = "") -> None:
        """A key, by its name."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, ord(key[0]))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path) -> None:
        """A PNG of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], SECONDS)[0], f"Chromium said nothing for {SECONDS:.0f} s"
            came = os.read(self._read, 2**16)
            assert came, "Chromium has ended"
            self._rest += came
        whole, _, self._rest = self._rest.partition(b"\0")
        return json.loads(whole)

    def _told(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(values["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.complaints.append(str(values["entry"]["text"]))


@contextmanager
def page(profile: Path, width: int = 1200, height: int = 800) -> Iterator[Page]:
    """A tab of a browser with a profile of its own, which ends with it."""
    there, here = os.pipe(), os.pipe()
    command = [
        str(found()), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
    ]  # fmt: skip
    # the protocol speaks through 3 and 4; the ends go there from higher numbers, so that neither overwrites the other
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (there[0], here[1])]
    null = os.open(os.devnull, os.O_RDWR)
    moved = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4), (os.POSIX_SPAWN_DUP2, null, 2)]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=moved)
    for end in (*ends, there[0], here[1], null):
        os.close(end)
    try:
        yield Page(there[1], here[0], width, height)
    finally:
        os.close(there[1])  # a browser whose pipe is shut ends
        os.waitpid(process, 0)
        os.close(here[0])
