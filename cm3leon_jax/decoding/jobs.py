"""From what a user asks for, or held-out captions, to requests: the pictures that are given, and what is retrieved."""

from collections.abc import Sequence
import dataclasses

from etils import epath
import numpy as np

from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config import UserError
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.data.documents import Document, DocumentStore
from cm3leon_jax.decoding import asks as asks_lib
from cm3leon_jax.decoding.asks import MASK, Ask
from cm3leon_jax.decoding.prompts import Request
from cm3leon_jax.decoding.sampling import SamplingConfig
from cm3leon_jax.decoding.tasks import Format, make_request, whole_codes
from cm3leon_jax.retrieval import neighbors as neighbors_lib
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer


@dataclasses.dataclass(frozen=True)
class Job:
  """An ask, made ready for the model.

  Attributes:
    ask: what it is.
    request: prompts and plan.
    key: of the held-out pair, "" if the ask is the user's.
    neighbors: retrieved documents, best first.
    given: [H, W, 3] uint8, the picture that the user gives, or the held-out one, which the model does not see; None: none.
  """

  ask: Ask
  request: Request
  key: str = ""
  neighbors: tuple[Document, ...] = ()
  given: np.ndarray | None = None


def is_scored(ask: Ask) -> bool:
  """Whether there is a caption and a picture whose CLIP score says something."""
  return ask.task in ("text_to_image", "caption") or (
    ask.task == "infill_image" and bool(ask.prompt.strip())
  )


def check_asks(form: Format, asks: Sequence[Ask], bank: epath.PathLike) -> dict[str, np.ndarray]:
  """All that can be told before anything is compiled, and the given pictures: file -> [H, W, 3] uint8.

  Raises:
    UserError: what `asks.check`, `tasks.make_request` and `raw_pairs.load_image` raise, or there is nothing to retrieve from.
  """
  given = {}
  for ask in asks:
    asks_lib.check(ask)
    make_request(form, ask)
    if ask.box:
      _tell_of_box(form, ask)
    if ask.image and ask.image not in given:
      try:
        given[ask.image] = _load(ask.image, form.resolution)
      except UserError as error:
        raise ask.error(error) from error
  retrieving = next((ask for ask in asks if ask.retrieve), None)
  if retrieving and not len(store := _store(form, bank)):
    raise retrieving.error(
      f"retrieve is {retrieving.retrieve}, and {store.folder} holds no documents: say --retrieve=0."
    )
  return given


def _store(form: Format, bank: epath.PathLike) -> DocumentStore:
  return DocumentStore(epath.Path(bank) / "documents" / "train_pairs", form.vocab)


def _tell_of_box(form: Format, ask: Ask) -> None:
  pixels = form.resolution // form.side
  whole = tuple(pixels * x for x in whole_codes(ask.box, form.resolution, form.side))
  if whole != tuple(ask.box):
    listed = lambda box: ",".join(map(str, box))
    print(
      f"generate: box {listed(ask.box)} is rounded out to whole codes of {pixels} pixels: {listed(whole)}.",
      flush=True,
    )


def _load(path: str, resolution: int) -> np.ndarray:
  """The picture, squared and in the model's resolution; says so if it was not."""
  picture = raw_pairs.load_image(path, None)
  height, width = picture.shape[:2]
  if (height, width) == (resolution, resolution):
    return picture
  cut = "" if height == width else f"the centered square of {min(height, width)} of "
  print(
    f"generate: {cut}{path}, {width} x {height} pixels, is scaled to {resolution} x {resolution}.",
    flush=True,
  )
  return raw_pairs.load_image(path, resolution)


def make_jobs(
  settings,
  form: Format,
  workdir,
  asks: Sequence[Ask],
  given: dict,
  clip: CLIP | HFCLIP | None,
  bank,
):
  """The user's asks as jobs.

  Args:
    settings: of the run.
    form: of `Format.of`.
    workdir: of the run.
    asks: checked.
    given: their pictures, see `check_asks`.
    clip: needed where documents are retrieved.
    bank: workdir that they are retrieved from.

  Returns:
    A Job for each. Raises UserError if nothing is found, or a prompt is too long with what is.
  """
  codes = {}
  if given:
    encoded = ImageTokenizer.load(epath.Path(workdir) / "vqgan").encode(
      np.stack(list(given.values()))
    )
    codes = dict(zip(given, encoded))
  found = _retrieve(settings, form, asks, clip, bank)
  jobs = []
  for ask, near in zip(asks, found):
    request = make_request(form, ask, codes.get(ask.image), near)
    jobs.append(Job(ask, request, neighbors=near, given=given.get(ask.image)))
  return jobs


