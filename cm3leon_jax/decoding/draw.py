"""From jobs to files: pictures as they come, a record of each sample, one sheet of all."""

from collections.abc import Sequence
import dataclasses
import pathlib
import re

from etils import epath
import numpy as np
from PIL import Image
from tqdm import tqdm

from cm3leon_jax import distributed
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP, clip_score
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.decoding import grammar, pictures
from cm3leon_jax.decoding.generate import Generator, GeneratorConfig, Result
from cm3leon_jax.decoding.jobs import Job, heldout_jobs, is_scored
from cm3leon_jax.decoding.tasks import Answer, Format, read_answer
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

GRID_COLUMNS = 4
SHEET_ROWS = 64  # Of a contact sheet; more would make a picture that few programs open.
ORIGIN = ("key", "source", "license", "attribution")  # What a record says of each neighbor.


def sample_drawer(settings, workdir, folder):
  """The trainer's `draw(params, step)`: writes one grid of held-out captions without neighbors into `folder`, returns it.

  All processes of a run draw the same pictures, for each holds a part of `params`; one writes them.
  """
  workdir = epath.Path(workdir)
  count = min(settings.train.num_samples, len(raw_pairs.read_pairs(workdir / "raw", "heldout")))
  # Captions are given as ids, and no text is written: the trainer needs no text tokenizer.
  jobs = heldout_jobs(Format.of(settings), workdir, count, settings.seed, [(0, settings.sampling)])
  image_tokenizer = ImageTokenizer.load(workdir / "vqgan")
  requests, seeds = [job.request for job in jobs], [job.ask.seed for job in jobs]

  def draw(params, step: int) -> Image.Image:
    results = Generator(params, GeneratorConfig.of(settings)).generate(requests, seeds)
    images = image_tokenizer.decode(np.stack([result.codes(settings.vocab) for result in results]))
    parts = [slice(i, i + GRID_COLUMNS) for i in range(0, count, GRID_COLUMNS)]
    captions = ["; ".join(job.ask.prompt for job in jobs[part]) for part in parts]
    sheet = pictures.contact_sheet([images[part] for part in parts], captions)
    if distributed.is_first():
      pictures.save_png(epath.Path(folder) / f"step_{step:06d}.png", sheet)
    return sheet

  return draw


@dataclasses.dataclass(frozen=True)
class Drawn:
  """One sample: what results.jsonl says of it, and what it looks like: texts and [H, W, 3] uint8."""

  record: dict
  cells: tuple


class _Progress:
  """A bar of tokens; samples that end early count in full when their batch is over."""

  def __init__(self, bar: tqdm, batch_size: int):
    self.bar, self.batch_size, self.left, self.told = bar, batch_size, 0, 0

  def begin(self, samples: int) -> None:
    """That many samples are drawn next, in batches."""
    self.left = samples

  def tell(self, steps: int) -> None:
    self._move(steps * min(self.left, self.batch_size))

  def end(self, samples: int, tokens: int) -> None:
    """A batch is over that would have taken so many tokens."""
    self.left -= samples
    self._move(tokens - self.told)
    self.told = 0

  def _move(self, tokens: int) -> None:
    self.told += tokens
    self.bar.update(tokens)


def draw_all(
  settings,
  form: Format,
  workdir,
  folder,
  params,
  jobs: Sequence[Job],
  clip: CLIP | HFCLIP | None,
  samples: int = 1,
  rank: bool = False,
  **generator,
) -> list[dict]:
  """Draws every job, writes the pictures of each batch before the next is drawn, and a sheet of all.

  Args:
    settings: of the run.
    form: of `Format.of`.
    workdir: of the run.
    folder: gets the files.
    params: of the model. Needs a mesh.
    jobs: of `jobs`.
    clip: scores those that can be; None: nobody does.
    samples: of each job; they share their prefill.
    rank: those of a job are ordered by their CLIP scores, best first; else as they were drawn.
    **generator: fields of GeneratorConfig.

  Returns:
    Records of results.jsonl, by job.
  """
  config = GeneratorConfig.of(settings, **generator)
  core, scribe = (
    Generator(params, config),
    _Scribe(form, workdir, epath.Path(folder), clip, samples, config.batch_size),
  )
  alike = {}  # Jobs whose samples may share a batch.
  for i, job in enumerate(jobs):
    alike.setdefault(
      (job.ask.task, job.ask.retrieve, job.ask.sampling, len(job.request.streams)), []
    ).append(i)
  longest = [grammar.longest(job.request.plan) for job in jobs]
  drawn = {}
  with tqdm(total=samples * sum(longest), desc="generate", unit="token", mininterval=1) as bar:
    progress = _Progress(bar, config.batch_size)
    for members in alike.values():
      part = [jobs[i] for i in members]
      progress.begin(samples * len(part))
      requests, seeds = [job.request for job in part], [job.ask.seed for job in part]
      for batch in core.batches(requests, seeds, samples, part[0].ask.sampling, progress.tell):
        progress.end(len(batch), sum(longest[members[result.request]] for result in batch))
        for result, outcome in zip(
          batch, scribe.write([part[result.request] for result in batch], batch)
        ):
          drawn[members[result.request], result.sample] = outcome
  by_job = [[drawn[i, sample] for sample in range(samples)] for i in range(len(jobs))]
  if rank:
    by_job = [ranked(of_job) for of_job in by_job]
  pictures.save_png(epath.Path(folder) / "contact_sheet.png", sheet(jobs, by_job))
  return [one.record for of_job in by_job for one in of_job]


