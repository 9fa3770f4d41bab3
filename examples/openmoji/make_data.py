"""Writes OpenMoji's drawings, some texts and some interleaved documents as a folder of raw records.

  python examples/openmoji/make_data.py openmoji_data
  cm3leon run --config=examples/openmoji/config.py --workdir=workdir/openmoji

The drawings and their names come from the packages of the extra `demo`; the texts are docstrings of
the installed packages. The folder is an example of the format `folder`: docs/data_formats.md.
"""

import argparse
import collections
from collections.abc import Iterable, Iterator
from concurrent import futures
import hashlib
import json
import pathlib

# These modules are in the folder of this script.
import drawings as drawings_lib
from drawings import Drawing
from PIL import Image
import texts as texts_lib

SIDE = 64  # Pixels.
# Held-out share of the concepts and of the modules. It holds out 103 concepts of drawings.
HELDOUT = 0.07
# Most images per interleaved document. An image has 256 codes, and a row has 1,024 tokens.
MOST_IMAGES = 3


def split_of(name: str) -> str:
  """Returns the split of a concept or a module; it depends only on the name."""
  digest = hashlib.sha256(f"split:{name}".encode()).digest()
  return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < HELDOUT else "train"


def origin() -> dict[str, str]:
  """Returns the record fields that state the origin of the drawings."""
  return {
    "source": drawings_lib.source(),
    "license": drawings_lib.LICENSE,
    "attribution": drawings_lib.ATTRIBUTION,
  }


def image_of(drawing: Drawing) -> str:
  """Returns the path of a drawing's image, relative to the output folder."""
  return f"images/{drawing.code}.png"


def pairs(drawings: Iterable[Drawing]) -> Iterator[dict]:
  """Yields the lines of pairs.jsonl: one captioned image per drawing.

  Drawings of one concept have the same `group`, so they are never neighbors of each other.
  """
  for drawing in drawings:
    yield {
      "key": f"openmoji/{drawing.code}",
      "image": image_of(drawing),
      "caption": drawing.caption,
      "group": drawing.concept,
      "split": split_of(drawing.concept),
      **origin(),
    }


def interleaved(drawings: Iterable[Drawing]) -> Iterator[dict]:
  """Yields the lines of interleaved.jsonl: one document for each concept with several drawings."""
  by_concept = collections.defaultdict(list)
  for drawing in drawings:
    by_concept[drawing.concept].append(drawing)
  for concept, members in sorted(by_concept.items()):
    if len(members) < 2:
      continue
    segments = []
    for drawing in members[:MOST_IMAGES]:
      segments += [{"text": drawing.caption}, {"image": image_of(drawing)}]
    yield {
      "key": f"openmoji/{concept}",
      "segments": segments,
      "group": concept,
      "split": split_of(concept),
      **origin(),
    }


def texts(limit: int) -> Iterator[dict]:
  """Yields the lines of texts.jsonl. All texts of a Python module are in one split."""
  for piece in texts_lib.pieces(limit):
    module = piece.module
    yield {
      "key": piece.key,
      "text": piece.text,
      "split": split_of(module.name),
      "source": module.source,
      "license": module.license,
      "attribution": module.attribution,
    }


def write_lines(path: pathlib.Path, records: Iterable[dict]) -> int:
  """Writes each record as one line of JSON and returns the number of lines."""
  lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
  path.write_text("".join(lines), encoding="utf-8")
  return len(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description="Writes the data of the example OpenMoji.")
  parser.add_argument("folder", type=pathlib.Path, help="folder to write")
  parser.add_argument("--drawings", type=int, default=0, help="number of drawings; 0: all 4,096")
  parser.add_argument("--texts", type=int, default=4_000, help="largest number of texts")
  parser.add_argument("--threads", type=int, default=8, help="drawings rendered at the same time")
  args = parser.parse_args()

  named, nameless = drawings_lib.drawings()
  # Evenly spaced, because drawings with adjacent code points show similar things.
  if args.drawings:
    named = named[:: max(1, len(named) // args.drawings)][: args.drawings]
  named = drawings_lib.unite_concepts(named, SIDE, args.threads)
  (args.folder / "images").mkdir(parents=True, exist_ok=True)

  def save(drawing: Drawing) -> None:
    pixels = drawings_lib.render(drawing.path, SIDE)
    Image.fromarray(pixels).save(args.folder / image_of(drawing))

  with futures.ThreadPoolExecutor(args.threads) as pool:
    list(pool.map(save, named))
  written = {
    "pairs": write_lines(args.folder / "pairs.jsonl", pairs(named)),
    "texts": write_lines(args.folder / "texts.jsonl", texts(args.texts)),
    "interleaved documents": write_lines(args.folder / "interleaved.jsonl", interleaved(named)),
  }
  counts = ", ".join(f"{number:,} {kind}" for kind, number in written.items())
  print(f"{args.folder}: {counts}; {nameless} drawings without a name are left out.")


if __name__ == "__main__":
  main()
