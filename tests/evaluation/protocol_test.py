import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.data.published.files import SPLITS
from cm3leon_jax.decoding.config import SamplingConfig
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
  for protocol in protocol_lib.load(name):
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
  ("old", "new"),
  [
    ("task: image", "task: video"),
    ("count: 8", "count: -1"),
    ("title: drawings", "titel: drawings"),
    ("name: greedy", "name: plain"),
    ("{name: greedy, ", "{label: greedy, "),
    ("metrics: [clip_score]", "metrics: []"),
    ("task: image", "task: image\ntemplate: a <mask>"),
    ("task: image", "task: text\ntemplate: none here"),
    ("task: image", "task: image\ntemplate: '{prompt} {answer}'"),
    ("task: image", "task: image\ntemplate: '{prompt'"),
    ("task: image", "task: image\ntemplate: '{prompt:d}'"),
    ("format: heldout", "format: coco"),
    ("count: 8", "count: 8, split: val"),
    (GOOD, "- a list"),
    ("title: drawings", "title: ["),
  ],
)
def test_a_mistake_is_named(old, new):
  with refused(UserError):
    protocol_lib.parse(GOOD.replace(old, new), "my.yaml")


def test_a_field_of_the_sampler_that_does_not_exist_is_named():
  text = GOOD.replace("guidance: 2.0", "guidence: 2.0")
  [protocol] = protocol_lib.parse(text, "my.yaml")
  with refused(UserError):
    protocol_lib.sampling_of(protocol.columns[0], SamplingConfig())


def test_an_unknown_protocol_lists_the_known_ones():
  with refused(UserError):
    protocol_lib.load("nothing")


@pytest.mark.parametrize(
  ("names", "task", "count"),
  [(["fid"], "image", 9), (["clip_score"], "text", 9), (["frechet_distance"], "image", 1)],
)
def test_metrics_are_checked_before_anything_is_generated(names, task, count):
  with refused(UserError):
    metrics.check(names, task, count)


def test_digests_do_not_depend_on_the_order_of_fields():
  assert protocol_lib.digest({"a": 1, "b": (2,)}) == protocol_lib.digest({"b": [2], "a": 1})
  assert protocol_lib.digest({"a": 1}) != protocol_lib.digest({"a": 2})


def test_a_file_may_have_several_protocols_each_with_a_name():
  first, second = GOOD + "name: one\n", GOOD + "name: two\n"
  found = protocol_lib.parse(f"{first}---{second}", "my.yaml")
  assert [protocol.name for protocol in found] == ["one", "two"]
  for other in (first, GOOD):
    with refused(UserError):
      protocol_lib.parse(f"{first}---{other}", "my.yaml")


def test_one_protocol_of_a_file_is_chosen_by_its_name():
  [protocol] = protocol_lib.load("cm3leon_table2/vizwiz")
  assert protocol.data.format == "vizwiz"
  with refused(UserError):
    protocol_lib.load("cm3leon_table2/nothing")


def test_samples_of_texts_are_not_ranked():
  text = GOOD.replace("task: image", "task: text").replace("name: plain", "name: plain, samples: 2")
  with refused(UserError):
    protocol_lib.parse(text.replace("clip_score", "cider"), "my.yaml")


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
  ("name", "example"),
  [
    ("ndcg", {"references": ("yes",) * 9}),
    ("vqa_accuracy", {"references": ("yes",) * 3}),
    ("cider", {}),
    ("exact_match", {}),
    ("clip_score", {"prompt": "a cat"}),
  ],
)
def test_examples_must_have_what_a_metric_compares_with(name, example):
  good = Example("a", "a", "a.jpg", "x", ("yes",) * 4, candidates=("yes",), relevance=(1.0,))
  metrics.check_examples([name], [good, good], [{}, {}])
  with refused(UserError):
    metrics.check_examples([name], [good, Example("b", "b", **example)], [{}, {}])


def test_only_scenes_are_judged():
  with refused(UserError):
    metrics.check_examples(["judged"], [], [{"count": 1}, {}])


@pytest.mark.parametrize(
  "row",
  [
    {"source": "s", "cider": 1},
    {"model": "m", "source": "s", "column": "b"},
    {"model": "m", "source": "s", "cider": "61,6"},
    {"model": "m", "source": "s", "ciderr": 61.6},
  ],
)
def test_a_wrong_published_figure_is_named(row):
  metrics.check_published([{"model": "m", "source": "s", "cider": 1.5, "column": "a"}], ["a"])
  with refused(UserError):
    metrics.check_published([row], ["a"])


def test_a_metric_is_named_once():
  with refused(UserError):
    metrics.check(["cider", "cider"], "text", 9)


def test_files_of_columns_differ_as_their_names():
  names = ["guidance 1.5", "guidance 1/5", "Guidance 1.5", "\u732b", "\u72ac", "x" * 50, "x" * 51]
  assert len({protocol_lib.stem(name) for name in names}) == len(names)


def test_a_folder_is_refused(tmp_path):
  (tmp_path / "folder.yaml").mkdir()
  with refused(UserError, "folder.yaml"):
    protocol_lib.load(str(tmp_path / "folder.yaml"))
