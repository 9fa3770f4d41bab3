"""Tests that nothing held out of the illustrations, nor a near copy of it, is in training."""

import collections
import hashlib
import io
import json
import pathlib
import runpy
import subprocess
import sys
import tarfile
from unittest import mock

import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.checks import leaks
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.stages.shards import Runner
from tests.data.checks.duplicates_test import photo

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "illustrations" / "make_data.py"
STYLES = ("noto", "noto-v1", "fluent-emoji-flat", "fxemoji", "twemoji", "emojione")
MORE = ("--interleaved", "--texts=5")
THINGS = [f"{a}{b}" for a in ("ax", "bo", "cu", "dri", "fo", "gu", "hi") for b in "bcdnrxy"]


def body(name: str, copy: bool = False) -> str:
  """Returns the drawing of a name: rectangles at places and in colors that depend on it."""
  bits = hashlib.sha256(name.encode()).digest()
  shapes = [
    f'<rect x="{4 * (i % 4)}" y="{4 * (i // 4)}" width="4" height="4" '
    f'fill="rgb({bits[i]},{bits[16 + i]},{bits[31 - i] if not copy else bits[31 - i] ^ 2})"/>'
    for i in range(16)
  ]
  return "".join(shapes)


def pack(folder: pathlib.Path, package: str, names: dict[str, str], aliases: dict) -> None:
  icons = {name: {"body": text} for name, text in names.items()}
  files = {
    "icons.json": {"prefix": package, "icons": icons, "aliases": aliases, "width": 16},
    "info.json": {
      "name": package,
      "author": {"name": "A", "url": "https://a.org"},
      "license": {"spdx": "MIT"},
    },
    "metadata.json": {"categories": {"Flags": ["crossed-sails"]}},
  }
  with tarfile.open(folder / f"iconify-json-{package}-1.0.0.tgz", "w:gz") as tar:
    for name, content in files.items():
      data = json.dumps(content).encode()
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
  folder = tmp_path_factory.mktemp("packages")
  for style in STYLES:
    names = {thing: body(f"{thing} {style}") for thing in THINGS}
    names |= {name: body(f"{name} {style}") for name in ("crossed-sails", "keycap-5", "fox-dark")}
    # All artists draw wood almost like another thing; one names the fox by an alias.
    names["wood"] = body(f"axb {style}", copy=True)
    aliases = {"reynard": {"parent": "fox"}, "xof": {"parent": "fox", "hFlip": True}}
    if style == "twemoji":
      names["reynard"] = names.pop("fox")
    pack(folder, style, names, aliases if style == "noto" else {})
  return folder


