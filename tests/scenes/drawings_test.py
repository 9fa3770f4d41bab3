"""Tests the icons of scenes, which need an extra that other data sources do not need."""

import pytest

from tests.launched import python

WITHOUT_ICONS = """
import subprocess
import sys
import sys
sys.modules["fonticon_mdi7"] = None
from cm3leon_jax.config import UserError
from cm3leon_jax.scenes import drawings as scene_drawings
from cm3leon_jax.scenes import source
from cm3leon_jax.reports import model_card, report
for draw in (lambda: scene_drawings.alpha("star"), source.check_installed):
  try:
    draw()
  except UserError as error:
    print("fonticon-materialdesignicons7" in str(error))
"""


@pytest.mark.slow
def test_reports_and_exports_of_other_data_need_no_icons():
  result = python(WITHOUT_ICONS)
  assert (result.returncode, result.stdout) == (0, "True\nTrue\n"), result.stderr
