"""Writes a raw folder like that of `ingest.prepare` from the records of a test."""

import hashlib
import json
import pathlib

from PIL import Image

from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import KINDS, SPLITS
from cm3leon_jax.files.json_files import write_json


def write_raw(folder, pairs, images, num_shards=1):
  """Writes shards of pairs (dicts with fields of RawPair) and images ([H, W, 3] uint8)."""
  folder, index = pathlib.Path(folder), {}
  size = -(-len(pairs) // num_shards)
  for s in range(num_shards):
    name, part = f"{s:06d}", slice(s * size, (s + 1) * size)
    (folder / name / "images").mkdir(parents=True)
    lines = []
    for i, (pair, image) in enumerate(zip(pairs[part], images[part])):
      Image.fromarray(image).save(folder / name / "images" / f"{i:07d}.png")
      lines.append(json.dumps({"image": f"images/{i:07d}.png", **pair}) + "\n")
    for kind in KINDS:
      (folder / name / f"{kind}.jsonl").write_text("".join(lines) if kind == "pairs" else "")
    counts = {f"{split}_{kind}": 0 for split in SPLITS for kind in KINDS}
    counts |= {
      f"{split}_pairs": sum(pair["split"] == split for pair in pairs[part]) for split in SPLITS
    }
    index[name] = {**counts, "digest": hashlib.sha256("".join(lines).encode()).hexdigest()}
  origin = {"kind": "pairs", "source": "", "license": "", "attribution": "", "records": 1}
  origins = [{field: pair.get(field, value) for field, value in origin.items()} for pair in pairs]
  write_json(
    folder / reader.INDEX,
    {"schema_version": reader.SCHEMA_VERSION, "origins": origins, "shards": index},
  )
