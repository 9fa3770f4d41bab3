import os

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.task_files import read_tasks
from cm3leon_jax.data.sources import yaml_documents
from cm3leon_jax.evaluation.protocols import protocol
from tests.refusals import refused


def repeated(levels: int, last: str) -> str:
  """Returns YAML in which each line refers to the line before it nine times: 9**levels values."""
  lines = ["x0: &a0 [lol]"]
  lines += [f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
  return "\n".join([*lines, last]) + "\n"


BOMBS = {
  "lists": repeated(12, "columns: *a11"),
  "objects": "x0: &a0 {a: 1}\n"
  + "".join(f"x{i}: &a{i} {{b: *a{i - 1}, c: *a{i - 1}}}\n" for i in range(1, 40)),
  "merged": "x0: &a0 {a: 1}\n"
  + "".join(f"x{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
  "itself": "&a [*a]",
  "its own key": "&a {*a : 1}",
  "flat": "[" + "1," * 132_000 + "1]",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_aliases_that_make_too_many_values_are_refused(name):
  with refused(UserError):
    yaml_documents.parse(BOMBS[name], "my.yaml")


@pytest.mark.parametrize("read", [protocol.load, read_tasks])
@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "flat" else []) for name in BOMBS]
)
def test_protocols_and_tasks_are_read_within_these_bounds(read, name, tmp_path):
  path = tmp_path / "my.yaml"
  path.write_text(BOMBS[name])
  with refused(UserError):
    read(str(path))
  os.truncate(path, 2**40)
  with refused(UserError):
    read(str(path))
  path.write_bytes(b"\xff")
  with refused(UserError):
    read(str(path))


def test_aliases_that_name_little_are_read():
  [(node, value)] = yaml_documents.parse("a: &x [1, 2]\nb: *x\nc: *x\n", "my.yaml")
  assert value == {"a": [1, 2], "b": [1, 2], "c": [1, 2]}
  assert [key.value for key, _ in node.value] == ["a", "b", "c"]
  assert [value for _, value in yaml_documents.parse("a\n--- \nb\n", "my.yaml")] == ["a", "b"]


def test_no_yaml_is_refused_with_its_line():
  with refused(UserError):
    yaml_documents.parse("a: 1\n]\n", "my.yaml")
