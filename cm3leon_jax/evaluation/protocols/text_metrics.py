"""Computes metrics of captions and answers. All values are multiplied by 100, as in papers."""

from collections.abc import Sequence
import shutil
from typing import Any

from cm3leon_jax import extras
from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import answers
from cm3leon_jax.evaluation.protocols.column import ColumnSamples, mean, present


def cider(column: ColumnSamples) -> dict:
  """Computes CIDEr-D times 100. The references of all examples determine the n-gram weights."""
  _, scores = _scorers().cider.cider.Cider().compute_score(*_tokens(column))
  return mean((100 * scores).tolist(), column)


def bleu4(column: ColumnSamples) -> dict:
  """Computes BLEU-4 times 100, with all captions as one corpus. It has no interval."""
  scores, _ = _scorers().bleu.bleu.Bleu(4).compute_score(*_tokens(column), verbose=0)
  return {"value": 100 * scores[-1], "low": None, "high": None, "samples": len(column.lines)}


def _scorers() -> Any:
  """Returns the package with which publications score captions. Its tokenizer is a Java program."""
  try:
    import pycocoevalcap.bleu.bleu
    import pycocoevalcap.cider.cider
    import pycocoevalcap.tokenizer.ptbtokenizer
  except ImportError as error:
    raise UserError(f"captions need a package ({error}): {extras.install('eval')}.") from error
  if shutil.which("java") is None:
    raise UserError("captions need the program java, for their tokens: install it, e.g. OpenJDK.")
  return pycocoevalcap


def vqa_accuracy(column: ColumnSamples) -> dict:
  """Computes the VQA accuracy, times 100."""
  return mean((100 * answers.vqa_accuracies(*_texts(column))).tolist(), column)


def exact_match(column: ColumnSamples) -> dict:
  """Computes the percentage of texts that equal a reference; both are normalized first."""
  return mean((100 * answers.exact_matches(*_texts(column))).tolist(), column)


def ndcg(column: ColumnSamples) -> dict:
  """Computes NDCG times 100, with the candidates ranked by their log-probabilities."""
  pairs = zip(present(column.candidates), column.examples)
  values = [answers.ndcg([scores], [example.relevance])[0] for scores, example in pairs]
  return mean([100 * float(value) for value in values], column)


def _texts(column: ColumnSamples) -> tuple[list[str], list[Sequence[str]]]:
  texts = [line["text"] for line in column.lines]
  return texts, [example.references for example in column.examples]


def _tokens(column: ColumnSamples) -> tuple[dict, dict]:
  """Returns ({example: its references}, {example: [its text]}), tokenized."""
  texts, references = _texts(column)
  sets = [*references, *([text] for text in texts)]
  # The tokenizer reads a caption per line, and other white space than "\n" can also end a line.
  lines = {i: [{"caption": " ".join(x.split())} for x in some] for i, some in enumerate(sets)}
  found = _scorers().tokenizer.ptbtokenizer.PTBTokenizer().tokenize(lines)
  count = len(texts)
  return {i: found[i] for i in range(count)}, {i: found[count + i] for i in range(count)}
