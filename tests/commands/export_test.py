import numpy as np
from safetensors import numpy as safetensors

from cm3leon_jax.commands import export
from cm3leon_jax.export import bundle, huggingface
from tests.generation.run import SETTINGS, one_device, save_run
from tests.models.tiny import random_params


def test_the_average_is_exported_and_a_bundle_knows_its_cost(tmp_path):
  """The parameters of the checkpoint are NaN, see `save_run`."""
  save_run(tmp_path)
  export.main(SETTINGS, tmp_path, str(tmp_path / "bundle"))
  with one_device():
    average = random_params(SETTINGS.model)
  found = safetensors.load_file(tmp_path / "export" / huggingface.WEIGHTS)
  expected = huggingface.opt_tensors(average)
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor)
  # Each stage of `save_run` took a second.
  cost = {"train_seconds": 1.0, "other_seconds": 5.0, "machine": None}
  assert bundle.about(tmp_path / "bundle")["cost"] == cost
