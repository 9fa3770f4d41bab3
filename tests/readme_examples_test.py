import pathlib
import runpy

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]


def test_readmes_examples_are_found_and_what_is_wrong_is_said():
  checked = runpy.run_path(str(ROOT / ".ci" / "readme.py"))
  *commands, block = checked["examples"]((ROOT / "README.md").read_text("utf-8"))
  assert [command[:16] for command in commands] == ["cm3leon generate"] * 2
  assert "\nsamples = " in block.strip("`")
  said = [checked["error"]("a bell", np.full((48, 48, 3), 255, np.uint8), x) for x in (True, False)]
  assert said == ["it retrieves no document", "expected 1 bell, found 0"]
