"""Makes the run fixture available to the tests in this folder."""

from tests.export.conftest import run  # noqa: F401
