"""Trains the byte-level BPE text tokenizer on the captions and texts of the training split.

cm3leon train_text_tokenizer --config=examples/scenes/config.py --workdir=workdir/scenes
"""

from __future__ import annotations

from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  from cm3leon_jax.data.raw import reader
  from cm3leon_jax.tokenizers import text


def main(settings: Settings, workdir: epath.Path) -> None:
  if stages.is_given(workdir, "text_tokenizer"):
    return
  with stages.stage(workdir, "text_tokenizer", settings) as summary:
    if summary is not None:
      captions = reader.read_captions(workdir / "raw")
      texts = captions + [record.text for record in reader.read_texts(workdir / "raw", "train")]
      folder = workdir / "text_tokenizer"
      numbers = text.train_text_tokenizer(texts, settings.vocab, settings.text_tokenizer, folder)
      summary.update(numbers)
      print("train_text_tokenizer:", ", ".join(f"{k} {v:.6g}" for k, v in summary.items()))


if __name__ == "__main__":
  common.run(main)
