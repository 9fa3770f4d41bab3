from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources import yaml_documents
from tests.refusals import refused


def test_each_document_has_its_node_and_value():
  [(node, value)] = yaml_documents.parse("a: &x [1, 2]\nb: *x\n", "my.yaml")
  assert value == {"a": [1, 2], "b": [1, 2]}
  assert [key.value for key, _ in node.value] == ["a", "b"]
  assert [value for _, value in yaml_documents.parse("a\n--- \nb\n", "my.yaml")] == ["a", "b"]


def test_no_yaml_is_refused_with_its_line():
  with refused(UserError, "my.yaml", "line 2"):
    yaml_documents.parse("a: 1\n]\n", "my.yaml")