def ranked(drawn: Sequence[Drawn]) -> list[Drawn]:
  """Samples of a job, the best CLIP score first, and `rank` from 1 on; one without a score comes last."""
  score = lambda one: -np.inf if one.record["clip_score"] is None else one.record["clip_score"]
  order = sorted(drawn, key=score, reverse=True)
  return [
    dataclasses.replace(one, record={**one.record, "rank": n}) for n, one in enumerate(order, 1)
  ]


class _Scribe:
  """Writes the pictures of a batch, and says what results.jsonl is to say of them."""

  def __init__(
    self, form: Format, workdir, folder: epath.Path, clip, samples: int, batch_size: int
  ):
    self.form, self.folder, self.clip, self.samples = form, folder, clip, samples
    self.tokenizer = dataclasses.replace(
      ImageTokenizer.load(epath.Path(workdir) / "vqgan"), batch_size=batch_size
    )

  def write(self, jobs: Sequence[Job], results: Sequence[Result]) -> list[Drawn]:
    answers = [
      read_answer(self.form, job.ask, job.request, result.ids) for job, result in zip(jobs, results)
    ]
    codes = [image for answer in answers for image in answer.images]
    decoded = iter(self.tokenizer.decode(np.stack(codes)) if codes else ())
    cells = [
      tuple(s if isinstance(s, str) else next(decoded) for s in answer.segments)
      for answer in answers
    ]
    scores = self._scores(jobs, cells)
    drawn = []
    for job, result, answer, shown, score in zip(jobs, results, answers, cells, scores):
      files = self._save(job, result, shown)
      drawn.append(Drawn(_record(job, result, answer, files, score), shown))
    return drawn

  def _save(self, job: Job, result: Result, shown: tuple) -> list[str]:
    ask, images = job.ask, [cell for cell in shown if not isinstance(cell, str)]
    name = f"{ask.row:03d}_{slug(ask.prompt or ask.task)}"
    if ask.task == "text_to_image":
      name += f"_guidance{ask.sampling.guidance:g}_retrieve{ask.retrieve}"
    if self.samples > 1:
      name += f"_sample{result.sample}"
    names = [
      f"{name}_image{i}.png" if ask.task == "interleaved" else f"{name}.png"
      for i in range(len(images))
    ]
    for file, image in zip(names, images):
      pictures.save_png(self.folder / file, image)
    return names

  def _scores(self, jobs: Sequence[Job], cells: Sequence[tuple]) -> list[float | None]:
    """CLIP score of each that has one."""
    scores, scored = [None] * len(jobs), {}
    if self.clip is not None:
      for i, job in enumerate(jobs):
        if is_scored(job.ask):
          caption = job.ask.task == "caption"
          ids = self.clip.encode(cells[i][0] if caption else job.ask.prompt)
          if len(ids):
            scored[i] = (job.given if caption else cells[i][0], ids)
    if scored:
      images, texts = zip(*scored.values())
      for i, score in zip(scored, clip_score(self.clip, np.stack(images), list(texts))):
        scores[i] = float(score)
    return scores


def _record(
  job: Job, result: Result, answer: Answer, files: list[str], score: float | None
) -> dict:
  """See docs/data_formats.md."""
  ask = job.ask
  record = {
    "task": ask.task,
    "prompt": ask.prompt,
    "key": job.key,
    "image": ask.image,
    "box": list(ask.box),
    "seed": result.seed,
    "sample": result.sample,
    "rank": None,
    **dataclasses.asdict(ask.sampling),
    "contrastive": result.contrastive,
    "retrieve": ask.retrieve,
    "keep_neighbors": ask.keep_neighbors,
    "neighbors": [{name: getattr(d, name) for name in ORIGIN} for d in job.neighbors],
  }
  if ask.task == "interleaved":
    record |= {
      "files": files,
      "text": "\n".join(s if isinstance(s, str) else "<image>" for s in answer.segments),
    }
  elif files:
    record |= {"file": files[0], "codes": answer.images[0].tolist()}
  else:
    record |= {"text": answer.texts[0], "filled": list(answer.filled)}
  log_probs = [round(float(p), 4) for p in result.log_probs]
  return record | {
    "ids": result.ids.tolist(),
    "log_probs": log_probs,
    "log_prob": float(result.log_probs.sum(dtype=np.float64)),
    "clip_score": score,
  }


def sheet(jobs: Sequence[Job], drawn: Sequence[Sequence[Drawn]]) -> Image.Image:
  """One row a prompt, up to SHEET_ROWS: the picture that is given, or the held-out one, then its samples with every setting."""
  rows, titles, labels = {}, {}, {}
  for job, of_job in zip(jobs, drawn):
    row = job.ask.row
    if row >= SHEET_ROWS:
      continue
    if row not in rows:
      labels[row] = job.ask.prompt or pathlib.PurePath(job.ask.image).name or job.ask.task
      rows[row] = [] if job.given is None else [job.given]
      titles[row] = [] if job.given is None else ["original" if job.key else "given"]
    settings = (
      f"{job.ask.retrieve} docs, guidance {job.ask.sampling.guidance:g}"
      if job.ask.task == "text_to_image"
      else ""
    )
    for n, one in enumerate(of_job, 1):
      rows[row] += one.cells
      titles[row] += [f"{settings} #{n}".strip() if len(of_job) > 1 else settings] * len(one.cells)
  columns = list(titles.values())
  alike = all(column == columns[0] for column in columns)
  return pictures.contact_sheet(
    list(rows.values()), list(labels.values()), columns[0] if alike and any(columns[0]) else ()
  )


def open_format(settings, workdir) -> Format:
  """Of a run. Raises UserError if its text tokenizer is absent."""
  return Format.of(settings, TextTokenizer(epath.Path(workdir) / "text_tokenizer", settings.vocab))


def slug(text: str) -> str:
  return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"