def make(folder, packages, *flags):
  command = [sys.executable, str(SCRIPT), str(folder), f"--packages={packages}", *flags]
  environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
  return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def data(packages, tmp_path_factory):
  folder = tmp_path_factory.mktemp("illustrations")
  result = make(folder, packages, "--concepts=6", "--pairs=9", "--side=32", *MORE)
  assert result.returncode == 0, result.stderr
  return folder, [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_training_shows_no_heldout_concept_and_other_styles_of_heldout_pairs(data):
  shown = collections.defaultdict(set)
  for line in data[1]:
    facts = line["facts"]
    shown[line["split"], facts["heldout"], facts["concept"]].add(facts["style"])
  concepts = {name for split, kind, name in shown if kind == "concept"}
  pairs = {name: styles for (_, kind, name), styles in shown.items() if kind == "pair"}
  trained = {name: styles for (split, _, name), styles in shown.items() if split == "train"}
  banked = {name: styles for (split, _, name), styles in shown.items() if split == "bank"}
  assert len(concepts) >= 4
  assert sum(map(len, pairs.values())) == 9
  assert not concepts & set(trained)
  assert all(len(banked[name]) == 5 for name in concepts)
  assert all(trained[name] and not trained[name] & styles for name, styles in pairs.items())


def test_two_names_or_near_copies_of_one_thing_are_in_one_split(data):
  of_concept = {line["facts"]["concept"]: line["split"] == "train" for line in data[1]}
  assert not {"reynard", "crossed sails", "keycap 5", "fox dark"} & set(of_concept)
  assert of_concept["wood"] == of_concept["axb"]
  assert not [line for line in data[1] if line["split"] == "heldout" and "axb" in line["key"]]
  groups = {line["key"]: line["group"] for line in data[1]}
  assert groups["axb/Noto"] == groups["wood/Noto"] != groups["axb/Twemoji"]


def test_near_copies_are_found_across_blocks(monkeypatch):
  monkeypatch.syspath_prepend(SCRIPT.parent)
  near_copies = runpy.run_path(str(SCRIPT))["near_copies"]
  monkeypatch.setitem(near_copies.__globals__, "BLOCK", 2)
  drawings = [mock.Mock(svg=seed) for seed in (0, 1, 2, 0, 1)]
  rows, columns = near_copies(drawings, photo, 2)
  assert {*zip(rows.tolist(), columns.tolist())} == {(0, 3), (3, 0), (1, 4), (4, 1)}


def test_the_check_for_leaks_finds_none_and_would_find_one(data, tmp_path):
  folder, lines = data
  parts = ingest.parts_of(config := RawConfig(source=str(folder), resolution=32))
  ingest.prepare(config, parts, tmp_path / "raw", Runner())
  assert not leaks.check(tmp_path / "raw", 1).leaked
  heldout = next(line for line in lines if line["split"] == "heldout")
  copied = {**heldout, "key": "copy", "split": "train", "group": "copy"}
  (leaking := tmp_path / "leaking").mkdir()
  (leaking / "images").symlink_to(folder / "images")
  (leaking / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*lines, copied]))
  config = RawConfig(source=str(leaking), resolution=32, allow_outside=True)
  ingest.prepare(config, ingest.parts_of(config), tmp_path / "raw2", Runner())
  assert leaks.check(tmp_path / "raw2", 1).leaked == 1


def test_texts_and_documents_are_read_completely_and_share_no_drawing(data, tmp_path):
  folder, lines = data
  config = RawConfig(source=str(folder), resolution=32)
  summary = ingest.prepare(config, ingest.parts_of(config), tmp_path / "raw", Runner())
  assert not [name for name in summary if name.startswith("rejected")]
  text = (folder / "interleaved.jsonl").read_text()
  pages = [json.loads(line) for line in text.splitlines()]
  counts = [summary[f"{split}_interleaved"] for split in ("train", "heldout")]
  assert counts == [sum(page["split"] == split for page in pages) for split in ("train", "heldout")]
  assert counts[0] > 30 > counts[1] > 3
  assert summary["train_texts"] + summary["heldout_texts"] == 5
  known = {line["image"]: line for line in lines if line["split"] != "heldout"}
  for page in pages:
    captions, images = page["segments"][::2], page["segments"][1::2]
    assert 2 <= len(images) <= 3
    shown = [known[segment["image"]] for segment in images]
    assert [line["caption"] for line in shown] == [segment["text"] for segment in captions]
    is_train = page["split"] == "train"
    assert {line["split"] for line in shown} == {"train" if is_train else "bank"}
  assert not leaks.check(tmp_path / "raw", 1).leaked


def test_records_state_license_and_origin(data):
  folder, lines = data
  assert {line["license"] for line in lines} == {"MIT"}
  assert len((folder / "ATTRIBUTION.md").read_text().splitlines()) == 6


@pytest.mark.parametrize("case", ["none", "no icons.json", "no tar"])
def test_a_missing_or_wrong_package_is_named(case, packages, tmp_path):
  for path in packages.iterdir() if case != "none" else ():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  wrong = tmp_path / "iconify-json-noto-1.0.0.tgz"
  if case == "no icons.json":
    with tarfile.open(wrong, "w:gz"):
      pass
  if case == "no tar":
    wrong.write_bytes(b"x")
  result = make(tmp_path / "out", tmp_path)
  assert result.returncode == 1
  assert "npm pack" in result.stderr
  assert "noto" in result.stderr
  assert len(result.stderr.splitlines()) == 1
