"""Copies the tokenizers and CLIP of a trained run or bundle into the workdir of a tuning run."""

from etils import epath

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import describe
from cm3leon_jax.files.json_files import plain, write_json
from cm3leon_jax.run import bundles
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import from_data, stages, table
from cm3leon_jax.tokenizers import vqgan


def copy_tokenizers(
  run: Run, source: str, of_parent: dict | None = None, own_images: bool = False
) -> dict[str, str]:
  """Copies the folders of the tokenizers and CLIP, and marks their stages as finished.

  The folders are copied to the workdir of `run`. Folders that already contain the same files are
  not changed. `source` is the workdir of a run, or a bundle, see `Source`. `of_parent`,
  the result of `from_data.parent_fields`, is stored for the later stages. For `own_images`, see
  `table.copies_images`.

  Returns:
    For each stage, "copied" or "there already".

  Raises:
    UserError: `source` lacks a file or has another config, or a folder of `run` has other content.
      Nothing is copied in these cases.
  """
  settings, workdir = run.settings, run.folder
  trained, folder = bundles.read_parent(source)
  copied = table.copies_images(settings, own_images)
  if not copied and not own_images and trained.vqgan.source != settings.vqgan.source:
    raise UserError(
      f"--init_from is {source}, whose image tokenizer is not config.vqgan.source = "
      f"{settings.vqgan.source}: start from another base, or add --config.vqgan.source= to copy "
      "the tokenizer of this one."
    )
  left_out = {"clip": not table.own_clip(settings), "vqgan": not copied}
  names = [name for name in bundles.FILES if not left_out.get(name)]
  files = {name: _describe(source, folder, name) for name in names}
  digests = {name: stages.id_of(files[name]) for name in names}
  configs = {name: _config(settings, folder, name) for name in names}
  for name in names:
    ours, theirs = plain(configs[name]), plain(_config(trained, folder, name))
    # The seeds of the two runs may differ.
    if changed := stages.differences({**theirs, "seed": 0}, {**ours, "seed": 0}):
      raise UserError(
        f"--init_from is {source}, whose {name} has another config ({'; '.join(changed[:4])}): set "
        "these fields to the same values."
      )
    if (workdir / name / stages.DONE).exists():
      there = stages.require(workdir, name)["id"]
      if there != digests[name]:
        raise UserError(
          f"{workdir / name} was not copied from --init_from={source}: use another --workdir."
        )
  result = {}
  for name in names:
    done = workdir / name / stages.DONE
    result[name] = "there already" if done.exists() else "copied"
    if done.exists():
      continue
    (workdir / name).mkdir(parents=True, exist_ok=True)
    for file in bundles.FILES[name]:
      (workdir / name / file).write_bytes((folder / name / file).read_bytes())
    config = {"command": "copy_tokenizers", **configs[name]}
    config["inputs"] = {"init_from": digests[name]}
    summary = {"copied_from": source, **({from_data.OF_PARENT: of_parent} if of_parent else {})}
    about = {"config": config, "summary": summary, "seconds": 0.0}
    write_json(done, {**about, "id": digests[name], "files": files[name]})
  return result


def _config(settings: Settings, source: epath.Path, name: str) -> dict:
  """Returns the config fields of a stage that must have the same values in `source`."""
  config = table.identity(settings, name)
  if name == "vqgan" and vqgan.is_published(source / name):
    config["vqgan"] = {side: config["vqgan"][side] for side in ("resolution", "downsample")}
  return config


def _describe(source: str, folder: epath.Path, name: str) -> dict[str, dict]:
  """Returns size and digest of a stage's files. Raises UserError if one is absent or damaged."""
  stages.check_files(folder / name)
  for file in bundles.FILES[name]:
    if not (folder / name / file).exists():
      other = "name a published CLIP by --config.retrieval.clip=FOLDER, or " * (name == "clip")
      raise UserError(
        f"--init_from is {source}, which has no {name}/{file}: {other}give the workdir of a run, "
        "or a bundle that `cm3leon export --bundle` wrote."
      )
  return {file: describe(folder / name / file) for file in bundles.FILES[name]}
