import dataclasses

import pytest

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.data.published.files import SPLITS
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.protocols import metrics
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from tests.refusals import refused

GOOD = """
title: drawings
task: image
data: {format: heldout, count: 8}
columns:
  - {name: plain, retrieve: 1, sampling: {guidance: 2.0}}
  - {name: greedy, sampling: {top_k: 1}}
metrics: [clip_score]
"""


@pytest.mark.parametrize("name", protocol_lib.names())
def test_shipped_protocols_are_valid_and_their_metrics_fit_their_task(name):
  for protocol in protocol_lib.load(name).values():
    metrics.check(protocol.metrics, protocol.task, protocol.data.count)
    for column in protocol.columns:
      protocol_lib.sampling_of(column, SamplingConfig())
    columns = {column.name for column in protocol.columns}
    assert all(row.get("column", protocol.columns[0].name) in columns for row in protocol.published)
    assert all(set(row) & set(protocol.metrics) for row in protocol.published)
    if protocol.data.format != protocol_lib.HELDOUT:
      assert protocol.data.split in SPLITS[protocol.data.format]


def test_a_column_changes_the_sampler_of_the_run():
  [protocol] = protocol_lib.parse(GOOD, "good.yaml")
  base = SamplingConfig(guidance=5.0, temperature=0.5)
  plain, greedy = (protocol_lib.sampling_of(c, base) for c in protocol.columns)
  assert (plain.guidance, plain.temperature, plain.top_k) == (2.0, 0.5, base.top_k)
  assert (greedy.guidance, greedy.top_k) == (5.0, 1)


@pytest.mark.parametrize(
  ("old", "new", "fact"),
  [
    ("task: image", "task: video", "task"),
    ("count: 8", "count: -1", "data.count"),
    ("title: drawings", "titel: drawings", "titel"),
    ("name: greedy", "name: plain", "plain"),
    ("{name: greedy, ", "{label: greedy, ", "columns[1]"),
    ("metrics: [clip_score]", "metrics: []", "metrics"),
    ("task: image", "task: image\ntemplate: a <mask>", "template"),
    ("task: image", "task: text\ntemplate: none here", "template"),
    ("task: image", "task: image\ntemplate: '{prompt} {answer}'", "answer"),
    ("task: image", "task: image\ntemplate: '{prompt'", "template"),
    ("format: heldout", "format: coco", "format"),
    ("count: 8", "count: 8, split: val", "split"),
    (GOOD, "- a list", "title"),
    (GOOD, "", "a protocol"),
    ("title: drawings", "title: [", "YAML"),
  ],
)
def test_a_mistake_is_named_with_its_file_and_field(old, new, fact):
  with refused(UserError, "my.yaml", fact):
    protocol_lib.parse(GOOD.replace(old, new), "my.yaml")


def test_other_mistakes_are_named(tmp_path):
  [protocol] = protocol_lib.parse(GOOD.replace("guidance: 2.0", "guidence: 2.0"), "my.yaml")
  with refused(UserError, "plain", "guidence"):
    protocol_lib.sampling_of(protocol.columns[0], SamplingConfig())
  with refused(UserError, "nothing", "tutorial_decoding"):
    protocol_lib.load("nothing")
  for names, task, count in (("fid", "image", 9), ("clip_score", "text", 9), ("cmmd", "image", 1)):
    with refused(UserError, f"'{names}'"):
      metrics.check([names], task, count)


def test_a_file_may_have_several_protocols_each_with_a_name():
  first, second = GOOD + "name: one\n", GOOD + "name: two\n"
  found = protocol_lib.parse(f"{first}---{second}", "my.yaml")
  assert [protocol.name for protocol in found] == ["one", "two"]
  for other in (first, GOOD):
    with refused(UserError, "my.yaml", "names"):
      protocol_lib.parse(f"{first}---{other}", "my.yaml")


def test_one_protocol_of_a_file_is_chosen_by_its_name():
  [protocol] = protocol_lib.load("cm3leon_table2/vizwiz").values()
  assert protocol.data.format == "vizwiz"
  with refused(UserError, "cm3leon_table2/nothing", "FILE/NAME"):
    protocol_lib.load("cm3leon_table2/nothing")


def test_a_template_has_question_and_dialog_and_an_example_adds_no_mask():
  example = Example(
    "a", "a", prompt="how  many <mask>?", caption="a cat", history=(("is it big", "yes"),)
  )
  text = GOOD.replace(
    "task: image", "task: text\ntemplate: '{caption}. {history} Q: {prompt} <mask>.'"
  )
  [protocol] = protocol_lib.parse(text, "my.yaml")
  expected = "a cat. Question: is it big Answer: yes. Q: how many ? <mask>."
  assert protocol.text_of(example) == expected
  [plain] = protocol_lib.parse(GOOD, "my.yaml")
  assert plain.text_of(example) == "how many ?"


@pytest.mark.parametrize(
  ("name", "lacks"),
  [
    ("ndcg", {"relevance": ()}),
    ("vqa_accuracy", {"references": ("yes",) * 3}),
    ("cider", {"references": ()}),
    ("clip_score", {"image": None}),
  ],
)
def test_examples_must_have_what_a_metric_compares_with(name, lacks):
  good = Example("a", "a", "a.jpg", "x", ("yes",) * 4, candidates=("yes",), relevance=(1.0,))
  metrics.check_examples([name], [good])
  with refused(UserError, f"'{name}'", "example b"):
    metrics.check_examples([name], [good, dataclasses.replace(good, key="b", **lacks)])


def test_files_of_columns_differ_as_their_names():
  names = ["guidance 1.5", "guidance 1/5", "Guidance 1.5", "\u732b", "\u72ac", "x" * 50, "x" * 51]
  assert len({protocol_lib.stem(name) for name in names}) == len(names)
