"""Configures a tuning that takes seconds, on two tasks and on replayed pairs and texts."""

from tests.launch import tiny_config

TASK = {"templates": ("{x}",), "target": "x", "format": "jsonl", "heldout": "heldout"}
TASK |= {"drop_instruction": 0.2, "drop_all": 0.1}
TASKS = tuple({"name": name, **TASK} for name in ("answers", "edits"))


def get_config():
  config = tiny_config.get_config()
  config.instructions.update({"own_tasks": TASKS, "replay_share": 0.4})
  config.train.eval_batches = 3  # Three held-out batches are enough to contain every task.
  return config
