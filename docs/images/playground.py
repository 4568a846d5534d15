"""Draw docs/images/playground.png: the playground after a question.

`python -m docs.images.playground` from the repository root, with Chromium and its driver.
"""

from pathlib import Path

from r2r_glimp.serve.process import running_server
from tests.browser import Browser, start_browser

TARGET = Path(__file__).with_name("playground.png")
QUESTION = (
    "Say jars 4, bags 2.\nSum cups: bags and 5.\nProduct maps: cups and jars.\n"
    "Difference rings: maps and 3.\nProduct keys: rings and cups.\nHow many keys?"
)


def main() -> None:
    with running_server() as server, start_browser(1280, 900) as browser:
        browser.prefer(prefers_color_scheme="light")
        _use(browser, server.url)
        browser.screenshot(TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


def _use(browser: Browser, url: str) -> None:
    """Ask the README's question, of the pair and of each model alone."""
    browser.open(url)
    browser.wait("document.querySelectorAll('#router option').length > 1")
    browser.set("#granularity", "step")
    browser.set("#compare", True)
    browser.set("#question", QUESTION)
    browser.click("#send")
    browser.wait("document.querySelector('#status').textContent.startsWith('Done')")
    browser.point(".reasoning .t.llm")


if __name__ == "__main__":
    main()
