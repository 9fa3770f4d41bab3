import numpy as np
import pytest

from cm3leon_jax.config.build import build
from cm3leon_jax.config.instructions import EDIT, InstructionTask
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.instructions import samples
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.tasks import choose_template, join_record
from cm3leon_jax.data.sources.records import RecordError
from cm3leon_jax.errors import UserError
from tests.data.stores import VOCAB
from tests.refusals import refused

VQA = "Question: {question} Answer: {answer}. <break> {image}"
CODES = VOCAB.image_ids(np.arange(4))
WORDS: dict[str, int] = {}


def encode(text):
  words = text.replace(".", " .").replace("?", " ?").split()
  ids = [WORDS.setdefault(word, VOCAB.num_special + len(WORDS)) for word in words]
  return np.array(ids, np.int32)


def words_of(tokens) -> str:
  names = {number: word for word, number in WORDS.items()}
  names |= {VOCAB.eos: "</s>", VOCAB.brk: "<break>"}
  names |= {VOCAB.mask(0): "<mask:0>", VOCAB.eoss: "<eoss>"}
  return " ".join(names.get(int(i), "@") for i in tokens)


def task(**fields) -> InstructionTask:
  given = {"name": "vqa", "templates": [VQA], "target": "answer", "format": "jsonl"}
  return build(InstructionTask, {**given, **fields})


def record(**texts) -> Record:
  return Record("r", "g", {"question": "how many?", "answer": "two cats", **texts}, {"image": "i"})


NOTHING = samples.Drops()


def build_sample(one, seed=0, drops=NOTHING, loss_on="all"):
  document = Document("r", one.segments, "", "", "")
  lengths = [len(segment.tokens) for segment in one.segments]
  rng = np.random.default_rng(seed)
  is_image = [segment.is_image for segment in one.segments]
  plan = samples.plan_instruction(lengths, is_image, (one.start, one.stop), rng, drops, VOCAB)
  tokens, weights = samples.build_instruction(document, plan, VOCAB, loss_on)
  assert len(tokens) == plan.length
  return tokens, weights


def test_an_answer_before_the_image_is_the_span_of_its_document():
  tokens, weights = build_sample(join_record(task(), record(), encode, {"image": CODES}))
  assert words_of(tokens) == (
    "</s> Question: how many ? Answer: <mask:0> . <break> @ @ @ @ </s> <mask:0> two cats <eoss>"
  )
  assert weights.tolist() == [0] + [1] * (len(tokens) - 1)


def test_only_the_target_and_its_end_may_count():
  one = join_record(task(), record(), encode, {"image": CODES})
  tokens, weights = build_sample(one, loss_on="target")
  assert words_of(tokens[weights > 0]) == "two cats <eoss>"
  draw = task(templates=["{question} <break> {image}"], target="image")
  tokens, weights = build_sample(
    join_record(draw, record(), encode, {"image": CODES}), loss_on="target"
  )
  assert words_of(tokens) == "</s> how many ? <break> @ @ @ @ </s>"
  assert words_of(tokens[weights > 0]) == "@ @ @ @ </s>"


def test_line_breaks_of_a_template_stay_and_those_of_records_become_spaces():
  """In this test, each character is a token, even a line break."""
  template = "Question: {question}\nWhy?\n{answer}\nSo. <break> {image}"
  texts = {"question": "how\nmany  birds?", "answer": " two\n cats "}
  one = join_record(
    task(templates=[template]), record(**texts), encode_characters, {"image": CODES}
  )
  text = "".join(chr(i) for i in one.segments[0].tokens)
  assert text == " Question: how many birds?\nWhy?\n two cats\nSo."
  assert text[one.start - 1 : one.stop - 1] == " two cats"


def encode_characters(text):
  return np.array([ord(c) for c in (f" {text}" if text else "")], np.int32)


