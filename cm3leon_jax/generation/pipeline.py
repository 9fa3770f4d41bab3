"""Makes samples for tasks: reads images, retrieves, generates, decodes, computes CLIP scores."""

# I tokens per image, G generated tokens, H height, W width.

from collections.abc import Callable, Sequence
import copy
import dataclasses
import functools
import os
from typing import Any, Self

from etils import epath
import jax
import numpy as np

from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP, clip_score
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.documents.store import Bank, Document, first_documents
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.result import Result
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.generation.explanation import explain
from cm3leon_jax.generation.given_images import given_key, image_key, load_image
from cm3leon_jax.generation.sample import Sample, ranked
from cm3leon_jax.generation.tasks import GivenImage, PromptLayout, Task, has_image
from cm3leon_jax.generation.text_tasks import Caption
from cm3leon_jax.retrieval import removed
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.run.run import Run
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer


def open_bank(layout: PromptLayout, bank: epath.PathLike) -> Bank:
  """Opens the bank of a workdir."""
  return Bank(epath.Path(bank) / "documents", layout.vocab)


def check_tasks(
  layout: PromptLayout, tasks: Sequence[Task], bank: epath.PathLike | Bank | None
) -> dict:
  """Checks tasks before any compilation, and loads their images.

  `bank` is the bank to retrieve from, the workdir of the bank, or None. Returns a dict from the
  `given_key` of each input image to its pixels, uint8 [H, W, 3].

  Raises:
    UserError: a field is wrong, a prompt is too long, an image is unreadable, or the bank is empty.
  """
  given: dict[tuple, np.ndarray] = {}
  for task in tasks:
    task.validate()
    task.to_request(layout)
    if has_image(task) and given_key(task) not in given:
      try:
        given[given_key(task)] = load_image(task.image, layout.resolution, task.crop)
      except UserError as error:
        raise task.error(error) from error
  first = next((task for task in tasks if task.retrieve), None)
  if first is not None:
    if bank is None:
      raise first.error(f"retrieve is {first.retrieve}, but there is no bank: set it to 0.")
    if not len(store := bank if isinstance(bank, Bank) else open_bank(layout, bank)):
      raise first.error(
        f"retrieve is {first.retrieve}, but {store.folder} has no documents: set retrieve to 0."
      )
  return given


