"""A headless Chromium and a page in it, over the DevTools protocol in a pipe: no driver and no port is needed.

https://chromedevtools.github.io/devtools-protocol/ and, for the pipe, Chromium's `--remote-debugging-pipe`: it reads
commands from descriptor 3 and writes to 4, JSON with a zero byte behind each.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60.0
"""What one command may take; each takes milliseconds, the first a second."""
FRAMES = 10
"""For so many frames an element has stood still before it is clicked: what comes into view changes its height then."""
FLAGS = [
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--disable-gpu",
    "--window-size=1200,900", "--lang=en-US",
]  # fmt: skip
LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {
    "ArrowUp": 38, "ArrowDown": 40, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "Enter": 13, "Tab": 9,
    "Backspace": 8, "/": 191,
}  # fmt: skip
"""The number that the protocol wants beside a key's name; a letter's is that of its capital."""


def installed() -> str | None:
    """The path of a Chromium, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page: what it shows, keys pressed on it, and what its console said of errors."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.session, self.last, self.buffer = "", 0, b""
        self.errors: list[str] = []
        self.saved = ""

    def open(self, file: Path, fragment: str = "") -> None:
        """Show a file, as it is when it is loaded anew."""
        if not self.session:
            target = self.command("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Runtime", "Log"):
                self.command(f"{domain}.enable")
        for url in ("about:blank", file.as_uri() + fragment):
            self.command("Page.navigate", url=url)
            self._wait(f"location.protocol === '{url.partition(':')[0]}:' && document.readyState === 'complete'")

    def _wait(self, condition: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.value(condition):
            assert time.monotonic() < deadline, f"not so: {condition}"

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, a promise when it is kept."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            named = {"key": key, "windowsVirtualKeyCode": KEYS.get(key) or ord(key.upper())}
            text = {"Enter": "\r"}.get(key) or (key if len(key) == 1 else "")
            self.command("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **named)
            self.command("Input.dispatchKeyEvent", type="keyUp", **named)

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self.command("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """The mouse on the middle of an element, which is scrolled into view; done when the page has handled it."""
        middle = self.value(
            f"""(async () => {{
              const one = document.querySelector({json.dumps(selector)});
              let at = null;
              for (let still = 0; still < {FRAMES}; still += 1) {{
                one.scrollIntoView({{block: "center", behavior: "instant"}});
                await new Promise(requestAnimationFrame);
                const box = one.getBoundingClientRect(), found = [box.x + box.width / 2, box.y + box.height / 2];
                if (String(found) !== String(at)) still = 0;
                at = found;
              }}
              window.clicked = new Promise((done) => addEventListener("click", () => done(), {{once: true}}));
              return at;
            }})()"""
        )
        at = {"x": middle[0], "y": middle[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, **at)
        self.value("window.clicked")

    def choose(self, name: str, value: str) -> None:
        """One of the choices of a list, by its value."""
        chosen = self.value(
            f"(() => {{ const one = document.getElementById({json.dumps(name)}); one.value = {json.dumps(value)};"
            " one.dispatchEvent(new Event('change', {bubbles: true})); return one.value; })()"
        )
        assert chosen == value, f"{name} has no choice {value}"

    def downloaded(self, folder: Path, selector: str) -> Path:
        """The file that a click on an element saves."""
        self.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)
        self.saved = ""
        self.click(selector)
        deadline = time.monotonic() + SECONDS
        while not self.saved:
            assert time.monotonic() < deadline, f"a click on {selector} saved nothing"
            self.command("Runtime.getIsolateId")
        [file] = folder.iterdir()
        return file

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.last += 1
        message: dict[str, Any] = {"id": self.last, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.last:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.from_browser], [], [], SECONDS)
            part = os.read(self.from_browser, 1 << 16) if ready else b""
            assert part, "Chromium ended, or does not answer"
            self.buffer += part
        first, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        found = event.get("params", {})
        match event.get("method"):
            case "Browser.downloadProgress" if found["state"] == "completed":
                self.saved = found["guid"]
            case "Runtime.exceptionThrown":
                details = found["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Log.entryAdded" if found["entry"]["level"] == "error":
                self.errors.append(found["entry"]["text"])
            case "Runtime.consoleAPICalled" if found["type"] in ("error", "assert"):
                self.errors.append(str([one.get("value") for one in found["args"]]))


@contextlib.contextmanager
def started(program: str, folder: Path) -> Iterator[Page]:
    """A Chromium of its own, whose profile is in `folder`; it ends with the block."""
    inherited_read, to_browser = os.pipe()
    from_browser, inherited_write = os.pipe()
    # Above 4, so that neither is closed by the other's move to its place.
    ours = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (inherited_read, inherited_write)]
    for one in (inherited_read, inherited_write):
        os.close(one)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *map(str, ours), program, *FLAGS, *sandbox, f"--user-data-dir={folder}"],
        pass_fds=ours, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for one in ours:
        os.close(one)
    try:
        page = Page(to_browser, from_browser)
        yield page
        page.session = ""
        page.command("Browser.close")
        process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()
        os.close(to_browser)
        os.close(from_browser)
