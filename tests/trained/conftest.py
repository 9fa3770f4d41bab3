"""Shares the fixture of a run with the tests of exports."""

from tests.export.conftest import run  # noqa: F401
