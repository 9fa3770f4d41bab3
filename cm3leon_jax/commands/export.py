"""Writes the newest checkpoint in the Hugging Face layout to export/.

  python -m launch.export --config=ml_configs/scenes.py --workdir=workdir/scenes

transformers.AutoModelForCausalLM.from_pretrained("workdir/scenes/export") loads it. If torch is
installed, the logits of the exported model on held-out documents are compared with those of this
project.
--bundle=DIR also writes decoder, tokenizers and CLIP in float16 to one folder, for CM3Leon.load
and for --init_from of launch.train. With --base=OTHER it has the decoder alone: tokenizers, CLIP
and bank are those of another bundle, which `launch.copy_tokenizers` copied from.
"""

import errno

from absl import flags

from cm3leon_jax import stages
from cm3leon_jax.commands import common
from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.io import write_json

SAMPLES = 4
# Of a disk that is full or fails. Transformers, too, raises OSError, if it cannot load a model.
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_BUNDLE = flags.DEFINE_string(
  "bundle",
  "",
  "Folder of a bundle: all that generates images without the workdir.",
)
_BASE = flags.DEFINE_string(
  "base",
  "",
  "Bundle with the tokenizers and CLIP of this run, which --bundle then leaves out.",
)


def _write_bundle(settings, workdir, folder: str, base: str) -> None:
  from cm3leon_jax.export import bundle, weights
  from cm3leon_jax.reports import summary
  from cm3leon_jax.training import checkpoint

  cost = summary.cost(summary.collect(workdir))
  if cost is not None:
    cost["train_seconds"] += weights.seconds_before(workdir)
  with common.use_mesh(settings):
    params, step = checkpoint.load_params(workdir / "train", settings.model)
    numbers = bundle.write(folder, workdir, settings, params, step, cost, base)
  print(f"export: bundle of step {step}, {numbers['bytes'] / 1e6:.1f} MB, in {folder}.", flush=True)


def main(settings, workdir, bundle_folder: str = "", base: str = "") -> None:
  if base and not bundle_folder:
    raise UserError(f"--base is {base}, and --bundle is not given: it acts on bundles alone.")
  try:
    _export(settings, workdir)
    if bundle_folder:
      _write_bundle(settings, workdir, bundle_folder, base)
  except OSError as error:
    if error.errno not in NOT_WRITTEN:
      raise
    raise TryAgain(
      f"the export could not be written ({error}): it does not count; make room, or mend the disk, "
      "and run the same command again."
    ) from error


def _export(settings, workdir) -> None:
  from cm3leon_jax.data import raw_pairs
  from cm3leon_jax.data.documents import DocumentStore
  from cm3leon_jax.data.pipeline import join
  from cm3leon_jax.export import huggingface
  from cm3leon_jax.training import checkpoint

  folder = workdir / "export"
  with stages.stage(workdir, "export", settings) as summary, common.use_mesh(settings):
    if summary is None:
      return
    raw, origins = workdir / "raw", []
    if (raw / raw_pairs.INDEX).exists():
      origins = raw_pairs.read_index(raw)["origins"]
    write_json(folder / "training_data.json", origins)  # Sources and licenses of the training data.
    params, step = checkpoint.load_params(workdir / "train", settings.model)
    tokenizer = workdir / "text_tokenizer"
    numbers = huggingface.export(folder, params, settings.model, settings.vocab, tokenizer)
    summary.update(numbers, step=step)
    comparison = "torch and transformers are not installed, so its logits were not compared"
    if huggingface.can_compare():
      heldout = DocumentStore(workdir / "documents" / "heldout_pairs", settings.vocab)
      samples = [join([heldout[i]], settings.vocab) for i in range(min(SAMPLES, len(heldout)))]
      compared = huggingface.compare_logits(folder, params, settings.model, samples)
      summary.update(logits=compared)
      comparison = (
        f"logits differ by at most {compared['max_difference']:.1e} "
        f"(largest: {compared['max_logit']:.1f}) on {compared['tokens']} held-out tokens"
      )
    summary.update(compared="logits" in summary)
    model = f"{summary['architecture']}, {summary['parameters']:,} parameters"
    print(f"export: {model}, in {folder}; {comparison}.", flush=True)
    if settings.model.align_images:
      print(
        "export: config.model.align_images is set: other engines need position_ids after neighbors "
        "and for several images, see `position_ids` in config.json.",
        flush=True,
      )


if __name__ == "__main__":
  common.run(lambda settings, workdir: main(settings, workdir, _BUNDLE.value, _BASE.value))
