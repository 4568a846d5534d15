"""Draw docs/images/playground.png: the playground after a question.

`python -m docs.images.playground` from the repository root, with Chromium and its driver.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from r2r_glimp.serve.server import open_socket
from tests.browser import Browser, start_browser

TARGET = Path(__file__).with_name("playground.png")
QUESTION = (
    "Say jars 4, bags 2.\nSum cups: bags and 5.\nProduct maps: cups and jars.\n"
    "Difference rings: maps and 3.\nProduct keys: rings and cups.\nHow many keys?"
)


def main() -> None:
    with open_socket("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "r2r_glimp", "serve", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(url)
        with start_browser(1280, 940) as browser:
            browser.prefer(prefers_color_scheme="light")
            _use(browser, url)
            browser.screenshot(TARGET)
    finally:
        server.terminate()
        server.wait(60)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


def _use(browser: Browser, url: str) -> None:
    """Ask the README's question, of the pair and of each model alone."""
    browser.open(url)
    browser.wait("document.querySelectorAll('#router option').length > 1")
    browser.set("#granularity", "token")
    browser.set("#rule", "threshold")
    browser.set("#amount", 0.5)
    browser.set("#compare", True)
    browser.set("#question", QUESTION)
    browser.click("#send")
    browser.wait("document.querySelector('#status').textContent.startsWith('Done')")
    browser.point(".reasoning .t.llm")


def _wait_ready(url: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if httpx.get(f"{url}/ready").is_success:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"no server at {url}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
