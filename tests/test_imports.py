"""Importing the package is cheap: torch comes with the first name that needs it."""

import subprocess
import sys

import r2r_glimp

HEAVY = ("torch", "transformers", "lightning", "fastapi", "datasets")


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    assert loaded_by("import r2r_glimp; r2r_glimp.SamplingParams(max_tokens=3)") == set()


def test_every_public_name_resolves() -> None:
    for name in r2r_glimp.__all__:
        assert getattr(r2r_glimp, name) is not None
    assert set(r2r_glimp.__all__) <= set(dir(r2r_glimp))
