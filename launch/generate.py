"""Draws pictures: for captions that were held out of training, or for a prompt of yours.

  python -m launch.generate --config=ml_configs/openmoji.py --workdir=workdir
  python -m launch.generate --config=ml_configs/openmoji.py --workdir=workdir --prompt="red apple" --guidance=3 --retrieve=2

Held-out captions go to samples/, prompts of yours to prompts/NAME/: a PNG file each, contact_sheet.png, results.jsonl.
"""

import dataclasses
import hashlib
import json

from absl import flags
from etils import epath

from cm3leon_jax import stages
from cm3leon_jax.config import UserError
from cm3leon_jax.decoding import draw
from cm3leon_jax.evaluation.summary import clip_scores
from cm3leon_jax.retrieval.bank import load_clip
from cm3leon_jax.training import checkpoint
from launch import common

_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to draw; may be given several times.")
_CAPTIONS = flags.DEFINE_integer("captions", 16, "Held-out captions to draw, if there is no --prompt.", lower_bound=1)
_GUIDANCE = flags.DEFINE_list("guidance", None, "Weights of guidance, e.g. 1,3,5 (default: 1,3,5; with --prompt the config's).")
_RETRIEVE = flags.DEFINE_list("retrieve", None, "Numbers of retrieved documents, e.g. 0,2 (default: 0,2; with --prompt 2).")
_BANK = flags.DEFINE_string("bank", None, "Another workdir of the same tokenizers and CLIP, to retrieve from for a --prompt.")
_SEED = flags.DEFINE_integer("seed", None, "Seed of the first prompt; each next one adds 1.", 0, 2**31)

STAGES = {
  "text_tokenizer": "train_text_tokenizer",
  "vqgan": "train_vqgan",
  "documents": "encode_documents",
  "neighbors": "build_neighbors",
}


def _numbers(flag, default: list, kind, least) -> list:
  """Values of a list flag, each once. Raises UserError naming the flag."""
  try:
    values = default if flag.value is None else [kind(v) for v in flag.value]
  except ValueError as error:
    raise UserError(f"--{flag.name} is '{','.join(flag.value)}'; it must be numbers, like {default[0]} or 1,3.") from error
  if not values or any(not least <= v < float("inf") for v in values):
    raise UserError(f"--{flag.name} is {values}; each must be a finite number of at least {least}, and there must be one.")
  return list(dict.fromkeys(values))


def _bank(settings, workdir: epath.Path) -> epath.Path:
  """The workdir that is retrieved from. Raises UserError if its codes, ids or embeddings mean something else than the run's."""
  if _BANK.value is None:
    return workdir
  if not _PROMPT.value:
    raise UserError("--bank is given without --prompt; held-out captions have the neighbours that their run found for them.")
  bank = epath.Path(_BANK.value)
  documents, neighbors = (stages.require(bank / folder, STAGES[folder])["config"] for folder in ("documents", "neighbors"))
  found = {"clip": neighbors["retrieval"]["clip"], **documents["inputs"], **neighbors["inputs"]}
  expected = {folder: stages.require(workdir / folder, STAGES[folder])["id"] for folder in ("text_tokenizer", "vqgan")}
  expected |= {"clip": settings.retrieval.clip, **common.clip_inputs(settings, workdir)}
  for name, value in expected.items():
    if found[name] != value:
      raise UserError(f"--bank {bank} was made with another {name} than {workdir}: copy its folder there and make it anew.")
  return bank


def main(settings, workdir) -> None:
  texts, seed = _PROMPT.value, settings.seed if _SEED.value is None else _SEED.value
  guidances = _numbers(_GUIDANCE, [settings.sampling.guidance] if texts else [1.0, 3.0, 5.0], float, 0)
  retrieves = _numbers(_RETRIEVE, [2] if texts else [0, 2], int, 0)
  config = {
    "sampling": dataclasses.asdict(settings.sampling),
    "prompts": texts,
    "captions": 0 if texts else _CAPTIONS.value,
    "guidance": guidances,
    "retrieve": retrieves,
    "seed": seed,
    "inputs": {folder: stages.require(workdir / folder, command)["id"] for folder, command in STAGES.items()},
    "retrieval": dataclasses.asdict(settings.retrieval),
  }
  bank = _bank(settings, workdir)
  config["inputs"]["neighbors"] = stages.require(bank / "neighbors", "build_neighbors")["id"]
  config["inputs"] |= {**common.clip_inputs(settings, workdir), "train": common.require_run(settings, workdir)}
  folder = workdir / "samples"
  if texts:  # Every set of prompts and settings has a folder of its own, so that a user may try another at any time.
    folder = workdir / "prompts" / f"{draw.slug(texts[0])}-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:6]}"
  with stages.stage(folder, config) as summary, common.use_mesh(settings):
    if summary is not None:
      clip = load_clip(settings.retrieval.clip, workdir, settings.vocab)
      if texts:
        prompts = draw.free_prompts(settings, workdir, texts, seed, max(retrieves), clip, bank)
      else:
        prompts = draw.heldout_prompts(settings, workdir, _CAPTIONS.value, seed, max(retrieves))
      params, step = checkpoint.load_params(workdir / "train", settings.model)
      records = draw.draw_all(settings, workdir, folder, params, prompts, clip, guidances, retrieves)
      partial = folder / "results.jsonl.partial"
      partial.write_text("".join(json.dumps(r) + "\n" for r in records))
      partial.replace(folder / "results.jsonl")
      summary.update(step=step, samples=len(records), clip_score=clip_scores(records))
      for row in summary["clip_score"]:
        print(
          f"guidance {row['guidance']:g}, {row['retrieve']} retrieved: CLIP score {row['mean']:.3f} "
          f"± {row['standard_error']:.3f} over {row['samples']}."
        )
  print(f"generate: pictures in {folder}, all together in {folder / 'contact_sheet.png'}.", flush=True)


if __name__ == "__main__":
  common.run(main)