class Pipeline:
  """Generates samples for tasks. Loads each model once, compiles each program once per shape."""

  def __init__(
    self,
    params: dict,
    settings: Settings,
    layout: PromptLayout,
    image_tokenizer: ImageTokenizer,
    clip: CLIP | HFCLIP | None = None,
    bank: epath.PathLike | None = None,
    **options: Any,
  ):
    """Prepares the decoder. This call and all later calls need a current mesh.

    Args:
      clip: scores samples and embeds queries. If None, samples have no scores, and documents cannot
        be retrieved.
      bank: workdir whose documents can be retrieved, or None.
      **options: fields of GeneratorConfig.
    """
    self.settings, self.layout, self.bank = settings, layout, bank
    self.image_tokenizer = image_tokenizer
    self.generator = Generator(params, GeneratorConfig.of(settings, **options))
    # A larger batch of CLIP would need more padding, and a different size another compilation.
    size = self.generator.config.batch_size
    self.clip = clip and clip.in_batches(size)
    self._tokenizer = image_tokenizer.in_batches(size)

  @classmethod
  def load(
    cls,
    run: Run,
    params: dict,
    clip: CLIP | HFCLIP | None = None,
    bank: epath.PathLike | None = None,
    **options: Any,
  ) -> Self:
    """Makes the pipeline of a run. The bank is the run's documents unless `bank` is given."""
    bank = run.bank if bank is None else bank
    return cls(params, run.settings, PromptLayout.of(run), run.images, clip, bank, **options)

  @classmethod
  def open(cls, run: Run, clip: str | os.PathLike[str] | None, **options: Any) -> tuple[Self, int]:
    """Makes the pipeline of a run or export with its parameters. Also returns their step.

    `clip` is the folder of a Hugging Face CLIP model, for a run or export without its own.
    """
    GeneratorConfig.of(run.settings, **options)  # Raises errors before parameters are loaded.
    if clip is not None and run.has_clip and not run.settings.retrieval.clip:
      raise UserError(f"clip is given, but {run.folder} contains a CLIP: omit clip.")
    params, step = run.params(dtype=run.settings.model.dtype)
    chosen = HFCLIP.load(clip) if clip is not None else run.clip if run.has_clip else None
    return cls.load(run, params, chosen, **options), step

  def with_params(self, params: dict) -> "Pipeline":
    """Returns a pipeline with other parameters, which shares the tokenizers, CLIP and the bank."""
    if self.bank is not None:  # Opened once, so that the copies share them.
      _ = self.retriever, self.documents
    other = copy.copy(self)
    other.generator = Generator(params, self.generator.config)
    return other

  def without(self, documents: Sequence[str]) -> "Pipeline":
    """Returns a pipeline that never retrieves documents with these keys, see `removed.rows`."""
    other, gone = copy.copy(self), removed.rows(epath.Path(self.bank) / "neighbors", documents)
    other.retriever = copy.copy(self.retriever)
    other.retriever.removed = gone
    return other

  @functools.cached_property
  def retriever(self) -> Retriever:
    """Searches the bank."""
    folder, size = epath.Path(self.bank) / "neighbors", self.generator.config.batch_size
    return Retriever(folder, self.settings.retrieval, query_batch=size)

  @property
  def usual_retrieve(self) -> int:
    """Maximum number of retrieved documents in a training sample; 0 without a bank."""
    return 0 if self.bank is None else self.settings.data.num_neighbors

  @functools.cached_property
  def documents(self) -> Bank:
    """Documents of the bank."""
    return open_bank(self.layout, self.bank)

  def check(self, tasks: Sequence[Task]) -> dict:
    """Calls `check_tasks` with the layout and the bank of this pipeline."""
    opened = self.bank is not None and any(task.retrieve for task in tasks)
    return check_tasks(self.layout, tasks, self.documents if opened else self.bank)

  def _check_samples(self, tasks: Sequence[Task], num_samples: int, rank: bool) -> None:
    if not hasattr(num_samples, "__index__") or num_samples < 1 + bool(rank):
      raise UserError(
        f"num_samples is {num_samples!r}; it must be at least 1, or 2 with rank, which sorts them."
      )
    for task in tasks if rank else ():
      if self.clip is None or not task.is_scored:
        raise task.error(f"rank is given, but CLIP does not score task {task.name} here.")

  def generate(
    self,
    tasks: Sequence[Task],
    num_samples: int = 1,
    rank: bool = False,
    given: dict | None = None,
    on_batch: Callable[[list[Sample]], None] | None = None,
    show_progress: bool = False,
  ) -> list[list[Sample]]:
    """Generates `num_samples` samples for each task.

    Args:
      tasks: tasks of any kind. Tasks of the same kind with equal settings share batches.
      num_samples: number of samples per task. The samples of a task share one prefill.
      rank: whether to sort the samples of a task by CLIP score, best first.
      given: result of `check_tasks`. If None, `check_tasks` is called.
      on_batch: function that is called with the samples of each batch before the next batch starts.

    Raises:
      UserError: `check_tasks` rejects a task, no document is found for it, CLIP cannot rank it, or
        `num_samples` is too small.
    """
    self._check_samples(tasks, num_samples, rank)
    given = self.check(tasks) if given is None else given
    neighbors = self.retrieve(tasks)
    requests = self.requests(tasks, given, neighbors)
    alike: dict[tuple, list[int]] = {}  # Tasks whose samples can share a batch, by kind.
    for i, task in enumerate(tasks):
      kind = (task.name, task.retrieve, task.sampling, len(requests[i].streams))
      alike.setdefault(kind, []).append(i)
    samples: dict[tuple[int, int], Sample] = {}
    steps: list[int] = []
    total = num_samples * len(tasks)

    def show_steps(more: int) -> None:
      steps.append(more)
      bar.set_postfix(steps=sum(steps))  # Of this batch.

    with progress_bar(
      total=total, desc="generate", unit="sample", disable=not show_progress
    ) as bar:
      for members in alike.values():
        for batch in self.generator.batches(
          [requests[i] for i in members],
          [tasks[i].seed for i in members],
          num_samples,
          tasks[members[0]].sampling,
          show_steps,
        ):
          places = [members[result.request] for result in batch]
          made = self.samples(places, batch, tasks, requests, given, neighbors)
          samples |= {(i, sample.index): sample for i, sample in zip(places, made)}
          if on_batch is not None:
            on_batch(made)
          bar.update(len(batch))
          steps.clear()
    by_task = [[samples[i, n] for n in range(num_samples)] for i in range(len(tasks))]
    return [ranked(of_task) for of_task in by_task] if rank else by_task

  def retrieve(self, tasks: Sequence[Task]) -> list[tuple[Document, ...]]:
    """Retrieves neighbors for the `query` of each task. Needs a CLIP model.

    Raises:
      UserError: `retrieval.max_similarity` excludes all documents for a task, and
        `retrieval.min_similarity` is not set. If it is set, a task may have no neighbors.
    """
    result = [task.neighbors or () for task in tasks]
    queries: dict[tuple, tuple[GivenImage, list[int]]] = {}
    for i, task in enumerate(tasks):
      if task.retrieve and task.neighbors is None:
        kind, value = task.query()
        queries.setdefault((kind, image_key(value)), (value, []))[1].append(i)
    if not queries:
      return result
    most = max(tasks[i].retrieve for _, members in queries.values() for i in members)
    nearest = self.search([(kind, value) for (kind, _), (value, _) in queries.items()], most)
    for (_, members), (documents, _) in zip(queries.values(), nearest):
      for i in members:
        result[i] = documents[: tasks[i].retrieve]
        if not result[i] and self.settings.retrieval.min_similarity == -1:
          limit = self.settings.retrieval.max_similarity
          raise tasks[i].error(
            f"no document was found for '{tasks[i].label}': all documents are more similar to it "
            f"than config.retrieval.max_similarity = {limit}: set retrieve to 0."
          )
    return result

  def search(
    self, queries: Sequence[tuple[str, object]], count: int
  ) -> list[tuple[tuple[Document, ...], np.ndarray]]:
    """Finds the documents of the bank that are most similar to each query. Needs a CLIP model.

    A query is ("text", text) or ("image", image). Returns, for each query, (documents, their cosine
    similarities to the query), best first. A document is skipped if its similarity to the query is
    below `retrieval.min_similarity`, or if its similarity to the query or to a better document is
    above `retrieval.max_similarity`.

    Raises:
      UserError: there is no bank, or `count` is not in [1, `retrieval.max_candidates`].
    """
    if self.bank is None:
      raise UserError("this model has no bank, so no documents can be retrieved.")
    most = self.settings.retrieval.max_candidates
    if not 1 <= count <= most:
      raise UserError(
        f"{count} documents are requested; at least 1 and at most config.retrieval.max_candidates "
        f"= {most} can be retrieved."
      )
    if (embedded := len(self.retriever.bank)) != (held := len(self.documents)):
      raise UserError(
        f"{self.bank} has embeddings of {embedded} documents in neighbors/, but {held} documents "
        "in documents/: run `cm3leon build_neighbors` again for that folder."
      )
    ids, scores = self.retriever.retrieve(self._embed(queries), count)
    return [
      (first_documents(self.documents, row, count), similar[row >= 0])
      for row, similar in zip(ids, scores)
    ]

  def _embed(self, queries: Sequence[tuple[str, object]]) -> np.ndarray:
    """Embeds n queries (see `search`). Returns [n, E]."""
    values: dict[str, list[Any]] = {"image": [], "text": []}
    for kind, value in queries:
      values[kind].append(value)
    embedded, lexical, clip = {}, self.retriever.lexical, self.clip
    if clip is None:
      raise UserError(
        f"{self.bank} is searched by CLIP, which is not given: name the CLIP that built this bank, "
        "--config.retrieval.clip=FOLDER."
      )
    if images := [load_image(image, clip.resolution) for image in values["image"]]:
      embedded["image"] = iter(lexical.join(clip.embed_images(np.stack(images))))
    assert clip.encode is not None
    if texts := [clip.encode(text) for text in values["text"]]:
      embedded["text"] = iter(lexical.join(clip.embed_texts(texts), values["text"]))
    return np.stack([next(embedded[kind]) for kind, _ in queries])

  def requests(
    self, tasks: Sequence[Task], given: dict, neighbors: Sequence[Sequence[Document]]
  ) -> list[Request]:
    """Makes the request of each task.

    `given` is the result of `check_tasks`. `neighbors` contains the neighbors of each task, best
    first.
    """
    codes = self.codes(given)
    return [
      task.to_request(self.layout, codes.get(given_key(task)), result)
      for task, result in zip(tasks, neighbors)
    ]

  def codes(self, given: dict) -> dict:
    """Encodes the input images. Returns a dict from their `given_key`s to codes, int32 [I]."""
    return dict(zip(given, self._tokenizer.encode(np.stack(list(given.values()))))) if given else {}

  def samples(
    self,
    places: Sequence[int],
    batch: Sequence[Result],
    tasks: Sequence[Task],
    requests: Sequence[Request],
    given: dict,
    neighbors: Sequence[tuple[Document, ...]],
  ) -> list[Sample]:
    """Makes samples from generated ids: decodes images and texts, and computes CLIP scores.

    `places` contains, for each result, the index of its task. `given` is the result of
    `check_tasks`.
    """
    answers = [
      tasks[i].from_ids(self.layout, requests[i], result.tokens) for i, result in zip(places, batch)
    ]
    codes = [s for segments, _ in answers for s in segments if not isinstance(s, str)]
    images = iter(self._tokenizer.decode(np.stack(codes)) if codes else ())
    parts = self.generator, self.layout, self._tokenizer, jax.sharding.get_mesh()
    samples = [
      Sample(
        task=tasks[i],
        index=result.sample,
        seed=result.seed,
        segments=tuple(s if isinstance(s, str) else next(images) for s in segments),
        codes=tuple(s for s in segments if not isinstance(s, str)),
        filled=filled,
        tokens=result.tokens,
        log_probs=result.log_probs,
        contrastive=result.contrastive,
        neighbors=neighbors[i],
        given=given.get(given_key(tasks[i]), tasks[i].original),
        divergence=result.divergence,
        explainer=functools.partial(explain, *parts),
      )
      for i, result, (segments, filled) in zip(places, batch, answers)
    ]
    pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    clip = self.clip
    for i, sample in enumerate(samples):
      if clip is not None and sample.task.is_scored:
        assert clip.encode is not None
        # The score of a caption uses the input image; that of a generated image uses the prompt.
        image, text = sample.segments[0], sample.task.prompt
        if isinstance(sample.task, Caption):
          image, text = sample.given, sample.segments[0]
        if len(ids := clip.encode(text)):
          pairs[i] = (image, ids)
    if clip is not None and pairs:
      shown, texts = zip(*pairs.values())
      for i, score in zip(pairs, clip_score(clip, np.stack(shown), list(texts))):
        samples[i] = dataclasses.replace(samples[i], clip_score=float(score))
    return samples
