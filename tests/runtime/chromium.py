"""A headless Chromium, driven by chromedriver's WebDriver protocol: plain HTTP, so no client library is needed."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from harness.servers.local import free_port

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ENTER, TAB, ESCAPE = "\ue007", "\ue004", "\ue00c"
WAIT_SECONDS = 30


class Chromium:
    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self._address}/{path}", data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def open(self, url: str) -> None:
        self.ask("POST", "url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.ask("POST", "execute/sync", script=script, args=[*arguments])

    def press(self, *keys: str) -> None:
        """Press keys on the keyboard; the focused element gets them."""
        downs = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "actions", actions=[{"type": "key", "id": "keyboard", "actions": downs}])

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def press_button(self, selector: str) -> None:
        """Press a button by the keyboard alone."""
        self.run("document.querySelector(arguments[0]).focus()", selector)
        self.press(ENTER)

    def wait_for(self, look: Callable[[], Any], what: str) -> None:
        give_up_at = time.monotonic() + WAIT_SECONDS
        while not look():
            assert time.monotonic() < give_up_at, f"{what}; the page: {self.text('body')[:3000]}"
            time.sleep(0.02)

    def wait_for_text(self, selector: str, text: str) -> None:
        self.wait_for(lambda: text in self.text(selector), f"{selector} has no {text!r}")


@contextmanager
def chromium(directory: Path) -> Iterator[Chromium]:
    """Skips the test if there is no Chromium."""
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("no chromium or no chromedriver here (Debian: chromium, chromium-driver)")
    port = free_port()
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options = {"args": [*arguments, f"--user-data-dir={directory}"], "binary": "/usr/bin/chromium"}
    with subprocess.Popen([driver, f"--port={port}", "--log-level=SEVERE"]) as process:
        try:
            root = Chromium(f"http://127.0.0.1:{port}")
            give_up_at = time.monotonic() + WAIT_SECONDS
            while True:
                with suppress(OSError):
                    root.ask("GET", "status")
                    break
                assert time.monotonic() < give_up_at
                time.sleep(0.05)
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = root.ask("POST", "session", capabilities={"alwaysMatch": wanted})
            browser = Chromium(f"http://127.0.0.1:{port}/session/{session['sessionId']}")
            try:
                yield browser
            finally:
                root.ask("DELETE", f"session/{session['sessionId']}")
        finally:
            process.terminate()
