"""Draws pictures and writes texts: for captions that were held out of training, or for prompts and pictures of yours.

  python -m launch.generate --config=ml_configs/openmoji.py --workdir=workdir
  python -m launch.generate --config=ml_configs/openmoji.py --workdir=workdir --prompt="red apple" --guidance=3 --retrieve=2
  python -m launch.generate --config=ml_configs/openmoji.py --workdir=workdir --task=caption --image=apple.png
  python -m launch.generate --config=ml_configs/openmoji.py --workdir=workdir --prompts=my.jsonl --samples=8 --rank

Held-out captions go to samples/, what is yours to prompts/NAME/: a PNG file a picture, contact_sheet.png, results.jsonl.
docs/generating.md shows every task.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import json
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from cm3leon_jax import stages
from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError

if TYPE_CHECKING:
  from cm3leon_jax.decoding.asks import Ask

TASKS = (
  "text_to_image",
  "caption",
  "question",
  "infill_text",
  "infill_image",
  "edit",
  "interleaved",
  "unconditional",
)
DTYPES = ("compute", "int8")  # Of decoding/weights.py and decoding/cache.py.
_TASK = flags.DEFINE_string(
  "task", "text_to_image", f"What to do with a prompt or an image: {', '.join(TASKS)}."
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text; may be given several times.")
_IMAGE = flags.DEFINE_multi_string(
  "image", [], "File of a picture: one for each --prompt, or one for all."
)
_BOX = flags.DEFINE_list(
  "box", None, "Of infill_image: left,top,right,bottom in pixels of the model's resolution."
)
_LENGTH = flags.DEFINE_integer(
  "length", 0, "Most tokens of a text that is written (default: 64), or of an interleaved document."
)
_PROMPTS = flags.DEFINE_string(
  "prompts", None, "A file with one prompt a line, as JSON: see docs/generating.md."
)
_CAPTIONS = flags.DEFINE_integer(
  "captions", 16, "Held-out captions to draw, if nothing else is asked for.", lower_bound=1
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Samples of each prompt.", lower_bound=1)
_RANK = flags.DEFINE_bool(
  "rank", False, "Order the samples of each prompt by CLIP score, best first."
)
_GUIDANCE = flags.DEFINE_list(
  "guidance", None, "Weights of guidance, e.g. 1,3,5 (default: 1,3,5; with --prompt the config's)."
)
_RETRIEVE = flags.DEFINE_list(
  "retrieve", None, "Numbers of retrieved documents, e.g. 0,2 (default: 0,2; with --prompt 2)."
)
_KEEP = flags.DEFINE_bool(
  "keep_neighbors", False, "The unconditional stream of guidance keeps the retrieved documents."
)
_BANK = flags.DEFINE_string(
  "bank", None, "Another workdir of the same tokenizers and CLIP, to retrieve from for a --prompt."
)
_SEED = flags.DEFINE_integer(
  "seed", None, "Seed of the first prompt; each next one adds 1.", 0, 2**31
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Samples that are drawn at once.", lower_bound=1
)
_WEIGHT_DTYPE = flags.DEFINE_enum(
  "weight_dtype", "compute", DTYPES, "Dtype of the model's matrices."
)
_DRAFT_WINDOW = flags.DEFINE_integer(
  "draft_window", 0, "Codes of a picture that are drafted and verified at once; 0: none.", 0
)
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", "compute", DTYPES, "Dtype of keys and values.")

MOST_TEXTS = 16  # That are printed; all are in results.jsonl.


def _numbers(flag, default: list, kind, least) -> list:
  """Values of a list flag, each once. Raises UserError naming the flag."""
  try:
    values = default if flag.value is None else [kind(v) for v in flag.value]
  except ValueError as error:
    raise UserError(
      f"--{flag.name} is '{','.join(flag.value)}'; it must be numbers, like {default[0]} or 1,3."
    ) from error
  if not values or any(not least <= v < float("inf") for v in values):
    raise UserError(
      f"--{flag.name} is {values}; each must be a finite number of at least {least}, and there must be one."
    )
  return list(dict.fromkeys(values))


def _box() -> tuple[int, ...]:
  try:
    return tuple(int(x) for x in _BOX.value or ())
  except ValueError as error:
    raise UserError(
      f"--box is '{','.join(_BOX.value)}'; it must be four whole numbers: left,top,right,bottom."
    ) from error


def _columns(settings, heldout: bool) -> list[tuple]:
  """Each number of retrieved documents with the sampler's settings for each guidance."""
  from cm3leon_jax.decoding import asks as asks_lib

  guidances = _numbers(
    _GUIDANCE, [1.0, 3.0, 5.0] if heldout else [settings.sampling.guidance], float, 0
  )
  retrieves = _numbers(
    _RETRIEVE, [0, 2] if heldout else [asks_lib.default_retrieve(_TASK.value)], int, 0
  )
  with_guidance = lambda g: dataclasses.replace(settings.sampling, guidance=g)
  return [(retrieve, with_guidance(g)) for retrieve, g in itertools.product(retrieves, guidances)]


