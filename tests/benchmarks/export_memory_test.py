from etils import epath
import pytest

from benchmarks import export_memory
from cm3leon_jax.commands import export
from cm3leon_jax.export import formats
from tests.generation.run import SETTINGS


def test_growth_is_continued_to_all_layers():
  assert export_memory.at_all_layers([(2, 3.0), (4, 3.1)]) == pytest.approx(4.5)
  assert export_memory.at_all_layers([(2, 3.0), (4, 2.9)]) == 2.9
  assert export_memory.at_all_layers([(4, 3.0)]) == 3.0


def test_settings_are_those_of_seven_billion_but_for_the_layers():
  model = export_memory.settings_of(2).model
  assert (model.num_layers, model.width, model.mlp_width) == (2, 4_096, 16_384)


def test_its_run_is_one_that_the_command_exports(tmp_path):
  export_memory.make_run(epath.Path(tmp_path) / "run", SETTINGS)
  choice, output = formats.Choice(format="orbax"), str(tmp_path / "output")
  export.main(SETTINGS, epath.Path(tmp_path) / "run", choice=choice, output=output)
  assert (tmp_path / "output" / "README.md").exists()
