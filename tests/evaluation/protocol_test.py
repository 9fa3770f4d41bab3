"""Tests protocols: the shipped ones are read, and a mistake gets one sentence."""

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.data.published.files import SPLITS
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.evaluation.protocols import metrics
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib

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
  ("old", "new", "sentence"),
  [
    ("task: image", "task: video", "my.yaml: task is 'video'; it must"),
    ("count: 8", "count: -1", "my.yaml: data.count is -1; it must be at least 0."),
    ("title: drawings", "titel: drawings", "my.yaml has no field 'titel': did you mean 'title'?"),
    ("name: greedy", "name: plain", "two columns have one name among plain, plain"),
    ("{name: greedy, ", "{label: greedy, ", "my.yaml: columns[1]"),
    ("metrics: [clip_score]", "metrics: []", "my.yaml: metrics"),
    ("task: image", "task: image\ntemplate: a <mask>", "has 1 <mask>; it must have no <mask>."),
    ("task: image", "task: text\ntemplate: none here", "has 0 <mask>; it must have one <mask>."),
    ("task: image", "task: image\ntemplate: '{prompt} {answer}'", "has {answer}; its fields are"),
    (
      "task: image",
      "task: image\ntemplate: '{prompt'",
      "the template '{prompt' is wrong (expected",
    ),
    ("task: image", "task: image\ntemplate: '{prompt:d}'", "has {prompt:d}; its fields are prompt"),
    (
      "format: heldout",
      "format: coco",
      "data: format is 'coco'; it must be one of heldout,",
    ),
    ("count: 8", "count: 8, split: val", "data: split of 'heldout' is 'val'; it must be left out"),
    (GOOD, "- a list", "my.yaml must have the fields of a protocol"),
    ("title: drawings", "title: [", "my.yaml, line 4, is not valid YAML (expected"),
  ],
)
def test_a_mistake_is_named(old, new, sentence):
  with pytest.raises(UserError) as error:
    protocol_lib.parse(GOOD.replace(old, new), "my.yaml")
  assert sentence in str(error.value)


def test_a_field_of_the_sampler_that_does_not_exist_is_named():
  text = GOOD.replace("guidance: 2.0", "guidence: 2.0")
  [protocol] = protocol_lib.parse(text, "my.yaml")
  with pytest.raises(
    UserError, match="column 'plain' of the protocol: sampling has no field 'guid"
  ):
    protocol_lib.sampling_of(protocol.columns[0], SamplingConfig())


def test_an_unknown_protocol_lists_the_known_ones():
  with pytest.raises(UserError, match=r"--protocol is 'nothing'; it must .* cm3leon_table1, "):
    protocol_lib.load("nothing")


@pytest.mark.parametrize(
  ("names", "task", "count", "sentence"),
  [
    (["fid"], "image", 9, "'fid' is no metric; they are frechet_distance,"),
    (["clip_score"], "text", 9, "metric 'clip_score' does not measure task 'text'"),
    (["frechet_distance"], "image", 1, "needs at least 2 samples, and the protocol has 1"),
  ],
)
def test_metrics_are_checked_before_anything_is_generated(names, task, count, sentence):
  with pytest.raises(UserError, match=sentence):
    metrics.check(names, task, count)


def test_digests_do_not_depend_on_the_order_of_fields():
  assert protocol_lib.digest({"a": 1, "b": (2,)}) == protocol_lib.digest({"b": [2], "a": 1})
  assert protocol_lib.digest({"a": 1}) != protocol_lib.digest({"a": 2})


def test_a_file_may_have_several_protocols_each_with_a_name():
  first, second = GOOD + "name: one\n", GOOD + "name: two\n"
  found = protocol_lib.parse(f"{first}---{second}", "my.yaml")
  assert [protocol.name for protocol in found] == ["one", "two"]
  for other in (first, GOOD):
    with pytest.raises(UserError, match=r"my.yaml has several protocols: give each a name"):
      protocol_lib.parse(f"{first}---{other}", "my.yaml")


def test_one_protocol_of_a_file_is_chosen_by_its_name():
  [protocol] = protocol_lib.load("cm3leon_table2/vizwiz")
  assert protocol.data.format == "vizwiz"
  with pytest.raises(UserError, match="'cm3leon_table2/nothing'; cm3leon_table2 has coco, vqa_v2"):
    protocol_lib.load("cm3leon_table2/nothing")


def test_samples_of_texts_are_not_ranked():
  text = GOOD.replace("task: image", "task: text").replace("name: plain", "name: plain, samples: 2")
  with pytest.raises(UserError, match="several samples, but CLIP ranks images"):
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
  ("name", "example", "what"),
  [
    ("ndcg", {"references": ("yes",) * 9}, "candidates with judgments"),
    ("vqa_accuracy", {"references": ("yes",) * 3}, "at least 4 answers of people"),
    ("cider", {}, "a reference"),
    ("exact_match", {}, "a reference"),
    ("clip_score", {"prompt": "a cat"}, "an image and a caption"),
  ],
)
def test_examples_must_have_what_a_metric_compares_with(name, example, what):
  good = Example("a", "a", "a.jpg", "x", ("yes",) * 4, candidates=("yes",), relevance=(1.0,))
  metrics.check_examples([name], [good, good], [{}, {}])
  with pytest.raises(UserError, match=f"metric '{name}' needs {what}, which example b does not"):
    metrics.check_examples([name], [good, Example("b", "b", **example)], [{}, {}])


def test_only_scenes_are_judged():
  with pytest.raises(UserError, match=r"'judged' needs held-out scenes: config\.raw\.source = 'sc"):
    metrics.check_examples(["judged"], [], [{"count": 1}, {}])


@pytest.mark.parametrize(
  ("row", "sentence"),
  [
    ({"source": "s", "cider": 1}, "needs a text in its field 'model'"),
    ({"model": "m", "source": "s", "column": "b"}, "is of the column 'b'; the protocol has a"),
    ({"model": "m", "source": "s", "cider": "61,6"}, "'cider' of m is '61,6'; it must be a metric"),
    ({"model": "m", "source": "s", "ciderr": 61.6}, "'ciderr' of m is 61.6; it must be a metric"),
  ],
)
def test_a_wrong_published_figure_is_named(row, sentence):
  metrics.check_published([{"model": "m", "source": "s", "cider": 1.5, "column": "a"}], ["a"])
  with pytest.raises(UserError) as error:
    metrics.check_published([row], ["a"])
  assert sentence in str(error.value)


def test_a_metric_is_named_once():
  with pytest.raises(UserError, match="named twice among cider, cider"):
    metrics.check(["cider", "cider"], "text", 9)


def test_files_of_columns_differ_as_their_names():
  names = ["guidance 1.5", "guidance 1/5", "Guidance 1.5", "\u732b", "\u72ac", "x" * 50, "x" * 51]
  assert len({protocol_lib.stem(name) for name in names}) == len(names)


def test_a_folder_and_a_file_that_is_no_text_are_refused(tmp_path):
  (tmp_path / "folder.yaml").mkdir()
  with pytest.raises(UserError, match="it must be a YAML file that exists"):
    protocol_lib.load(str(tmp_path / "folder.yaml"))
  (tmp_path / "bytes.yaml").write_bytes(b"title: \xff")
  with pytest.raises(UserError, match="is not UTF-8 text"):
    protocol_lib.load(str(tmp_path / "bytes.yaml"))