def _asks(settings, seed: int) -> list[Ask]:
  """What the user asks for; nothing: held-out captions. Raises UserError about flags that do not go together."""
  from cm3leon_jax.decoding import asks as asks_lib
  from cm3leon_jax.decoding.asks import Ask

  own = {"prompt": _PROMPT.value, "image": _IMAGE.value, "box": _BOX.value, "length": _LENGTH.value}
  task, given = _TASK.value, [name for name, value in own.items() if value]
  if _PROMPTS.value is None and not given and task == "text_to_image":
    return []
  columns = _columns(settings, heldout=False)
  (retrieve, sampling), *others = columns
  if others and (_PROMPTS.value is not None or task != "text_to_image"):
    raise UserError(
      "--guidance or --retrieve has several values: only a --prompt to draw, and held-out captions, take them."
    )
  defaults = Ask(
    task, box=_box(), length=_LENGTH.value, seed=seed, keep_neighbors=_KEEP.value, sampling=sampling
  )
  if _PROMPTS.value is not None:
    if set(given) - {"length"}:
      raise UserError(
        f"--prompts and --{given[0]} are given: put what you ask for into the file, or on the command line."
      )
    return asks_lib.read(_PROMPTS.value, defaults, retrieve if _RETRIEVE.value else None)
  if _GUIDANCE.value is not None and task in asks_lib.TASKS and not asks_lib.TASKS[task].guidance:
    raise UserError(
      f"--guidance is given, which task {task} does not use: the fields of config.sampling say how it is drawn."
    )
  asks = asks_lib.pair(defaults, _PROMPT.value, _IMAGE.value)
  return [
    dataclasses.replace(ask, retrieve=n, sampling=sampling)
    for n, sampling in columns
    for ask in asks
  ]


def _check_rank(asks: Sequence[Ask]) -> None:
  from cm3leon_jax.decoding import jobs

  if not _RANK.value:
    return
  if _SAMPLES.value == 1:
    raise UserError(
      "--rank orders the samples of a prompt, and there is one: give --samples=8, say."
    )
  for ask in asks:
    if not jobs.is_scored(ask):
      raise ask.error(
        f"--rank is given, and CLIP cannot score task {ask.task} without a caption: leave it out."
      )


def _bank(settings, workdir: epath.Path, heldout: bool) -> epath.Path:
  """The workdir that is retrieved from. Raises UserError if its codes, ids or embeddings mean something else than the run's."""
  if _BANK.value is None:
    return workdir
  if heldout:
    raise UserError(
      "--bank is given without --prompt; held-out captions have the neighbors that their run found for them."
    )
  bank = epath.Path(_BANK.value)
  documents, neighbors = (
    stages.require(bank, name)["config"] for name in ("documents", "neighbors")
  )
  found = {"clip": neighbors["retrieval"]["clip"], **documents["inputs"], **neighbors["inputs"]}
  read = (*stages.TOKENIZERS, *stages.own_clip(settings))
  expected = {"clip": settings.retrieval.clip, **stages.ids(settings, workdir, read)}
  for name, value in expected.items():
    if found[name] != value:
      raise UserError(
        f"--bank {bank} was made with another {name} than {workdir}: copy its folder there and make it anew."
      )
  return bank


def _needs_clip(asks: Sequence[Ask]) -> bool:
  from cm3leon_jax.decoding import jobs

  return not asks or any(ask.retrieve or jobs.is_scored(ask) for ask in asks)


def _config(
  settings, workdir: epath.Path, bank: epath.Path, asks: Sequence[Ask], seed: int
) -> dict:
  """What the samples depend on, the ids of the stages that are read included. Raises UserError if one is not finished."""
  retrieves = not asks or any(ask.retrieve for ask in asks)
  read = [*stages.TOKENIZERS, "train", *(["documents"] if retrieves else [])]
  read += stages.own_clip(settings) if _needs_clip(asks) else ()
  inputs = stages.ids(settings, workdir, read)
  inputs |= stages.ids(settings, bank, ["neighbors"]) if retrieves else {}
  same = ("samples", "rank", "keep_neighbors", "weight_dtype", "cache_dtype", "draft_window")
  config = {
    "inputs": inputs,
    **stages.identity(settings, "samples"),
    **{n: flags.FLAGS[n].value for n in same},
  }
  if asks:
    return {**config, "asks": [dataclasses.asdict(ask) for ask in asks]}
  columns = _columns(settings, heldout=True)
  values = {
    "guidance": [sampling.guidance for _, sampling in columns],
    "retrieve": [retrieve for retrieve, _ in columns],
  }
  values = {name: list(dict.fromkeys(numbers)) for name, numbers in values.items()}
  return {
    **config,
    "sampling": dataclasses.asdict(settings.sampling),
    "captions": _CAPTIONS.value,
    "seed": seed,
    **values,
  }


