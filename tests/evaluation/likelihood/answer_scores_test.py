import numpy as np
import pytest
from scipy import special

from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.likelihood.pairs import score_answers
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.run.run import Run
from cm3leon_jax.weights import reading
from tests.generation.run import SETTINGS, one_device, save_run
from tests.models.tiny import model_logits
from tests.refusals import refused

TEXTS = ["Is it red? <mask>.", "What <mask> it?"]
ANSWERS = [["yes", "no", "yes it is"], ["is", "was"]]
LENGTH = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = tmp_path_factory.mktemp("run")
  save_run(root)
  with one_device():
    params, _ = reading.load_params(root / "train", SETTINGS.model)
    yield Pipeline.load(Run(root, SETTINGS), params, None, batch_size=4), params


def plain(pipeline, params, before, answer, after, codes) -> float:
  """Computes log p(answer, <eoss>) directly, from one pass over the document."""
  vocab, encode = pipeline.layout.vocab, pipeline.layout.encode
  ids = [
    *(vocab.eos, *before, vocab.mask(0), *after, vocab.brk, *vocab.image_ids(codes), vocab.eos),
    *(vocab.mask(0), *encode(answer), vocab.eoss),
  ]
  row = np.zeros((1, LENGTH), np.int32)  # Padded at the end, so that all passes are one program.
  row[0, : len(ids)] = ids
  positions = np.arange(LENGTH, dtype=np.int32)[None]
  logits = model_logits(SETTINGS.model, params, row, positions, np.ones_like(row))
  log_probs = special.log_softmax(np.float64(logits)[0], axis=-1)
  scored = range(len(ids) - len(encode(answer)) - 1, len(ids))
  return sum(log_probs[i - 1, ids[i]] for i in scored)


def test_scores_equal_those_of_plain_passes(run):
  pipeline, params = run
  codes = np.random.default_rng(0).integers(0, 64, (2, 16))
  with one_device():
    found = score_answers(pipeline, params, TEXTS, ANSWERS, codes)
    encode = pipeline.layout.encode
    # Pieces of text that share no token: "." and "?" stand alone; a space belongs to the next word.
    pieces = [
      (encode("Is it red?"), encode("x.")[len(encode("x")) :]),
      (encode("What"), encode("it?")),
    ]
    for scores, (before, after), answers, image in zip(found, pieces, ANSWERS, codes):
      expected = [plain(pipeline, params, before, a, after, image) for a in answers]
      np.testing.assert_allclose(scores, expected, atol=2e-4)
      # Negative control: another image.
      other = [plain(pipeline, params, before, a, after, np.flip(image)) for a in answers]
      assert np.abs(scores - other).max() > 1e-2


def test_an_empty_answer_and_a_long_text_are_refused(run):
  pipeline, params = run
  codes = np.zeros((1, 16), np.int32)
  with one_device():
    with refused(UserError, "empty"):
      score_answers(pipeline, params, TEXTS[:1], [[""]], codes)
    with refused(UserError, "positions"):
      score_answers(pipeline, params, ["word " * 200 + "<mask>."], [["yes"]], codes)
