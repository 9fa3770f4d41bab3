"""Writes drawings of the same things by several artists as a folder of raw records.

  mkdir packages && cd packages && npm pack @iconify-json/noto ... && cd ..
  python examples/illustrations/make_data.py illustrations_data --packages=packages
  cm3leon prepare_data --config=C --config.raw.source=illustrations_data --check_leaks --workdir=W

Without the packages, the script prints the command that gets them (9 MB). With --interleaved and
--texts=N it also writes documents of texts and drawings, and texts without drawings. It holds out:
  concept  drawings of concepts of which training shows no style; the bank has their other styles
  pair     drawings whose concept training shows in other styles only
No near copy of a held-out drawing is in training or in the bank.
"""

import argparse
import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import hashlib
import itertools
import json
import pathlib
import sys

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# These modules are in the folder of this script.
import sets as sets_lib
from sets import Drawing
import texts as texts_lib

from cm3leon_jax.data.checks import duplicates

SIDE = 64  # Pixels.
BLOCK = 1_024  # Images that are compared with each other at a time.
CONCEPTS = 150  # Held-out concepts.
PAIRS = 600  # Held-out pairs of a concept and a style.
# Near copies of each other make one group, such as a hundred faces. Larger groups are not held out.
LARGEST_GROUP = 10
MOST_IMAGES = 3  # Of an interleaved document.
HELDOUT_TEXTS = 0.07  # Share of the modules whose docstrings are held out.
WORDINGS = (
  "{what}, {style} style",
  "{what} in {style} style",
  "{style} style: {what}",
  "{what} drawn in {style} style",
)


def chance(name: str) -> float:
  """Returns a number in [0, 1) that depends only on the name."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def caption(drawing: Drawing) -> str:
  """Returns "fire engine, Noto style" in one of WORDINGS, sometimes with another name."""
  names = [drawing.concept] * 3 + [*drawing.keywords]
  what = names[int(chance(f"name:{drawing.key}") * len(names))]
  wording = WORDINGS[int(chance(f"wording:{drawing.key}") * len(WORDINGS))]
  return wording.format(what=what, style=drawing.style)


def groups(names: Sequence[str], near: tuple[np.ndarray, np.ndarray]) -> list[str]:
  """Merges names of images that are near copies, directly or through others.

  groups(["apple", "pear", "cat", "pear"], ([0], [1])) = ["apple", "apple", "cat", "apple"]
  """
  ordered = sorted(set(names))
  number = {name: i for i, name in enumerate(ordered)}
  of_image = np.array([number[name] for name in names], int)
  rows, columns = of_image[near[0]], of_image[near[1]]
  links = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(ordered),) * 2)
  _, parts = connected_components(links, directed=False)
  first = dict(zip(reversed(parts.tolist()), reversed(ordered)))
  return [first[part] for part in parts[of_image].tolist()]


def splits(
  drawings: Sequence[Drawing],
  near: tuple[np.ndarray, np.ndarray],
  num_concepts: int = CONCEPTS,
  num_pairs: int = PAIRS,
) -> list[str]:
  """Returns the split of each drawing: "train", "bank", "heldout concept" or "heldout pair".

  `near` has the positions of the drawings that are near copies of each other.
  """
  merged = groups([drawing.concept for drawing in drawings], near)
  members = collections.defaultdict(set)
  for drawing, group in zip(drawings, merged):
    members[group].add(drawing.concept)
  heldout: set[str] = set()
  for group in sorted(members, key=lambda name: chance(f"concept:{name}")):
    if len(members[group]) <= min(LARGEST_GROUP, num_concepts - len(heldout)):
      heldout |= members[group]
  result = ["bank" if drawing.concept in heldout else "train" for drawing in drawings]
  copied = {*near[0].tolist(), *near[1].tolist()}  # Only drawings without a near copy are held out.
  alone = [i for i in range(len(drawings)) if i not in copied]
  alone.sort(key=lambda i: chance(f"pair:{drawings[i].key}"))
  styles = collections.Counter(drawing.concept for drawing in drawings)
  asked: set[str] = set()
  left = num_pairs
  for i in alone:
    concept = drawings[i].concept
    if concept in heldout and concept not in asked:
      asked.add(concept)
      result[i] = "heldout concept"
    elif concept not in heldout and left and styles[concept] > 2:
      styles[concept] -= 1
      left -= 1
      result[i] = "heldout pair"
  return result


def records(
  drawings: Sequence[Drawing], split: Sequence[str], near: tuple[np.ndarray, np.ndarray],
  sets: dict[str, sets_lib.IconSet],
) -> Iterator[dict]:  # fmt: skip
  """Yields the lines of pairs.jsonl."""
  merged = groups([drawing.key for drawing in drawings], near)
  for drawing, part, group in zip(drawings, split, merged):
    about = sets[drawing.style]
    yield {
      "key": drawing.key,
      "image": image_of(drawing),
      "caption": caption(drawing),
      "group": group,
      "split": part.split()[0],
      "facts": {"concept": drawing.concept, "style": drawing.style, "heldout": part[8:]},
      "source": about.source,
      "license": about.license,
      "attribution": about.attribution,
    }


def interleaved(pairs: Iterable[dict]) -> Iterator[dict]:
  """Yields the lines of interleaved.jsonl: drawings of a concept, each after its caption.

  Held-out documents have the drawings of the bank, whose concepts training does not show.
  """
  by_concept = collections.defaultdict(list)
  for pair in pairs:
    if pair["split"] != "heldout":
      by_concept[pair["facts"]["concept"]].append(pair)
  for concept, members in sorted(by_concept.items()):
    shown = members[:MOST_IMAGES]
    if len(shown) > 1:
      parts = [[{"text": pair["caption"]}, {"image": pair["image"]}] for pair in shown]
      yield {
        "key": f"{concept} by {len(shown)} artists",
        "segments": [*itertools.chain(*parts)],
        "group": shown[0]["group"],
        "split": "train" if shown[0]["split"] == "train" else "heldout",
        "source": " ".join(pair["source"] for pair in shown),
        "license": " AND ".join(sorted({pair["license"] for pair in shown})),
        "attribution": "; ".join(pair["attribution"] for pair in shown),
      }


def texts(limit: int) -> Iterator[dict]:
  """Yields the lines of texts.jsonl. All texts of a Python module are in one split."""
  for piece in texts_lib.pieces(limit):
    module = piece.module
    yield {
      "key": piece.key,
      "text": piece.text,
      "split": "heldout" if chance(f"split:{module.name}") < HELDOUT_TEXTS else "train",
      "source": module.source,
      "license": module.license,
      "attribution": module.attribution,
    }


def write_lines(path: pathlib.Path, lines: Sequence[dict]) -> str:
  """Writes each record as one line of JSON; returns "5 texts" for 5 records in texts.jsonl."""
  text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
  path.write_text(text, encoding="utf-8")
  return f"{len(lines):,} {path.stem}"


def image_of(drawing: Drawing) -> str:
  """Returns the path of a drawing's image, relative to the output folder."""
  return f"images/{drawing.key.replace('/', '.')}.png"


