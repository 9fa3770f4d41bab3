"""Makes tasks from held-out captions, and writes their samples as grids during training."""

from collections.abc import Callable, Sequence
import dataclasses

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax import distributed
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.documents.store import Document, DocumentStore, first_documents
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline, open_bank
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.generation.writer import contact_sheet, save_png
from cm3leon_jax.retrieval.neighbors import load_neighbors
from cm3leon_jax.run.run import Run
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

GRID_COLUMNS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldoutCaption(TextToImage):
  """Generates an image for the caption of a held-out document.

  Attributes:
    document: a caption followed by an image. The prompt contains the token ids of the caption.
    neighbors: stored neighbors of this document, possibly none. The caption alone was their query,
      not the image.
    original: the document's image, decoded from its codes, uint8 [H, W, 3]; None if not decoded.
  """

  document: Document
  neighbors: tuple[Document, ...] = ()
  original: np.ndarray | None = None

  @property
  def key(self) -> str:
    return self.document.key

  @property
  def concept(self) -> str:
    return self.document.concept

  def _caption(self, layout: PromptLayout) -> np.ndarray:
    return self.document.segments[0].tokens


def heldout_tasks(
  layout: PromptLayout,
  workdir: epath.PathLike,
  count: int,
  seed: int,
  columns: Sequence[tuple[int, SamplingConfig]],
  keep_neighbors: bool = False,
  image_tokenizer: ImageTokenizer | None = None,
) -> list[HeldoutCaption]:
  """Returns a task per column for each of `count` evenly spaced held-out captions, or for all.

  Args:
    workdir: workdir of the run. Its document stores and neighbors are read.
    seed: seed of the first caption; caption i has seed + i.
    columns: for each column of the contact sheet, (number of retrieved documents, sampling
      settings).
    keep_neighbors: whether the unconditional stream contains the retrieved documents.
    image_tokenizer: decodes the original images. If None, the tasks have no original images.

  Returns:
    The tasks of all captions for the first column, then those for the second column, etc.
  """
  heldout = DocumentStore(epath.Path(workdir) / "documents" / "heldout_pairs", layout.vocab)
  rows = np.linspace(0, len(heldout) - 1, min(count, len(heldout))).astype(int)
  return tasks_of_rows(layout, workdir, rows, seed, columns, keep_neighbors, image_tokenizer)


def tasks_of_rows(
  layout: PromptLayout,
  workdir: epath.PathLike,
  rows: Sequence[int] | np.ndarray,
  seed: int,
  columns: Sequence[tuple[int, SamplingConfig]],
  keep_neighbors: bool = False,
  image_tokenizer: ImageTokenizer | None = None,
) -> list[HeldoutCaption]:
  """Returns tasks for the held-out documents with the indices `rows`. See `heldout_tasks`."""
  workdir = epath.Path(workdir)
  heldout = DocumentStore(workdir / "documents" / "heldout_pairs", layout.vocab)
  documents = [heldout[int(i)] for i in rows]
  originals: list[np.ndarray | None] = [None] * len(documents)
  if image_tokenizer is not None and documents:
    codes = [layout.vocab.image_codes(document.segments[1].tokens) for document in documents]
    originals = list(image_tokenizer.decode(np.stack(codes)))
  if any(retrieve for retrieve, _ in columns):
    bank = open_bank(layout, workdir)
    ids = load_neighbors(workdir / "neighbors", "heldout_pairs", True, bank=len(bank))
  tasks = []
  for retrieve, sampling in columns:
    for n, (i, document) in enumerate(zip(rows, documents)):
      tasks.append(
        HeldoutCaption(
          prompt=layout.decode(document.segments[0].tokens),
          retrieve=retrieve,
          keep_neighbors=keep_neighbors,
          seed=seed + n,
          sampling=sampling,
          row=n,
          document=document,
          neighbors=first_documents(bank, ids[i], retrieve) if retrieve else (),
          original=originals[n],
        )
      )
  return tasks


def sample_grids(run: Run, folder: epath.PathLike) -> Callable[[dict, int], Image.Image]:
  """Returns a function that writes a grid of samples for held-out captions, and returns the grid.

  Its arguments are (params, step). No neighbors are retrieved. All processes of a run must call the
  function, because each process has a part of `params`. Only the first process writes the grid, to
  `folder`/step_XXXXXX.png.
  """
  settings, layout = run.settings, PromptLayout.of(run)
  count, columns = settings.train.num_samples, [(0, settings.sampling)]
  tasks = heldout_tasks(layout, run.folder, count, settings.seed, columns)

  def generate_grid(params: dict, step: int) -> Image.Image:
    pipeline = Pipeline(params, settings, layout, run.images)
    images = [samples[0].segments[0] for samples in pipeline.generate(tasks)]
    starts = range(0, len(tasks), GRID_COLUMNS)
    rows = [images[i : i + GRID_COLUMNS] for i in starts]
    labels = ["; ".join(task.prompt for task in tasks[i : i + GRID_COLUMNS]) for i in starts]
    grid = contact_sheet(rows, labels)
    if distributed.is_first():
      save_png(epath.Path(folder) / f"step_{step:06d}.png", grid)
    return grid

  return generate_grid
