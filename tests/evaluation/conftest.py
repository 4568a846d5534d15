"""`main` driven within this process."""

from tests.cli.conftest import cli

__all__ = ["cli"]
