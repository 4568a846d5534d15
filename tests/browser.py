"""A headless Chromium, driven over its WebDriver (HTTP and JSON; no package is needed for it)."""

import base64
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, by the standard
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip


def find_chromium() -> tuple[str, str] | None:
    """Paths of a Chromium and its driver; None where one of them is missing."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """A page, and what a person could do with it."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http, self._session = http, session

    def open(self, url: str) -> None:
        self._post("/url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        """What a script's `return` gives."""
        return self._post("/execute/sync", script=script, args=list(args))

    def click(self, selector: str) -> None:
        self._post(f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self._post(f"/element/{self._find(selector)}/value", text=text)

    def text(self, selector: str) -> str:
        return self._get(f"/element/{self._find(selector)}/text")

    def set(self, selector: str, value: Any) -> None:
        """Give an input or select a value, as a person's choice would."""
        script = """const node = document.querySelector(arguments[0]);
            if (node.type === "checkbox") node.checked = arguments[1];
            else node.value = arguments[1];
            for (const name of ["input", "change"])
              node.dispatchEvent(new Event(name, { bubbles: true }));"""
        self.run(script, selector, value)

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus; special ones by their WebDriver code points."""
        actions = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def point(self, selector: str) -> None:
        """Move the pointer onto an element."""
        origin = {_ELEMENT: self._find(selector)}
        move = {"type": "pointerMove", "origin": origin, "x": 0, "y": 0, "duration": 0}
        self._post("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def wait(self, condition: str, timeout_s: float = 30) -> None:
        """Until a JavaScript expression holds."""
        deadline = time.monotonic() + timeout_s
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < deadline, f"it never came to hold: {condition}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._get("/screenshot")))

    def resize(self, width: int, height: int) -> None:
        """The page's size in CSS pixels."""
        self._cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip

    def prefer(self, **features: str) -> None:
        """Media features: `prefer(prefers_color_scheme="dark")`."""
        pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self._cdp("Emulation.setEmulatedMedia", features=pairs)

    def complaints(self) -> list[str]:
        """What the console warned of since the last call: errors of scripts, refused contents."""
        entries = self._post("/se/log", type="browser")
        return [one["message"] for one in entries if one["level"] in ("WARNING", "SEVERE")]

    def _cdp(self, command: str, **params: Any) -> None:
        self._post("/goog/cdp/execute", cmd=command, params=params)

    def _find(self, selector: str) -> str:
        return self._post("/element", using="css selector", value=selector)[_ELEMENT]

    def _get(self, path: str) -> Any:
        return _value(self._http.get(self._session + path))

    def _post(self, path: str, **body: Any) -> Any:
        return _value(self._http.post(self._session + path, json=body))


@contextmanager
def start_browser(width: int = 1280, height: int = 860) -> Iterator[Browser]:
    """A browser with an empty profile, ended at the end.

    Raises:
        FileNotFoundError: there is no Chromium here, or no driver.
    """
    found = find_chromium()
    if found is None:
        raise FileNotFoundError("chromium and chromedriver are not on the PATH")
    binary, driver = found
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        log = open(Path(profile) / "driver.log", "wb")
        environment = os.environ | {"HOME": profile}
        process = subprocess.Popen(
            [driver, f"--port={port}"], stdout=log, stderr=log, env=environment
        )
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        try:
            _wait_ready(http)
            options = {"binary": binary, "args": [*_FLAGS, f"--user-data-dir={profile}/profile"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            body = {"capabilities": {"alwaysMatch": wanted}}
            session = _value(http.post("/session", json=body))["sessionId"]
            browser = Browser(http, f"/session/{session}")
            browser.resize(width, height)
            yield browser
            http.delete(f"/session/{session}")
        finally:
            http.close()
            process.terminate()
            process.wait(20)
            log.close()


def _wait_ready(http: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if _value(http.get("/status"))["ready"]:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the driver does not start"
        time.sleep(0.05)


def _value(response: httpx.Response) -> Any:
    value = response.json()["value"]
    assert response.is_success, f"{value['error']}: {value['message']}"
    return value


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for the tests of a module; they are skipped where there is none."""
    if find_chromium() is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    with start_browser() as started:
        yield started