@pytest.mark.parametrize(
  ("template", "texts", "lines"),
  [
    ("Q: {question}\nC: {context?}\nA: {answer}", {"context": "it flies"},
     [" Q: how many?\nC: it flies\nA: two cats"]),
    ("Q: {question}\nC: {context?}\nA: {answer}", {"context": " \n"},
     [" Q: how many?\nA: two cats"]),
    ("{context?}\n{hint?}\nA: {answer}", {"context": "", "hint": ""}, [" A: two cats"]),
    ("{context?}\n{hint?} <break> {answer}", {"context": "", "hint": ""}, [" two cats"]),
    ("{answer} <break> {context?}", {"context": "b"}, [" two cats", " b"]),
  ],
)  # fmt: skip
def test_the_line_of_an_optional_text_is_left_out_if_it_is_empty(template, texts, lines):
  one = join_record(task(templates=[template]), record(**texts), encode_characters, {})
  found = ["".join(chr(i) for i in segment.tokens) for segment in one.segments]
  assert found == lines
  assert "".join(found)[one.start - 1 : one.stop - 1] == " two cats"


EDITED = {"templates": ["{image} <break> {after}"], "target": "after", "drop_instruction": 0.1}


@pytest.mark.parametrize(
  ("kind", "facts", "fields", "texts"),
  [
    (RecordError, ["record r", "question"], {}, {"question": " \n"}),
    (RecordError, ["record r", "answer"], {}, {"answer": " \n"}),
    (UserError, ["task vqa"], {"templates": ["{answer} {context} <break> {image}"]}, {}),
    (UserError, ["task vqa"], {"templates": ["{answer} {image}"]}, {}),
    (UserError, ["task vqa"], {"templates": ["{image} <break> {answer}"], "target": "image"}, {}),
    (UserError, ["task vqa"], {"drop_all": 0.5}, {}),
    (UserError, ["task vqa"], EDITED, {}),
  ],
)
def test_what_is_no_sample_of_its_task_is_refused(kind, facts, fields, texts):
  one = Record("r", "g", record(**texts).texts, {"image": "i", "after": "j"})
  with refused(kind, *facts):
    join_record(task(**fields), one, encode, {"image": CODES, "after": CODES})


@pytest.mark.parametrize(
  ("first", "whole"),
  [(False, "@ @ @ @ <break> how many ?"), (True, "how many ? <break> @ @ @ @")],
)
def test_what_an_edit_may_lack(first, whole):
  edit = task(
    templates=[f"{EDIT} <break> {{image}} <break> {{question}} <break> {{after}}"],
    target="after",
  )
  images = {"image": "i", "after": "j"}
  after = VOCAB.image_ids(np.arange(4, 8))
  one = join_record(
    edit, Record("r", "g", {"question": "how many?"}, images), encode,
    {"image": CODES, "after": after}, first,
  )  # fmt: skip
  found = {}
  for seed in range(200):
    tokens, weights = build_sample(one, seed, samples.Drops(0.3, 0.2), "target")
    found.setdefault(words_of(tokens), 0)
    found[words_of(tokens)] += 1
    np.testing.assert_array_equal(tokens[weights > 0][:-1], after)
  assert set(found) == {
    f"</s> {EDIT} <break> {whole} <break> @ @ @ @ </s>",
    f"</s> {EDIT} <break> @ @ @ @ <break> @ @ @ @ </s>",
    "</s> <mask:0> <break> @ @ @ @ </s>",
  }
  assert found[f"</s> {EDIT} <break> @ @ @ @ <break> @ @ @ @ </s>"] == pytest.approx(60, abs=20)
  assert found["</s> <mask:0> <break> @ @ @ @ </s>"] == pytest.approx(40, abs=17)


def test_templates_are_chosen_by_the_key_each_as_often():
  three = task(templates=[VQA, "{question} {answer} <break> {image}", "{answer} <break> {image}"])
  chosen = [choose_template(three, str(i)) for i in range(600)]
  assert chosen == [choose_template(three, str(i)) for i in range(600)]
  assert all(160 < chosen.count(template) < 240 for template in three.templates)
