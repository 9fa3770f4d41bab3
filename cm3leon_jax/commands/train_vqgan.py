"""Trains the image tokenizer, a VQGAN, on the training images.

  cm3leon train_vqgan --config=examples/scenes/config.py --workdir=workdir/scenes

At SIGTERM and Ctrl-C the training saves and stops. The same command continues it. Every second
saved state also writes reconstructions.png, which shows held-out images above their
reconstructions; TensorBoard shows this image, too. With a judge it also prints the share of
held-out images that the judge accepts, both as rendered and as reconstructed. The share for
reconstructed images is an upper bound for what a decoder can be expected to reach. With
config.vqgan.source, a tokenizer of the package is used instead (docs/vqgan.md#pictures) or, in a
run that starts from another run, the tokenizer of that run.
"""

from __future__ import annotations

from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files import digests
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  import numpy as np

  from cm3leon_jax.data.raw import reader
  from cm3leon_jax.evaluation import judged
  from cm3leon_jax.evaluation.metrics import published_weights
  from cm3leon_jax.run import base_documents, initial, run
  from cm3leon_jax.tokenizers import perceptual, published_files, vqgan
  from cm3leon_jax.training.image_models import trainer, vqgan_training
  from cm3leon_jax.training.watch import boards


def _judge(settings: Settings, workdir: epath.Path, tokenizer: vqgan.ImageTokenizer) -> dict:
  """Returns the shares of held-out images and reconstructions that the judge finds correct.

  Returns {} if the config has no judge, or images have no facts.
  """
  facts = [pair.facts for pair in reader.read_pairs(workdir / "raw", "heldout")]
  if not facts or not all(facts) or (judge := judged.judge_of(settings)) is None:
    return {}
  images = reader.open_images(workdir / "raw", "heldout", tokenizer.config.resolution)
  images = images[np.arange(len(images))]
  kinds = {"real": images, "reconstructed": tokenizer.decode(tokenizer.encode(images))}
  wrong = {kind: judged.judge_all(judge, some, facts) for kind, some in kinds.items()}
  return {f"{kind}_images_right": some.count("") / len(some) for kind, some in wrong.items()}


def _check_import(settings: Settings, folder: epath.Path) -> None:
  """Raises UserError if the config names a published tokenizer that is not completely imported."""
  if (folder / stages.DONE).exists():
    return
  if settings.vqgan.published and not vqgan.is_published(folder):
    raise UserError(
      f"config.vqgan.published is {settings.vqgan.published}, but {folder} has no image tokenizer: "
      "run `cm3leon import_vqgan --source=FOLDER` with the same --config and --workdir first "
      "(docs/weights.md)."
    )
  if vqgan.is_published(folder):
    raise UserError(
      f"{folder} has an image tokenizer whose import did not finish: run "
      "`cm3leon import_vqgan` again, or delete that folder to train a tokenizer."
    )


def _features(path: str) -> tuple[dict | None, dict[str, str]]:
  """Reads the network of `vqgan.perceptual`. Returns it, and its digest as a stage input."""
  if not path:
    return None, {}

  tensors = perceptual.without_classifier(published_weights.read_tensors(path))
  shapes = perceptual.tensor_shapes(perceptual.is_calibrated(tensors))
  published_weights.check_shapes(path, tensors, shapes, perceptual.NETWORK)
  return perceptual.make_params(tensors), {"perceptual": published_weights.digest(tensors)}


def _installed(
  settings: Settings, workdir: epath.Path
) -> tuple[vqgan.ImageTokenizer | None, dict[str, str]]:
  """Returns the tokenizer that `vqgan.source` names, of the package or the base, and its digest."""
  name, codes = settings.vqgan.source, settings.vocab.image_size
  if not name:
    return None, {}
  if not (base := base_documents.copied_from(workdir)):
    tokenizer = published_files.read_installed(name, codes, settings.vqgan)
    folder = published_files.installed_folder(name)
  else:
    opened = run.Run.open(base)
    tokenizer = published_files.fit(opened.images, codes, settings.vqgan)
    folder = opened.stages / "vqgan"
  return tokenizer, {initial.IMAGES_DIGEST: str(digests.digest(folder / vqgan.PARAMS))}


def main(settings: Settings, workdir: epath.Path) -> None:
  _check_import(settings, workdir / "vqgan")
  if stages.is_given(workdir, "vqgan"):
    return
  installed, known = _installed(settings, workdir)
  features, inputs = _features("" if installed else settings.vqgan.perceptual)
  stage = stages.stage(workdir, "vqgan", settings, inputs)
  with common.use_mesh(settings), stage as summary:
    if summary is not None:
      images, heldout = (
        reader.open_images(workdir / "raw", split, settings.vqgan.resolution)
        for split in ("train", "heldout")
      )
      summary.update(
        vqgan_training.train_vqgan(
          settings.vqgan,
          settings.vocab.image_size,
          settings.seed,
          images,
          heldout,
          workdir / "vqgan",
          {**stages.inputs(settings, workdir, "vqgan"), **inputs},
          features,
          lambda step: (
            boards.open_tensorboard(workdir / "vqgan", step, None, "train_vqgan")
            if settings.train.tensorboard
            else []
          ),
          installed,
        )
      )
      tokenizer = vqgan.ImageTokenizer.load(workdir / "vqgan")
      summary.update(_judge(settings, workdir, tokenizer))
      print("train_vqgan:", ", ".join(f"{k} {v:.4g}" for k, v in summary.items()))
      summary.update(known)
    elif not settings.vqgan.source:
      trainer.print_other_steps("vqgan", workdir / "vqgan", settings.vqgan.steps)
  trainer.delete_checkpoints(workdir / "vqgan")


if __name__ == "__main__":
  common.run(main, saves=True)
