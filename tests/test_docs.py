"""Every command of the README and docs runs; the two set-up commands are what CI runs first."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """(page:line, text) of a language's fenced blocks; `console` ones need a download."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match[1] == language:
                line = text[: match.start()].count("\n") + 1
                found.append((f"{page.name}:{line}", match[2]))
    return found


SETUP = blocks("bash")[:2]  # install and demo; install and test


def test_ci_runs_the_two_set_up_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    demo, tests = (text for _, text in SETUP)
    assert demo.startswith("python3 -m venv .venv && ") and "r2r-glimp generate" in demo
    assert tests.strip().endswith(".venv/bin/python -m pytest -q -n auto")


def run(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the repository's data, where commands may leave files."""
    for name in ("checkpoints", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_bash_blocks_of_a_page_run_one_after_another(page: Path, workplace: Path) -> None:
    """Save those that say how long they take: their tests are their own."""
    for place, script in blocks("bash"):
        if not place.startswith(f"{page.name}:") or "# takes" in script:
            continue
        if (place, script) not in SETUP:
            result = run(script, workplace)
            assert result.returncode == 0, f"{place}: {result.stderr}"


def test_the_demo_command_ends_in_a_routed_answer(workplace: Path) -> None:
    demo = SETUP[0][1].rpartition("&& .venv/bin/")[2]
    result = run(demo, workplace)
    assert result.returncode == 0, result.stderr
    assert "</think>" in result.stdout and "Answer" in result.stdout
    assert "LLM" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "script", [pytest.param(text, id=place) for place, text in blocks("python")]
)
def test_python_blocks_run_and_show_something(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(script, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.strip(), "an example that shows nothing teaches nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_named_tests_exist() -> None:
    """The tables of docs/architecture.md name the test that pins each rule."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    known = {path.name: path.read_text(encoding="utf-8") for path in ROOT.rglob("tests/**/*.py")}
    for file, test in re.findall(r"(test_\w+\.py)(?:::(\w+))?", text):
        assert file in known, file
        assert not test or f"def {test}(" in known[file], f"{file}::{test}"
