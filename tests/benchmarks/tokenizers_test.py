import numpy as np
import pytest

from benchmarks.evidence import tokenizers, tokenizers_table
from benchmarks.evidence.tokenizers import ARMS, Experiment

PLAN = {"cpu_seconds": {}, "steps": {**dict.fromkeys(ARMS, 20), "decoder": 30}, "cores": 2}


def run_of(arm, seed, psnr, bits):
  return {
    "arm": arm, "seed": seed, "psnr_db": psnr, "codebook_perplexity": 100.0, "codes": 512,
    "codes_used": 300, "train_codes_used": 384, "bits_per_pixel": bits,
  }  # fmt: skip


def summary(bounded=True):
  values = {"restarts": ((20, 0.5), (22, 0.6)), "fsq": ((21, 0.4), (24, 0.4))}
  runs = [run_of(arm, i, *x) for arm, pairs in values.items() for i, x in enumerate(pairs)]
  about = {"source": "scenes", "codes": 512, "image_tokens": 64, "minutes": 4.0, **PLAN}
  if bounded:
    about["commonest_square"] = 0.5
  return tokenizers_table.summarize({**about, "decoder_minutes": 4.0}, runs, ARMS)


def test_the_table_in_literals():
  """The confidence interval of differences of +1 and +2 dB is 1.5 +- 12.706 x 0.5."""
  result = summary()
  assert result["arms"].keys() == {"restarts", "fsq"}
  gap = result["arms"]["fsq"]["difference"]["psnr_db"]
  assert gap["mean"] == 1.5
  np.testing.assert_allclose(gap["interval"], (1.5 - 6.353, 1.5 + 6.353), atol=1e-3)
  lines = tokenizers_table.markdown(result).splitlines()
  assert lines[0].count("|") == lines[2].count("|") == 9
  assert "| 21.00 (20.00 to 22.00) | 100 | 75.0% | 0.5500 (0.5000 to 0.6000) | - | - |" in lines[2]
  assert lines[3].startswith("| FSQ | 20 | 22.50 (21.00 to 24.00) | 100 | 75.0% | 0.4000 | +1.50 [")
  # Half of the squares are equal; the rest use 511 other codes. The bound is 2 x sqrt(511).
  assert (
    " ".join(lines).rstrip().endswith("equal and have one code, so perplexity is at most 45.2.")
  )
  assert "at most" not in tokenizers_table.markdown(summary(bounded=False))


@pytest.mark.slow
def test_a_whole_comparison(tmp_path):
  """Compares two tokenizers with the real commands. The second call trains nothing."""
  given = {
    "raw.options.train": 300, "raw.options.heldout": 70, "raw.options.rare_objects": 20,
    "raw.options.bank": 40,
    "vocab.text_size": 512, "clip.steps": 20, "clip.batch_size": 32, "vqgan.width": 8,
    "vqgan.batch_size": 8, "model.num_layers": 1, "model.width": 32, "model.mlp_width": 32,
    "train.global_batch_size": 8, "train.checkpoint_every": 20,
  }  # fmt: skip
  experiment = Experiment(tmp_path, 64, 0.1, 0.02, given)
  result = tokenizers.run_all(experiment, ["restarts", "fsq"], 1)
  for arm in ("restarts", "fsq"):
    measures = result["arms"][arm]["measures"]
    assert 0 < measures["bits_per_pixel"]["mean"] < 6 * 64 / 48**2 * 2
    assert 0 < measures["used"]["mean"] <= 1
  files = {p: p.stat().st_mtime_ns for p in experiment.folder.glob("runs/*/*/done.json")}
  assert len(files) == 2 * 4 + 2 * len(tokenizers.SHARED)
  assert tokenizers.run_all(experiment, ["restarts", "fsq"], 1)["runs"] == result["runs"]
  assert {p: p.stat().st_mtime_ns for p in files} == files