def _folder(workdir: epath.Path, asks: Sequence[Ask], config: dict) -> epath.Path:
  """Every set of prompts and settings has a folder of its own, so that a user may try another at any time."""
  from cm3leon_jax.decoding import draw

  if not asks:
    return workdir / "samples"
  name = epath.Path(_PROMPTS.value).stem if _PROMPTS.value else asks[0].prompt or asks[0].task
  return (
    workdir
    / "prompts"
    / f"{draw.slug(name)}-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:6]}"
  )


def _tell(records: Sequence[dict], scores: Sequence[dict]) -> None:
  for record in [r for r in records if r.get("text")][:MOST_TEXTS]:
    text = "".join(
      c if c.isprintable() else " " for c in record["text"]
    )  # A model may write what a terminal would obey.
    print(f"{record['prompt'] or record['image'] or record['task']}: {' '.join(text.split())}")
  for row in scores:
    samples = "1 sample" if row["samples"] == 1 else f"{row['samples']} samples"
    interval = "no interval" if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"
    print(
      f"guidance {row['guidance']:g}, {row['retrieve']} retrieved: CLIP score {row['mean']:.3f} "
      f"{interval}, {samples} of {describe_groups(row)}."
    )


def _add_concepts(records: Sequence[dict], heldout: DocumentStore) -> None:
  """Adds to each record the `concept` of its held-out document, over which intervals are taken."""
  documents = (heldout[i] for i in range(len(heldout)))
  concepts = {document.key: document.concept for document in documents}
  for record in records:
    record["concept"] = concepts[record["key"]]


def main(settings, workdir) -> None:
  from cm3leon_jax.decoding import asks as asks_lib
  from cm3leon_jax.decoding import draw, jobs
  from cm3leon_jax.reports.summary import clip_scores
  from cm3leon_jax.retrieval.bank import load_clip
  from cm3leon_jax.training import checkpoint

  seed = settings.seed if _SEED.value is None else _SEED.value
  if _DRAFT_WINDOW.value == 1:
    raise UserError(
      "--draft_window is 1; it must be 0, or at least 2: one code is what a step draws without drafts."
    )
  asks = _asks(settings, seed)
  for ask in asks:
    asks_lib.check(ask)
  _check_rank(asks)
  bank = _bank(settings, workdir, heldout=not asks)
  config = _config(settings, workdir, bank, asks, seed)
  form = draw.open_format(settings, workdir)
  given = jobs.check_asks(form, asks, bank)
  if given:
    config["images"] = {
      image: hashlib.sha256(pixels.tobytes()).hexdigest() for image, pixels in given.items()
    }
  folder = _folder(workdir, asks, config)
  with stages.once(folder, config) as summary, common.use_mesh(settings):
    if summary is not None:
      clip = (
        load_clip(settings.retrieval.clip, workdir, settings.vocab) if _needs_clip(asks) else None
      )
      if asks:
        todo = jobs.make_jobs(settings, form, workdir, asks, given, clip, bank)
      else:
        columns = _columns(settings, heldout=True)
        todo = jobs.heldout_jobs(form, workdir, _CAPTIONS.value, seed, columns, _KEEP.value)
      params, step = checkpoint.load_params(workdir / "train", settings.model)
      names = ("batch_size", "weight_dtype", "cache_dtype", "draft_window")
      generator = {name: flags.FLAGS[name].value for name in names}
      records = draw.draw_all(
        settings,
        form,
        workdir,
        folder,
        params,
        todo,
        clip,
        _SAMPLES.value,
        _RANK.value,
        **generator,
      )
      if not asks:
        _add_concepts(
          records, DocumentStore(workdir / "documents" / "heldout_pairs", settings.vocab)
        )
      with stages.replacing(folder / "results.jsonl", "w") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
      scores = clip_scores([record for record in records if record["task"] == "text_to_image"])
      summary.update(step=step, samples=len(records), clip_score=scores)
      _tell(records, scores)
  print(f"generate: all in {folder}, side by side in {folder / 'contact_sheet.png'}.", flush=True)


if __name__ == "__main__":
  common.run(main)
