import dataclasses

import numpy as np
import pytest

from cm3leon_jax.data.instructions.samples import Drops
from cm3leon_jax.data.rows import loader as pipeline
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.reports import inspect_page, row_contents
from cm3leon_jax.reports.instruction_check import CheckedTask, target_range
from tests.data.stores import IMAGE_TOKENS, VOCAB, make_instructions, make_plan, make_sources
from tests.refusals import refused
from tests.reports.inspect_page_test import image_tokenizer, text_tokenizer  # noqa: F401 (fixtures)
from tests.reports.row_contents_test import Changed

ROWS = range(30)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  root = tmp_path_factory.mktemp("stores")
  return make_instructions(root), make_sources(root)


def plan_of(stores, loss_on="all", loss_weight=1.0, pairs=0.0) -> RowPlan:
  fields = {"drops": Drops(0.3, 0.3), "loss_on": loss_on, "loss_weight": loss_weight}
  tasks, (pair_source, _) = stores
  sources = [
    dataclasses.replace(
      task, share=(1 - pairs) / 2, instructions=dataclasses.replace(task.instructions, **fields)
    )
    for task in tasks
  ]
  if pairs:
    sources.append(dataclasses.replace(pair_source, share=pairs, name="pairs"))
  return make_plan(sources)


def views_of(loader, scores=None):
  rows = (row_contents.read_row(loader, scores, number) for number in ROWS)
  return [view for row in rows for view in row.samples]


def kind_of(view) -> str:
  """Returns a sample's kind: its task, "pair", or what was dropped from it."""
  task = view.origin.task
  if task is None:
    return "pair"
  left_out = len(task.left_out(view.origin.document))
  return {0: task.name, 1: "no instruction", 3: "nothing before"}[left_out]


@pytest.mark.parametrize(("loss_on", "weight"), [("all", 1.0), ("target", 1.0), ("target", 0.25)])
def test_samples_of_every_kind_are_read_with_their_targets(stores, loss_on, weight):
  plan = plan_of(stores, loss_on, weight, pairs=0.3)
  scores = np.zeros(plan.sources[2].neighbors.shape, np.float32)
  views = views_of(pipeline.RowLoader(plan, VOCAB, mark_sources=True), scores)
  assert {kind_of(view) for view in views} == {
    "answers", "edits", "no instruction", "nothing before", "pair",
  }  # fmt: skip
  for view in views:
    assert (view.target is None) == (kind_of(view) == "pair")
    if view.target is not None:
      record = pipeline.join([view.origin.document], VOCAB)
      found = view.sample.tokens[slice(*view.target)]
      np.testing.assert_array_equal(found, record[slice(*view.origin.task.target)])
      assert view.dropped == (kind_of(view) == "nothing before")


def test_without_documents_no_scores_are_needed(stores):
  assert len(views_of(pipeline.RowLoader(plan_of(stores), VOCAB))) > 30


def test_target_range_literal():
  eos, brk, eoss, mask = VOCAB.eos, VOCAB.brk, VOCAB.eoss, VOCAB.mask(0)
  task = CheckedTask("t", (2, 4), None, None)
  infilled = np.array([eos, 40, mask, brk, 591, 592, eos, mask, 41, 42, eoss])
  assert target_range(infilled, task, VOCAB) == (8, 10)
  assert target_range(np.array([eos, 40, brk, 591, 592, eos]), task, VOCAB) == (3, 5)
  assert target_range(np.array([eos, mask, brk, 591, 592, eos]), task, VOCAB) == (3, 5)


def one_sample(stores, kind, **fields):
  """Returns a plan, the index of a row that begins with a sample of this kind, and the sample."""
  plan = plan_of(stores, **fields)
  for number in ROWS:
    row = row_contents.read_row(pipeline.RowLoader(plan, VOCAB), None, number)
    if kind_of(row.samples[0]) == kind:
      return plan, number, row.samples[0]
  raise AssertionError(f"no row begins with {kind}")


def read(plan, number, change):
  return row_contents.read_row(Changed(plan, change), None, number)


@pytest.mark.parametrize("kind", ["answers", "edits", "no instruction", "nothing before"])
def test_another_token_in_the_target_is_refused(stores, kind):
  plan, number, view = one_sample(stores, kind)

  def change(row):
    at = view.target[1] - 1  # The token is predicted at the position before it.
    row["targets"][at - 1] = row["inputs"][at] = VOCAB.text_size - 1 + (kind != "answers")

  assert read(plan, number, lambda row: None)
  with refused(ValueError):
    read(plan, number, change)