def near_copies(
  drawings: Sequence[Drawing], load: Callable[[str], np.ndarray], threads: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the positions of different drawings that `prepare_data --check_leaks` calls near."""
  prints = duplicates.fingerprints([drawing.svg for drawing in drawings], load, threads)
  rows, columns = [], []
  for i in range(0, len(prints), BLOCK):
    for j in range(0, len(prints), BLOCK):
      a, b = prints[i : i + BLOCK], prints[j : j + BLOCK]
      near = duplicates.is_near(duplicates.psnr(a, b), duplicates.hash_distance(a, b))
      first, second = np.nonzero(near)
      rows.append(first + i)
      columns.append(second + j)
  row, column = np.concatenate(rows), np.concatenate(columns)
  different = row != column
  return row[different], column[different]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=pathlib.Path, help="folder to write")
  parser.add_argument("--packages", type=pathlib.Path, default=".", help="folder of the packages")
  parser.add_argument("--side", type=int, default=SIDE, help="side of the images in pixels")
  parser.add_argument("--concepts", type=int, default=CONCEPTS, help="held-out concepts")
  parser.add_argument("--pairs", type=int, default=PAIRS, help="held-out concepts in one style")
  parser.add_argument("--interleaved", action="store_true", help="also write interleaved.jsonl")
  parser.add_argument("--texts", type=int, default=0, help="largest number of texts to write")
  parser.add_argument("--threads", type=int, default=8, help="drawings rendered at the same time")
  args = parser.parse_args()
  try:
    sets = sets_lib.read(args.packages)
  except sets_lib.SetError as error:
    sys.exit(f"error: {error}")
  drawings = sets_lib.drawings(sets)
  (args.folder / "images").mkdir(parents=True, exist_ok=True)

  def draw(svg: str) -> np.ndarray:
    return sets_lib.render(svg, args.side)

  def save(drawing: Drawing) -> None:
    Image.fromarray(draw(drawing.svg)).save(args.folder / image_of(drawing))

  with futures.ThreadPoolExecutor(args.threads) as pool:
    list(pool.map(save, drawings))
  near = near_copies(drawings, draw, args.threads)
  split = splits(drawings, near, args.concepts, args.pairs)
  pairs = [*records(drawings, split, near, {icons.style: icons for icons in sets})]
  write_lines(args.folder / "pairs.jsonl", pairs)
  also = ""
  if args.interleaved:
    also += ", " + write_lines(args.folder / "interleaved.jsonl", [*interleaved(pairs)])
  if args.texts:
    also += ", " + write_lines(args.folder / "texts.jsonl", [*texts(args.texts)])
  (args.folder / "ATTRIBUTION.md").write_text(
    "".join(f"- {i.attribution}: {i.license}, {i.source}\n" for i in sets), encoding="utf-8"
  )
  counts = collections.Counter(split)
  print(
    f"{args.folder}: {len(drawings):,} drawings of {len({d.concept for d in drawings}):,} concepts "
    f"by {len(sets)} artists; "
    + ", ".join(f"{n:,} {part}" for part, n in sorted(counts.items()))
    + also
  )


if __name__ == "__main__":
  main()
