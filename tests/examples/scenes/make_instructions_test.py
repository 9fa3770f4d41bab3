import numpy as np

from cm3leon_jax.config.instructions import InstructionsConfig
from cm3leon_jax.data.instructions import sources
from cm3leon_jax.data.instructions.stores import square_pixels
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.files.json_files import plain
from examples.scenes import make_instructions
from examples.scenes.instructions import TASKS, record


def test_files_have_the_records_with_their_pixels_and_facts(tmp_path):
  config = make_instructions.options_of(seed=3)
  make_instructions.write(tmp_path, config, TASKS, 2, 2)
  instructions = InstructionsConfig(tasks=str(tmp_path / "tasks.yaml"))
  tasks = load_tasks(instructions)
  assert [task.name for task in tasks] == list(TASKS)
  for task in tasks:
    for split in ("train", "heldout"):
      found = list(sources.open_task(task, split, instructions))
      assert len(found) == 2
      for index, one in enumerate(found):
        drawn = record(config, task.name, split, index)
        assert (one.key, one.group, one.texts) == (drawn.key, drawn.group, drawn.texts)
        assert one.facts == plain(drawn.facts)
        assert list(one.images) == list(drawn.images)
        for name, file in one.images.items():
          np.testing.assert_array_equal(square_pixels(file, 48), drawn.images[name])