def changed_task(view, **fields):
  """Reads a sample as if the fields of its task were others, which repeats all checks."""
  task = dataclasses.replace(view.origin.task, **fields)
  origin = dataclasses.replace(view.origin, task=task)
  return row_contents.view_sample(view.sample, origin, VOCAB, 128)


def test_a_target_at_another_place_of_the_record_is_refused(stores):
  _, _, view = one_sample(stores, "answers")
  start, stop = view.origin.task.target
  assert changed_task(view).target == view.target
  with refused(ValueError):
    changed_task(view, target=(start - 1, stop - 1))


def test_a_sample_that_lacks_something_else_than_planned_is_refused(stores):
  found = {
    kind: one_sample(stores, kind)[2] for kind in ("edits", "no instruction", "nothing before")
  }
  for kind, view in found.items():
    for planned, other in found.items():
      if kind == planned:
        assert changed_task(view, plan=other.origin.task.plan)
      else:
        with refused(ValueError):
          changed_task(view, plan=other.origin.task.plan)


def set_weight(token, value):
  """Returns a function that sets the loss weight of token number `token` of the target."""

  def change(weights, view):
    weights[view.target[0] + token - 1] = value

  return change


@pytest.mark.parametrize(
  ("kind", "loss_on", "change"),
  [
    ("answers", "all", set_weight(-3, 0)),
    ("answers", "target", set_weight(-1, 1)),  # The sentinel.
    ("answers", "target", set_weight(0, 0)),
    ("edits", "target", set_weight(IMAGE_TOKENS, 0)),  # </s>.
    ("nothing before", "all", set_weight(-1, 1)),
    ("no instruction", "target", lambda weights, view: weights.__imul__(0.5)),
  ],
)
def test_wrong_loss_weights_are_refused(stores, kind, loss_on, change):
  plan, number, view = one_sample(stores, kind, loss_on=loss_on)
  with refused(ValueError):
    read(plan, number, lambda row: change(row["loss_weights"], view))


def test_wrong_marks_of_sources_are_refused(stores):
  plan = plan_of(stores)
  loader = Changed(plan, lambda row: row.update(sources=1 + (row["sources"] == 1)))
  loader.mark_sources = True
  with refused(ValueError):
    row_contents.read_row(loader, None, 0)


@pytest.fixture(scope="module")
def shown(stores, request):
  """Returns, for each kind, a sample's view, its context on the page, the page and the decoder."""
  tokenizers = [request.getfixturevalue(name) for name in ("text_tokenizer", "image_tokenizer")]
  result = {}
  for kind in ("answers", "edits", "no instruction", "nothing before"):
    plan, number, view = one_sample(stores, kind)
    rows = [row_contents.read_row(pipeline.RowLoader(plan, VOCAB), None, number)]
    decoder = inspect_page.make_decoder(rows, VOCAB, *tokenizers)
    html = inspect_page.render(rows, plan, decoder, "c.py", "train")
    result[kind] = view, inspect_page.sample_context(view, decoder), html, decoder
  return result


def targets_of(context):
  boxes = [block for block in context["blocks"] if block["kind"] == "box"]
  return [(box["title"], item) for box in boxes for item in box["items"] if item.get("target")]


def test_the_page_marks_the_target_and_names_the_task(shown):
  for kind, (view, context, html, _) in shown.items():
    assert context["facts"][0] == ("task", view.origin.task.name)
    ((title, item),) = targets_of(context)
    if kind == "answers":
      assert title == "target, from the document"
      assert item["pieces"][0]["name"] == "<mask:0>"
    else:
      assert (title, item["kind"]) == ("the document", "image")
    assert html.count('<figure class="target">') == html.count("<article")
    assert "target of an instruction" in html
    assert "<dt>neighbors per document</dt>" not in html


def test_the_page_says_what_a_sample_lacks(shown):
  assert shown["edits"][1]["remarks"] == shown["answers"][1]["remarks"] == []
  (remark,) = shown["nothing before"][1]["remarks"]
  assert remark.startswith("Everything before the target dropped: <mask:0> replaces it")
  view, context, _, decoder = shown["no instruction"]
  text = decoder.text(view.origin.document.segments[2].tokens, begins=True)
  assert context["remarks"] == [f"Instruction dropped: “{text}” is omitted."]
  kinds = [item["kind"] for item in context["blocks"][1]["items"]]
  assert kinds == ["text", "tag", "image", "tag", "image"]
