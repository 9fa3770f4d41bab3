"""Encodes instruction records as document stores with targets."""

# H height, W width, I codes per image.

from collections.abc import Callable, Iterable
from concurrent import futures
import dataclasses
import itertools
import json
import random

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax.config.instructions import InstructionTask, fields_of
from cm3leon_jax.data.documents.store import Document, finish_store, write_shard
from cm3leon_jax.data.instructions.edges import MAPS, ImageMap
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.samples import Drops, plan_instruction, write_targets
from cm3leon_jax.data.instructions.tasks import Instruction, join_record
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import RecordError
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.vocab import VocabLayout

SHARD = 1_024  # Number of records that are encoded together and form one shard.
REJECTED = "rejected.jsonl"


@dataclasses.dataclass(frozen=True)
class RecordEncoder:
  """Tokenizers and limits that turn records into token ids.

  Attributes:
    encode: text -> [T] int32 ids.
    positions: maximum number of predicted tokens per sample, which is the length of a row.
    redrawn: share of records whose input images are encoded twice, see `InstructionsConfig`.
    instruction_first: order of the segments of an edit, see `InstructionsConfig`.
  """

  encode: Callable[[str], np.ndarray]
  image_tokenizer: ImageTokenizer
  vocab: VocabLayout
  positions: int
  num_threads: int = 8
  redrawn: float = 0.0
  instruction_first: bool = False


def write_store(
  folder: epath.PathLike, task: InstructionTask, records: Iterable[Record], encoder: RecordEncoder
) -> dict[str, int]:
  """Writes the records of a task as a document store with targets.npy and rejected.jsonl.

  Documents keep the order of the records. Only SHARD records and their images are in memory at a
  time. Writes invalid records to rejected.jsonl with the reason: an image cannot be read, a text
  is empty, or the sample does not fit into a row. Returns the number of documents, the number of
  rejected records, and the number of target tokens.

  Raises:
    UserError: a template does not fit the records, or no record is valid.
  """
  folder, targets, names = epath.Path(folder), [], []
  folder.mkdir(parents=True, exist_ok=True)
  rejected = 0
  records = iter(records)
  with replacing(folder / REJECTED, "w") as file:
    for number in itertools.count():
      part = list(itertools.islice(records, SHARD))
      if not part:
        break
      result, wrong = _encode(task, part, encoder)
      for record, reason in wrong:
        file.write(json.dumps({"key": record.key, "task": task.name, "reason": reason}) + "\n")
      rejected += len(wrong)
      if result:
        names.append(f"{number:06d}")
        documents = (
          Document(r.key, one.segments, "", "", "", r.group, r.group, dict(r.facts))
          for r, one in result
        )
        write_shard(folder, names[-1], documents, encoder.vocab)
        targets += [(one.start, one.stop) for _, one in result]
  if not targets and not rejected:
    raise UserError(f"task {task.name} has no records: the files of its split are empty.")
  if not targets:
    raise UserError(
      f"task {task.name} has no valid record ({rejected} are rejected): see {folder / REJECTED}."
    )
  finish_store(folder, names, encoder.vocab)
  write_targets(folder, targets)
  tokens = sum(stop - start for start, stop in targets)
  return {"documents": len(targets), "rejected": rejected, "target_tokens": tokens}


def _encode(
  task: InstructionTask, records: list[Record], encoder: RecordEncoder
) -> tuple[list[tuple[Record, Instruction]], list[tuple[Record, str]]]:
  """Returns valid records with their documents, and invalid records with the reasons."""
  images, wrong = _read_images(task, records, encoder)
  of_record: dict[int, dict[str, np.ndarray]] = {}
  if images:
    pixels = np.stack([image for _, _, image in images])
    redrawn = [
      field != task.target and is_redrawn(task, records[i].key, encoder.redrawn)
      for i, field, _ in images
    ]
    codes = _encode_images(encoder.image_tokenizer, pixels, np.array(redrawn))
    for (i, field, _), ids in zip(images, encoder.vocab.image_ids(codes)):
      of_record.setdefault(i, {})[field] = ids
  result = []
  for i, record in enumerate(records):
    if i in wrong:
      continue
    try:
      own, first = of_record.get(i, {}), encoder.instruction_first
      one = join_record(task, record, encoder.encode, own, first)
    except RecordError as error:
      wrong[i] = str(error)
      continue
    lengths = [len(segment.tokens) for segment in one.segments]
    is_image = [segment.is_image for segment in one.segments]
    rng, span = np.random.default_rng(0), (one.start, one.stop)
    size = plan_instruction(lengths, is_image, span, rng, Drops(), encoder.vocab).length
    most = encoder.positions + 1
    if size > most:
      target = one.stop - one.start
      wrong[i] = (
        f"its sample has {size} tokens, of which {target} belong to {task.target}; a row has space "
        f"for {most}: shorten it, or raise config.data.sequence_length."
      )
      continue
    result.append((record, one))
  return result, [(records[i], reason) for i, reason in sorted(wrong.items())]


def is_redrawn(task: InstructionTask, key: str, share: float) -> bool:
  """Returns whether the input images of a record are encoded twice; depends only on its key."""
  return random.Random(f"{task.name} {key} redrawn").random() < share


def _encode_images(
  tokenizer: ImageTokenizer, pixels: np.ndarray, redrawn: np.ndarray
) -> np.ndarray:
  """Encodes images, [n, H, W, 3] uint8, as codes, [n, I] int32; twice if `redrawn`.

  Decoding an image and encoding it again changes its codes. When a model edits generated images,
  its input has such changed codes.
  """
  codes = np.array(tokenizer.encode(pixels))
  if redrawn.any():
    codes[redrawn] = tokenizer.encode(tokenizer.decode(codes[redrawn]))
  return codes


def _read_images(
  task: InstructionTask, records: list[Record], encoder: RecordEncoder
) -> tuple[list[tuple[int, str, np.ndarray]], dict[int, str]]:
  """Reads all images that the templates use.

  Returns (record index, field, pixels) of each image, and error messages by record index.
  """
  named = {field for template in task.templates for field in fields_of(template)}
  side = encoder.image_tokenizer.config.resolution

  def read(record: Record) -> list[tuple[str, np.ndarray]] | str:
    try:
      given = [(field, image) for field, image in record.images.items() if field in named]
      return [(field, square_pixels(image, side)) for field, image in given]
    except UserError as error:
      return str(error)

  with futures.ThreadPoolExecutor(encoder.num_threads) as pool:
    results = list(pool.map(read, records))
  found, wrong = [], {}
  for i, result in enumerate(results):
    if isinstance(result, str):
      wrong[i] = result
    else:
      found += [(i, field, pixels) for field, pixels in result]
  return found, wrong


def square_pixels(image: str | np.ndarray | ImageMap, side: int) -> np.ndarray:
  """Returns the pixels of an image of a record, [side, side, 3] uint8.

  The image is a path, pixels, or a map that is computed here.

  Raises:
    UserError: the image cannot be read, or its pixels are not a square RGB image.
  """
  if isinstance(image, ImageMap):
    return MAPS[image.kind](square_pixels(image.image, side))
  if isinstance(image, np.ndarray):
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
      raise UserError(f"an image has the shape {list(image.shape)}; it must be [side, side, 3].")
    if len(image) == side:
      return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
  return reader.load_image(image, side)
