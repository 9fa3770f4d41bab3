import os

import pytest

from cm3leon_jax.data.instructions.task_files import read_tasks
from cm3leon_jax.data.sources import yaml_documents
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.protocols import protocol
from tests.refusals import refused

# Each line refers several times to the line before it.
LISTS = "".join(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGED = "".join(f"x{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
BOMBS = {
  "lists": f"x0: &a0 [lol]\n{LISTS}",
  "merged": f"x0: &a0 {{a: 1}}\n{MERGED}",
  "itself": "&a [*a]",
  "its own key": "&a {*a : 1}",
}


@pytest.mark.parametrize("read", [protocol.load, read_tasks])
def test_a_file_of_others_takes_little_time_and_memory(read, tmp_path):
  path = tmp_path / "my.yaml"
  for text in BOMBS.values():
    path.write_text(text)
    with refused(UserError, "my.yaml", "values"):
      read(str(path))
  os.truncate(path, 2**40)
  with refused(UserError, "my.yaml", "bytes"):
    read(str(path))
  path.unlink()
  path.symlink_to("/dev/zero")
  with refused(UserError, "my.yaml", "regular file"):
    read(str(path))


@pytest.mark.parametrize("text", ["- !!int ''", "- !!timestamp x", "- !!bool x", "[" * 1_000])
def test_wrong_yaml_is_one_sentence(text):
  with refused(UserError, "my.yaml", "YAML"):
    yaml_documents.parse(text, "my.yaml")


def test_each_document_has_its_node_and_value():
  [(node, value)] = yaml_documents.parse("a: &x [1, 2]\nb: *x\n", "my.yaml")
  assert value == {"a": [1, 2], "b": [1, 2]}
  assert [key.value for key, _ in node.value] == ["a", "b"]
  assert [value for _, value in yaml_documents.parse("a\n--- \nb\n", "my.yaml")] == ["a", "b"]


def test_no_yaml_is_refused_with_its_line():
  with refused(UserError, "my.yaml", "line 2"):
    yaml_documents.parse("a: 1\n]\n", "my.yaml")
