"""Shares the run of the tests of exports."""

from tests.export.conftest import run  # noqa: F401
