"""Encodes raw pairs, texts and interleaved documents as token ids.

cm3leon encode_documents --config=examples/scenes/config.py --workdir=workdir/scenes
"""

from __future__ import annotations

import functools

from etils import epath, epy

from cm3leon_jax.commands import common, sharded, shared_flags
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.stages import stages, table

with epy.lazy_imports():
  from cm3leon_jax.data.documents import encode
  from cm3leon_jax.evaluation import copied_tokenizer


def main(settings: Settings, workdir: epath.Path, flags: shared_flags.Encoding) -> None:
  with sharded.stage(workdir, "documents", settings) as summary:
    if summary is not None:
      copied_tokenizer.check_pairs(settings, workdir, flags.limits)
      job = encode.EncodeJob(
        str(workdir / "raw"),
        str(workdir / "documents"),
        functools.partial(encode.load_tokenizers, str(workdir), settings.vocab),
        settings.vocab,
        settings.vqgan.resolution,
        settings.text_tokenizer.max_caption_tokens,
        num_threads=settings.raw.num_threads,
      )
      # The id of `raw` is not passed, because shards identify their records by digest.
      tokenizers = stages.ids(settings, workdir, table.TOKENIZERS)
      summary.update(encode.encode_documents(job, tokenizers, flags.of_shards()))
      for split, numbers in summary.items():
        shown = ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())
        print(f"encode_documents {split}: {shown}")


if __name__ == "__main__":
  common.run(main, shared_flags.Encoding)
