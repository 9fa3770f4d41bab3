"""Measures the steps that drafts of image codes save on a trained model, see `decoding.drafts`.

python -m benchmarks.speed.drafts --workdir=RUN --prompts=PROMPTS.json --drafts=16
"""

import dataclasses
import json
import pathlib
import time

from absl import app, flags
import jax
import numpy as np

from cm3leon_jax import CM3Leon

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.", required=True)
_PROMPTS = flags.DEFINE_string("prompts", None, "JSON list of prompts.", required=True)
_WINDOWS = flags.DEFINE_list("drafts", ["16"], "Values of --drafts.")


def main(_) -> None:
  model = CM3Leon.load(_WORKDIR.value)
  prompts = json.loads(pathlib.Path(_PROMPTS.value).read_text())
  generator, vocab = model.pipeline.generator, model.pipeline.settings.vocab
  requests = model.requests([sample.task for [sample] in model.generate(prompts, seed=0)])
  expected = None
  for window in (0, *map(int, _WINDOWS.value)):
    generator.config = dataclasses.replace(generator.config, drafts=window)
    seconds = []
    for _ in range(2):  # The first run compiles.
      start = time.perf_counter()
      with jax.set_mesh(model.mesh):
        results = generator.generate(requests, range(len(requests)))
      seconds.append(time.perf_counter() - start)
    expected = expected or results
    equal = sum(np.array_equal(a.tokens, b.tokens) for a, b in zip(results, expected))
    share = np.array([(r.steps - 1) / len(r.codes(vocab)) for r in results])  # Without the end.
    print(
      f"drafts {window}: steps per code mean {share.mean():.3f}, median {np.median(share):.3f}, "
      f"{share.min():.3f} to {share.max():.3f}; {equal} of {len(results)} samples equal; "
      f"{seconds[-1]:.1f} s"
    )


if __name__ == "__main__":
  app.run(main)
