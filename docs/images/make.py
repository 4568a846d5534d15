"""Draw docs/images/generate.svg: the README's first answer as a terminal shows it.

`python docs/images/make.py`, with the package installed.
"""

import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]


def run_in_terminal(command: str) -> str:
    """What a command prints to a terminal, escape codes included."""
    printed = []

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 4096)
        printed.append(data)
        return data

    pty.spawn(["bash", "-c", command], read)
    return b"".join(printed).decode().replace("\r\n", "\n")


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": "100"}
    command = block[1].rpartition("&& .venv/bin/")[2]
    console = Console(record=True, width=100, file=open(os.devnull, "w"))
    console.print(Text.from_ansi(f"$ {command}{run_in_terminal(command)}"))
    console.save_svg(str(Path(__file__).with_name("generate.svg")), title="r2r-glimp generate")


if __name__ == "__main__":
    main()
