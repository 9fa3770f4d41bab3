"""From captions to pictures on disk: whose captions, which neighbours, and what is recorded of each picture."""

import dataclasses
import re

from etils import epath
import numpy as np
from PIL import Image
from tqdm import tqdm

from cm3leon_jax import distributed
from cm3leon_jax.config import UserError
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.data.documents import Document, DocumentStore
from cm3leon_jax.decoding import pictures
from cm3leon_jax.decoding.generate import Generator, conditional_prompt
from cm3leon_jax.retrieval import neighbors as neighbors_lib
from cm3leon_jax.retrieval.clip import CLIP, clip_score
from cm3leon_jax.retrieval.hf_clip import HFCLIP
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

BATCH = 16
GRID_COLUMNS = 4
ORIGIN = ("key", "source", "license", "attribution")  # What a record says of each neighbour.


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What to draw.

  Attributes:
    text: the caption.
    ids: [T] int32, its tokens.
    seed: of its picture.
    key: of the held-out pair, "" if the caption is the user's.
    neighbors: retrieved documents, best first.
    original: file of the held-out picture, if there is one.
  """

  text: str
  ids: np.ndarray
  seed: int
  key: str = ""
  neighbors: tuple[Document, ...] = ()
  original: epath.Path | None = None


def heldout_prompts(settings, workdir, count: int, seed: int, retrieve: int) -> list[Prompt]:
  """`count` held-out captions, evenly spread over the split, with neighbours by caption alone."""
  documents = workdir / "documents"
  heldout, bank = (DocumentStore(documents / f"{split}_pairs", settings.vocab) for split in ("heldout", "train"))
  pairs = raw_pairs.read_pairs(workdir / "raw", "heldout")
  if count > len(heldout):
    raise UserError(f"--captions is {count}; only {len(heldout)} pairs are held out.")
  ids = None
  if retrieve:
    ids = neighbors_lib.load_neighbors(workdir / "neighbors", "heldout_pairs", text_only=True)
  prompts = []
  for n, i in enumerate(np.linspace(0, len(heldout) - 1, count).astype(int)):
    found = _first(bank, ids[i], retrieve) if retrieve else ()
    pair = pairs[i]
    prompts.append(Prompt(pair.caption, heldout[i].segments[0].tokens, seed + n, pair.key, found, epath.Path(pair.image)))
  return prompts


def free_prompts(settings, workdir, texts: list[str], seed: int, retrieve: int, clip: CLIP | HFCLIP, bank) -> list[Prompt]:
  """The user's texts, with neighbours that CLIP finds for them in the workdir `bank`."""
  encode = TextTokenizer(workdir / "text_tokenizer", settings.vocab).encode
  for text in texts:
    if not text.strip():
      raise UserError("--prompt is empty: give at least one word to draw.")
  ids, found = [encode(text) for text in texts], [()] * len(texts)
  if retrieve:
    store = DocumentStore(bank / "documents" / "train_pairs", settings.vocab)
    retriever = neighbors_lib.Retriever(bank / "neighbors", settings.retrieval)
    queries = clip.embed_texts([clip.encode(text) for text in texts])
    found = [_first(store, row, retrieve) for row in retriever.retrieve(queries)[0]]
  return [Prompt(*pair, seed + n, neighbors=near) for n, (*pair, near) in enumerate(zip(texts, ids, found))]


def _first(store: DocumentStore, ids: np.ndarray, count: int) -> tuple[Document, ...]:
  return tuple(store[i] for i in ids[ids >= 0][:count])


def prompt_ids(vocab, prompt: Prompt, retrieve: int) -> np.ndarray:
  return conditional_prompt(vocab, prompt.ids, [[s.tokens for s in d.segments] for d in prompt.neighbors[:retrieve]])


def sample_drawer(settings, workdir, folder):
  """The trainer's `draw(params, step)`: writes one grid of held-out captions without neighbours into `folder`, returns it.

  All processes of a run draw the same pictures, for each holds a part of `params`; one writes them.
  """
  count = min(settings.train.num_samples, len(raw_pairs.read_pairs(workdir / "raw", "heldout")))
  prompts = heldout_prompts(settings, workdir, count, settings.seed, 0)
  image_tokenizer = ImageTokenizer.load(workdir / "vqgan")
  ids, seeds = [prompt_ids(settings.vocab, p, 0) for p in prompts], [p.seed for p in prompts]

  def draw(params, step: int) -> Image.Image:
    generator = Generator(settings.model, params, settings.vocab, settings.sampling, settings.vqgan.image_tokens)
    images = image_tokenizer.decode(generator.text_to_image(ids, seeds))
    parts = [slice(i, i + GRID_COLUMNS) for i in range(0, count, GRID_COLUMNS)]
    captions = ["; ".join(p.text for p in prompts[part]) for part in parts]
    sheet = pictures.contact_sheet([images[part] for part in parts], captions)
    if distributed.is_first():
      pictures.save_png(epath.Path(folder) / f"step_{step:06d}.png", sheet)
    return sheet

  return draw


def draw_all(settings, workdir, folder, params, prompts, clip, guidances, retrieves) -> list[dict]:
  """Draws every prompt with every setting; writes the pictures as they come. Returns the records of results.jsonl."""
  image_tokens = settings.vqgan.image_tokens
  generator = Generator(settings.model, params, settings.vocab, settings.sampling, image_tokens)
  image_tokenizer = ImageTokenizer.load(workdir / "vqgan")
  sampler = {k: v for k, v in dataclasses.asdict(settings.sampling).items() if k != "guidance"}
  columns = [(retrieve, guidance) for retrieve in retrieves for guidance in guidances]
  records, drawn = [], {}
  with tqdm(total=len(columns) * len(prompts) * image_tokens, desc="generate", unit="token", mininterval=1) as bar:
    for retrieve, guidance in columns:
      for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        out = generator.images([prompt_ids(settings.vocab, p, retrieve) for p in part], [p.seed for p in part], guidance)
        images = image_tokenizer.decode(out.codes)
        scores = clip_score(clip, images, [clip.encode(p.text) for p in part])
        for row, prompt in enumerate(part):
          name = f"{start + row:03d}_{slug(prompt.text)}_guidance{guidance:g}_retrieve{retrieve}.png"
          pictures.save_png(folder / name, images[row])
          drawn[start + row, retrieve, guidance] = images[row]
          records.append(
            {
              "prompt": prompt.text,
              "key": prompt.key,
              "seed": prompt.seed,
              "guidance": guidance,
              "retrieve": retrieve,
              **sampler,
              "neighbours": [{name: getattr(d, name) for name in ORIGIN} for d in prompt.neighbors[:retrieve]],
              "file": name,
              "codes": out.codes[row].tolist(),
              "log_prob": float(out.log_probs[row].sum()),
              "clip_score": float(scores[row]),
            }
          )
        bar.update(len(part) * image_tokens)
  _write_sheet(settings, folder, prompts, columns, drawn)
  return records


def _write_sheet(settings, folder, prompts, columns, drawn) -> None:
  originals = [[raw_pairs.load_image(p.original, settings.vqgan.resolution)] if p.original else [] for p in prompts]
  rows = [first + [drawn[(i, *column)] for column in columns] for i, first in enumerate(originals)]
  titles = [f"{retrieve} docs, guidance {guidance:g}" for retrieve, guidance in columns]
  titles = (["original"] if originals[0] else []) + titles
  pictures.save_png(folder / "contact_sheet.png", pictures.contact_sheet(rows, [p.text for p in prompts], titles))


def slug(text: str) -> str:
  return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"
