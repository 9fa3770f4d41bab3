"""Exports the newest checkpoint for other programs, to export/ or --output.

  cm3leon export --workdir=workdir/scenes
  cm3leon export --workdir=scenes --output=scenes_int8 --quantize=int8

--workdir is the workdir of a run, the folder of a bundle, or the name of an installed bundle.
Without --config, the command uses the settings that are stored there. The default output folder is
export/ in the workdir of a run, or export/ in the current folder for a bundle. The default format
can be loaded with transformers.AutoModelForCausalLM.from_pretrained("workdir/scenes/export");
docs/export.md lists the other formats. If torch is installed, the command compares the logits of
the exported model with the original logits on held-out documents.

--bundle=DIR also writes the decoder, the tokenizers and CLIP in float16 to one folder, for
CM3Leon.load and for --init_from of cm3leon train. With --base=OTHER, the bundle contains only the
decoder. It then uses the tokenizers, CLIP, bank and replay documents of the bundle OTHER, from
which `cm3leon copy_tokenizers` copied them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Annotated, Literal

from etils import epath, epy
from pydantic import NonNegativeInt

from cm3leon_jax.commands import common, flag
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import formats
from cm3leon_jax.files import locks
from cm3leon_jax.files.atomic import absolute
from cm3leon_jax.stages import from_data, stages, table

with epy.lazy_imports():
  import jax
  import numpy as np

  from cm3leon_jax.data.documents import store
  from cm3leon_jax.data.rows import loader
  from cm3leon_jax.evaluation.likelihood import bits
  from cm3leon_jax.export import bundle, huggingface, peft_adapter, published_layout
  from cm3leon_jax.reports import model_card, summary
  from cm3leon_jax.run import bundles, initial
  from cm3leon_jax.run import run as run_lib
  from cm3leon_jax.weights import int8

SAMPLES = 4  # Number of held-out documents on which logits are compared.
# Logits of larger exports are not compared, because the comparison loads the decoder twice.
COMPARED = 500_000_000
UNITS = {"image": "image code", "text": "text token"}
DEFAULT = formats.Choice()


@dataclasses.dataclass(frozen=True)
class Flags(flag.Fields):
  format: Annotated[str, flag.one_of(formats.FORMATS)] = DEFAULT.format
  """Layout of the export."""
  output: str = ""
  """Folder of the export. Default: export/ in the workdir of a run, as a stage of the run, or
  export/ in the current folder for a bundle."""
  dtype: Annotated[str, flag.one_of(formats.DTYPES)] = DEFAULT.dtype
  """Dtype of the weights."""
  quantize: Literal["int8"] | None = None
  """Store the matrices of the layers as int8, one scale per channel."""
  merge_ema: bool | None = None
  """Write the moving average of the parameters, or with --merge_ema=False the last parameters.
  Default: the average, if the run keeps one (optimizer.ema_decay)."""
  bundle: str = ""
  """Folder of a bundle to write, with everything that sampling needs."""
  base: str = ""
  """Bundle that has the tokenizers and CLIP of this run, so that --bundle leaves them out."""
  replay_documents: NonNegativeInt = from_data.BASE_DOCUMENTS
  """Maximum number of training pairs that --bundle contains, so that a tuning can replay them."""

  @property
  def choice(self) -> formats.Choice:
    return formats.Choice(self.format, self.dtype, self.quantize or "", self.merge_ema)


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  bundle_folder, base, replayed = flags.bundle, flags.base, flags.replay_documents
  if base and not bundle_folder:
    raise UserError(f"--base is {base}, but --bundle is not given: --base applies only to bundles.")

  trained = run_lib.Run.open(workdir, settings)
  if trained.kind == "bundle" and bundle_folder:
    raise UserError(f"--bundle is given, but {workdir} is already a bundle: copy {trained.folder}.")
  choice = flags.choice
  formats.check(choice, trained.settings)
  if choice.format == "peft":
    peft_adapter.adapters_of(trained)
  output = flags.output or "export" * (trained.kind == "bundle")
  with _alone(absolute(output).parent if output else workdir):
    _export(trained, choice, output)
  if bundle_folder:
    with _alone(absolute(bundle_folder).parent), common.use_mesh(trained.settings):
      params, step = trained.params()
      cost = summary.total_cost(trained.folder)
      numbers = bundle.write(bundle_folder, trained, params, step, cost, base, replayed)
    size = f"{numbers['bytes'] / 1e6:.1f} MB"
    print(f"export: bundle of step {step}, {size}, in {bundle_folder}.", flush=True)


def _alone(folder: epath.Path) -> contextlib.AbstractContextManager[None]:
  """Waits until no other export writes into a local folder."""
  if "://" not in os.fspath(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return locks.alone(folder, f"export: waits until another export into {folder} has ended.")


def _export(trained: run_lib.Run, choice: formats.Choice, output: str) -> None:
  settings, workdir = trained.settings, trained.folder
  if output:
    run_lib.ids(trained, [*table.STAGES["export"].reads])
    with formats.replacing(output) as folder, common.use_mesh(settings):
      message = _write(folder, epath.Path(output), trained, choice)[1]
    print(f"export: {message}.", flush=True)
    return
  asked = {k: str(v) for k, v in vars(choice).items() if v != getattr(DEFAULT, k)}
  stage = stages.stage(workdir, "export", settings, asked)
  with stage as summary, common.use_mesh(settings):
    if summary is None:
      return
    folder = workdir / "export"
    formats.clear(folder)
    numbers, message = _write(folder, folder, trained, choice)
    summary.update(numbers)
    print(f"export: {message}.", flush=True)


def _write(
  folder: epath.Path, place: epath.Path, trained: run_lib.Run, choice: formats.Choice
) -> tuple[dict, str]:
  """Writes an export to `folder`, which is later moved to `place`.

  Returns numbers for the summary, and a message for the user.
  """
  settings = trained.settings
  read = peft_adapter.open_params if choice.format == "peft" else run_lib.open_params
  stored = read(trained, choice.average)
  run = formats.TrainedRun(trained, stored, choice)
  numbers = {**formats.write(folder, run), "step": stored.step, "compared": False}
  written = numbers.get("architecture", choice.format)
  parts = [f"{written}, {numbers['parameters']:,} parameters, in {place}"]
  transformers = "architecture" in numbers
  if transformers or choice.format in formats.COMPUTING:
    checked, sentences = _check(folder, run, transformers)
    numbers |= checked
    parts += sentences
    if settings.sampling.method != "top_p":
      parts.append(
        f"config.sampling.method is {settings.sampling.method}, but the export samples by top-k "
        "and top-p, with guidance"
      )
    if transformers and settings.model.align_images:
      parts.append(
        "config.model.align_images is set, so other engines need position_ids after neighbors and "
        "for several images, see `cm3leon.position_ids` in config.json"
      )
  about = {} if choice.average is not False else {"average": False}
  about |= {"cost": bundles.about(trained.folder)["cost"]} if trained.kind == "bundle" else {}
  if choice.format != "peft":  # Its card does not describe a whole model.
    model_card.write(folder, trained, stored.step, {**numbers, **about})
  return numbers, "; ".join(parts)


def _check(
  folder: epath.Path, run: formats.TrainedRun, transformers: bool
) -> tuple[dict, list[str]]:
  """Compares the export with this project's decoder on held-out documents.

  If `transformers` can load the export, compares its logits. If the export rounds the parameters,
  measures the loss, in bits per token, before and after rounding. Returns numbers for the summary,
  and sentences for the user.
  """
  trained, settings, choice = run.trained, run.settings, run.choice
  documents = trained.stages / "documents" / "heldout_pairs"
  if trained.kind == "bundle" or not documents.exists():
    kind = "bundle" if trained.kind == "bundle" else "run without documents"
    return {}, [f"its logits were not compared: a {kind} has no held-out documents"] * transformers
  rounds = bool(choice.quantize) or choice.dtype != DEFAULT.dtype
  if not (transformers or rounds):
    return {}, []
  compares = transformers and huggingface.can_compare(choice.quantize)
  if run.params.count > COMPARED:
    return {}, [f"logits are compared up to {COMPARED:,} parameters only"] * transformers
  heldout = store.DocumentStore(documents, settings.vocab)
  params, _ = trained.params(run.params.step, choice.average is not False)
  written = params
  if rounds:
    written = int8.rounded(jax.device_get(params), choice.dtype, bool(choice.quantize))
    written = jax.device_put(written, jax.tree.map(lambda x: x.sharding, params))
  numbers: dict = {}
  packages = f"torch{', compressed-tensors' if choice.quantize else ''} and transformers"
  missing = f"its logits were not compared, which needs {packages}"
  sentences = [missing] if transformers else []
  if compares:
    samples = [loader.join([heldout[i]], settings.vocab) for i in range(min(SAMPLES, len(heldout)))]
    published = initial.published_of(trained.folder)
    ids = published_layout.read_ids(published) if published else None
    compared = huggingface.compare_logits(folder, written, settings.model, samples, ids)
    numbers = {"logits": compared, "compared": True}
    sentences = [
      f"logits differ by at most {compared['max_difference']:.1e} "
      f"(the largest is {compared['max_logit']:.1f}) on {compared['tokens']} held-out tokens"
    ]
  if rounds and len(heldout):
    before, after = (_heldout_bits(settings, heldout, tree) for tree in (params, written))
    numbers["heldout_bits"] = {"before": before, "after": after}
    effect = [f"{before[m]:.4f} -> {after[m]:.4f} bits per {UNITS[m]}" for m in before]
    sentences.append(
      f"{choice.quantize or choice.dtype}: {', '.join(effect)} of held-out documents"
    )
  return numbers, sentences


def _heldout_bits(
  settings: Settings, heldout: store.DocumentStore, params: dict
) -> dict[str, float]:
  """Measures the bits per image code and per text token of held-out documents, without neighbors.

  The bits are means over all codes or tokens.
  """
  config = settings.evaluation
  documents = [heldout[i] for i in range(min(config.num_documents, len(heldout)))]
  samples = [loader.join([document], settings.vocab) for document in documents]
  scored = bits.score_samples(params, settings.model, samples, settings.vocab, config.batch_size)
  masks = [bits.own_targets(s, d, settings.vocab) for s, d in zip(samples, documents)]
  result = {
    name: np.concatenate([row[mask[name]] for row, mask in zip(scored, masks)])
    for name in bits.MODALITIES
  }
  return {name: float(values.mean()) for name, values in result.items() if len(values)}


if __name__ == "__main__":
  common.run(main, Flags, config=None)
