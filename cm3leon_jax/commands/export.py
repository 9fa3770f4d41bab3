"""Writes the newest checkpoint for other programs, to export/ or to --output.

  python -m launch.export --config=ml_configs/scenes.py --workdir=workdir/scenes
  python -m launch.export --config=... --workdir=... --format=gpt2 --output=gpt2 --dtype=float16

Without --format, transformers.AutoModelForCausalLM.from_pretrained("workdir/scenes/export") loads
it; docs/export.md has the formats. If torch is installed, the logits of the exported model on
held-out documents are compared with those of this project.
--bundle=DIR also writes decoder, tokenizers and CLIP in float16 to one folder, for CM3Leon.load
and for --init_from of launch.train. With --base=OTHER it has the decoder alone: tokenizers, CLIP
and bank are those of another bundle, which `launch.copy_tokenizers` copied from.
"""

import errno

from absl import flags

from cm3leon_jax import stages
from cm3leon_jax.commands import common
from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.export import formats

SAMPLES = 4
DEFAULT = formats.Choice()
# Of a disk that is full or fails. Transformers, too, raises OSError, if it cannot load a model.
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_FORMAT = flags.DEFINE_enum(
  "format", DEFAULT.format, list(formats.FORMATS), "Layout of the export."
)
_OUTPUT = flags.DEFINE_string(
  "output", "", "Folder of the export; default: export/ in the workdir, as a stage."
)
_DTYPE = flags.DEFINE_enum("dtype", DEFAULT.dtype, list(formats.DTYPES), "Dtype of the weights.")
_QUANTIZE = flags.DEFINE_enum(
  "quantize", None, ["int8"], "Matrices of the layers as int8, with a scale per output channel."
)
_MERGE_EMA = flags.DEFINE_bool(
  "merge_ema",
  None,
  "Write the moving average of the parameters, or with --nomerge_ema the last ones; default: the "
  "average, if the run keeps one (optimizer.ema_decay).",
)
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


def main(
  settings,
  workdir,
  bundle_folder: str = "",
  base: str = "",
  choice: formats.Choice = DEFAULT,
  output: str = "",
) -> None:
  if base and not bundle_folder:
    raise UserError(f"--base is {base}, and --bundle is not given: it acts on bundles alone.")
  try:
    _export(settings, workdir, choice, output)
    if bundle_folder:
      _write_bundle(settings, workdir, bundle_folder, base)
  except OSError as error:
    if error.errno not in NOT_WRITTEN:
      raise
    raise TryAgain(
      f"the export could not be written ({error}): it does not count; make room, or mend the disk, "
      "and run the same command again."
    ) from error


def _export(settings, workdir, choice: formats.Choice, output: str) -> None:
  if output:
    stages.inputs(settings, workdir, "export")
    with formats.replacing(output) as folder, common.use_mesh(settings):
      message = _write(folder, settings, workdir, choice)[1]
    print(f"export: {message}, in {output}.", flush=True)
    return
  asked = {k: str(v) for k, v in vars(choice).items() if v != getattr(DEFAULT, k)}
  stage = stages.stage(workdir, "export", settings, asked)
  with stage as summary, common.use_mesh(settings):
    if summary is None:
      return
    folder = workdir / "export"
    formats.clear(folder)
    numbers, message = _write(folder, settings, workdir, choice)
    summary.update(numbers)
    print(f"export: {message}, in {folder}.", flush=True)


def _write(folder, settings, workdir, choice: formats.Choice) -> tuple[dict, str]:
  """Writes an export; returns its numbers and what a user reads of it."""
  from cm3leon_jax.training import checkpoint

  stored = checkpoint.open_params(workdir / "train", average=choice.average)
  run = formats.Run(settings, workdir, stored, choice)
  numbers = {**formats.write(folder, run), "step": stored.step, "compared": False}
  model = numbers.get("architecture", choice.format)
  message = f"{model}, {numbers['parameters']:,} parameters"
  if "architecture" in numbers:
    compared = _compare(folder, settings, run)
    numbers |= {"logits": compared, "compared": True} if compared else {}
    message += f"; {_describe(compared)}"
  if settings.model.align_images and "architecture" in numbers:
    message += (
      "; config.model.align_images is set, so other engines need position_ids after neighbors and "
      "for several images, see `position_ids` in config.json"
    )
  return numbers, message


def _compare(folder, settings, run: formats.Run) -> dict | None:
  """Compares the logits of an export on held-out documents with those of this project."""
  from cm3leon_jax.data.documents import DocumentStore
  from cm3leon_jax.data.pipeline import join
  from cm3leon_jax.export import huggingface
  from cm3leon_jax.training import checkpoint

  if not huggingface.can_compare():
    return None
  heldout = DocumentStore(run.workdir / "documents" / "heldout_pairs", settings.vocab)
  samples = [join([heldout[i]], settings.vocab) for i in range(min(SAMPLES, len(heldout)))]
  average = run.choice.average is not False
  train, step = run.workdir / "train", run.params.step
  params, _ = checkpoint.load_params(train, settings.model, step, average)
  return huggingface.compare_logits(folder, params, settings.model, samples)


def _describe(compared: dict | None) -> str:
  if compared is None:
    return "torch and transformers are not installed, so its logits were not compared"
  return (
    f"logits differ by at most {compared['max_difference']:.1e} "
    f"(largest: {compared['max_logit']:.1f}) on {compared['tokens']} held-out tokens"
  )


def _run(settings, workdir) -> None:
  choice = formats.Choice(_FORMAT.value, _DTYPE.value, _QUANTIZE.value or "", _MERGE_EMA.value)
  main(settings, workdir, _BUNDLE.value, _BASE.value, choice, _OUTPUT.value)


if __name__ == "__main__":
  common.run(_run)
