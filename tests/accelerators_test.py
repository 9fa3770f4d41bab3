"""Tests that importing the package is fast, and that JAX falls back to the CPU."""

import os
import pathlib

import pytest

import cm3leon_jax
from tests.launched import python

ROOT = pathlib.Path(__file__).parents[1]
LIGHT = """
import os, sys
import cm3leon_jax
assert {"jax", "numpy", "cm3leon_jax.api"}.isdisjoint(sys.modules), "the import is not light"
from cm3leon_jax import CM3Leon, UserError, accelerators
assert "jax" not in sys.modules, "the API imports jax before a run is loaded"
accelerators.DEVICE_FILES = ()
try:
  CM3Leon.load("nowhere")
except UserError as error:
  print(error)
print(os.environ["JAX_PLATFORMS"])
"""


def test_importing_is_light_and_loading_uses_the_cpu_where_there_is_nothing_else():
  environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  result = python(LIGHT, cwd=ROOT, env=environment, check=True)
  assert result.stdout.splitlines() == [
    "there is no folder nowhere: give the workdir of a run, the folder of a bundle, or the name "
    "of an installed one: scenes, scenes-instruct, illustrations.",
    "cpu",
  ]
  with pytest.raises(AttributeError, match="has no attribute 'CM4Leon'"):
    _ = cm3leon_jax.CM4Leon
