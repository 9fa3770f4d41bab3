import dataclasses

import jax
import numpy as np

from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.control import control_of, put_sample, without_samples
from cm3leon_jax.decoding.request import Hole, infill, text_to_image
from tests.decoding.small import CODES, IMAGE, MIXTURE, VOCAB, A, guided_requests

PARTS = 8
OTHER = dataclasses.replace(MIXTURE, temperature=2.0, top_k=3, guidance=5.0)


def test_samples_in_rows_are_those_of_a_batch():
  requests, seeds, methods = guided_requests()[:2], [5, 6], [False, True]
  control = without_samples(3, 2, OTHER, IMAGE, PARTS)
  for row, one in zip((2, 0), zip(requests, seeds, methods)):
    sample = control_of(*([x] for x in one), MIXTURE, IMAGE, PARTS)
    put_sample(control, row, sample)
  batch = control_of(requests, seeds, methods, MIXTURE, IMAGE, PARTS)
  for field in ("plan", "guidance", "seeds"):
    np.testing.assert_array_equal(getattr(control, field)[[2, 0]], getattr(batch, field))
  assert control.contrastive.tolist() == [True, False, False]
  assert batch.contrastive.tolist() == [False, True]
  assert control.values.top_k.tolist() == [MIXTURE.top_k, OTHER.top_k, MIXTURE.top_k]
  assert (control.plan[1] == 0).all()
  types = [(x.dtype, x.ndim) for x in jax.tree.leaves(control)]
  per_row = [(x.dtype, max(x.ndim, 1)) for x in jax.tree.leaves(batch)]
  assert types == per_row


def test_a_row_is_written_whole():
  """Writing a shorter plan clears the rest of the row's previous plan."""
  pieces = (Hole(codes=1), CODES[1:3], Hole(codes=1), CODES[4:])
  long, short = infill(VOCAB, IMAGE, [(A,), pieces]), text_to_image(VOCAB, IMAGE, A)
  control = without_samples(1, 2, MIXTURE, IMAGE, PARTS)
  for request in (long, short):
    put_sample(control, 0, control_of([request], [0], [False], MIXTURE, IMAGE, PARTS))
  assert len(short.plan) < len(long.plan)
  np.testing.assert_array_equal(control.plan, grammar.plan_array([short.plan], PARTS))
