"""Measures the steps per image and the speed of speculative Jacobi decoding on a finished run.

  python -m benchmarks.decode_steps --config=ml_configs/scenes.py --workdir=workdir/scenes

A batch of images for held-out captions runs until its slowest image is complete.
"""

import time

from absl import flags
import numpy as np

from cm3leon_jax.checkpoints import reading
from cm3leon_jax.commands import common
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig

_WINDOWS = flags.DEFINE_list("windows", ["0", "4", "8", "16", "32"], "Values of draft_window.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Batch sizes.")
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs, after a run that compiles.", lower_bound=1)


def main(settings, workdir) -> None:
  vocab, image_tokens = settings.vocab, settings.vqgan.image_tokens
  store = DocumentStore(workdir / "documents" / "heldout_pairs", vocab)

  def caption(document: float) -> request.Request:
    tokens = store[int(document)].segments[0].tokens
    return request.text_to_image(vocab, image_tokens, tokens)

  print("| batch | window | steps per image | codes per step | codes/s |")
  print("|---|---|---|---|---|")
  with common.use_mesh(settings):
    params, _ = reading.load_params(workdir / "train", settings.model)
    for batch in map(int, _BATCHES.value):
      for window in map(int, _WINDOWS.value):
        generator = Generator(
          params, GeneratorConfig.of(settings, batch_size=batch, draft_window=window)
        )
        steps, plain, rates = [], generator.programs.generate_image, []

        def counted(*arguments, plain=plain, steps=steps):
          loop, count = plain(*arguments)
          steps.append(int(count))
          return loop, count

        generator.programs.generate_image = counted
        for run in range(_RUNS.value + 1):
          requests = [caption(i) for i in np.linspace(run, len(store) - 1, batch)]
          start = time.perf_counter()
          generator.generate(requests, range(run * batch, (run + 1) * batch))
          rates.append(batch * image_tokens / (time.perf_counter() - start))
        generator.programs.generate_image = plain
        mean = np.mean(steps[1:]) if window else image_tokens
        speed = f"{np.median(rates[1:]):.0f} ({min(rates[1:]):.0f} to {max(rates[1:]):.0f})"
        print(
          f"| {batch} | {window} | {mean:.0f} | {image_tokens / mean:.2f} | {speed} |", flush=True
        )


if __name__ == "__main__":
  common.run(main)