def _retrieve(
  settings, form: Format, asks: Sequence[Ask], clip, bank
) -> list[tuple[Document, ...]]:
  """The neighbors of each ask, found by its picture, or by its text where that tells what the picture shows."""
  query = lambda ask: (
    (ask.image, "") if _by_image(ask) else ("", ask.prompt.replace(MASK, " ").strip())
  )
  queries = list(dict.fromkeys(query(ask) for ask in asks if ask.retrieve))
  if not queries:
    return [()] * len(asks)
  images = [raw_pairs.load_image(image, clip.resolution) for image, _ in queries if image]
  texts = [clip.encode(text) for image, text in queries if not image]
  embedded = [
    iter(clip.embed_images(np.stack(images)) if images else ()),
    iter(clip.embed_texts(texts) if texts else ()),
  ]
  vectors = np.stack([next(embedded[0 if image else 1]) for image, _ in queries])
  store, retriever = (
    _store(form, bank),
    neighbors_lib.Retriever(epath.Path(bank) / "neighbors", settings.retrieval),
  )
  ids = dict(zip(queries, retriever.retrieve(vectors)[0]))
  found = [
    first_documents(store, ids[query(ask)], ask.retrieve) if ask.retrieve else () for ask in asks
  ]
  for ask, near in zip(asks, found):
    if ask.retrieve and not near:
      raise ask.error(
        f"no document was found for '{ask.prompt or ask.image}': all are more similar to it than "
        f"config.retrieval.max_similarity = {settings.retrieval.max_similarity}: say --retrieve=0."
      )
  return found


def _by_image(ask: Ask) -> bool:
  captioned = ask.task == "infill_image" and ask.prompt.strip()
  return bool(ask.image) and not captioned


def first_documents(store: DocumentStore, ids: np.ndarray, count: int) -> tuple[Document, ...]:
  """The documents of the first `count` ids; -1 is none."""
  return tuple(store[i] for i in ids[ids >= 0][:count])


def heldout_jobs(
  form: Format,
  workdir,
  count: int,
  seed: int,
  columns: Sequence[tuple[int, SamplingConfig]],
  keep: bool = False,
):
  """`count` held-out captions, evenly spread over the split, each with every setting.

  Args:
    form: of the model.
    workdir: of the run.
    count: of captions.
    seed: of the first caption; each next one has the next.
    columns: numbers of retrieved documents, found by the caption alone, and settings of the sampler.
    keep: the unconditional stream keeps the documents.

  Returns:
    Jobs, column after column. Raises UserError if fewer captions are held out.
  """
  workdir = epath.Path(workdir)
  heldout = DocumentStore(workdir / "documents" / "heldout_pairs", form.vocab)
  pairs = raw_pairs.read_pairs(workdir / "raw", "heldout")
  if count > len(heldout):
    raise UserError(f"--captions is {count}; only {len(heldout)} pairs are held out.")
  ids = None
  if any(retrieve for retrieve, _ in columns):
    store = _store(form, workdir)
    ids = neighbors_lib.load_neighbors(workdir / "neighbors", "heldout_pairs", text_only=True)
  rows = np.linspace(0, len(heldout) - 1, count).astype(int)
  pictures = [raw_pairs.load_image(pairs[i].image, form.resolution) for i in rows]
  jobs = []
  for retrieve, sampling in columns:
    for n, i in enumerate(rows):
      near = first_documents(store, ids[i], retrieve) if retrieve else ()
      ask = Ask(
        prompt=pairs[i].caption,
        seed=seed + n,
        retrieve=retrieve,
        keep_neighbors=keep,
        sampling=sampling,
        row=n,
      )
      request = make_request(form, ask, neighbors=near, caption=heldout[i].segments[0].tokens)
      jobs.append(Job(ask, request, pairs[i].key, near, pictures[n]))
  return jobs
