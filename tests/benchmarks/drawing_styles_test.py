import io
import subprocess
import tarfile

from hypothesis import given
from hypothesis import strategies as st
import pytest

from benchmarks import drawing_styles
from benchmarks.drawing_styles import FLUENT, NOTO, code_points
from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources import openmoji
from cm3leon_jax.data.sources.records import RawPair, make_record
from tests.data.checks.duplicates_test import photo
from tests.messages import refused

APPLE, FOX, FRANCE = (0x1F34E,), (0x1F98A,), (0x1F1EB, 0x1F1F7)
NAMES = ("openmoji", "fluent", "noto")


def test_code_points_are_those_of_the_docstring():
  assert code_points("0023-fe0f-20e3") == code_points("23-20E3") == (0x23, 0x20E3)
  assert code_points("1f44b-1f3fb") == code_points("sheet_64") == ()


def test_styles_are_matched_by_code_points_however_their_names_are_written():
  wanted = {code_points(code) for code in ("2764", "1F34E", "00A9")}
  fluent = drawing_styles.match(
    FLUENT, ["2764-fe0f.webp", "a9.webp", "readme.md", "1f98a.webp"], wanted
  )
  noto = drawing_styles.match(NOTO, ["2764-fe0f.png", "1f34e.png", "00a9-fe0f.png"], wanted)
  assert fluent == {(0x2764,): "2764-fe0f.webp", (0xA9,): "a9.webp"}
  assert noto == {(0x2764,): "2764-fe0f.png", (0x1F34E,): "1f34e.png", (0xA9,): "00a9-fe0f.png"}


def test_drawings_of_another_origin_are_left_out():
  names = ["1f1eb-1f1f7", "1f468-200d-1f4bb", "1f4ce", "1f98a"]
  wanted = [code_points(name) for name in names]
  assert drawing_styles.match(FLUENT, [f"{name}.webp" for name in names], wanted) == {
    FOX: "1f98a.webp"
  }
  assert len(drawing_styles.match(NOTO, [f"{name}.png" for name in names], wanted)) == 4


@given(st.text(min_size=1), st.sets(st.sampled_from(NAMES), min_size=2))
def test_a_concept_is_held_out_in_no_style_in_one_or_in_all(concept, styles):
  held = {style for style in styles if drawing_styles.split_of(concept, style, styles) == "heldout"}
  assert len(held) in (0, 1, len(styles))


def test_shares_of_the_concepts_held_out_are_as_stated():
  counts = {0: 0, 1: 0, 3: 0}
  for i in range(4_000):
    splits = [drawing_styles.split_of(f"concept {i}", style, NAMES) for style in NAMES]
    counts[splits.count("heldout")] += 1
  assert counts[1] / 4_000 == pytest.approx(drawing_styles.HELD_IN_ONE_STYLE, abs=0.015)
  assert counts[3] / 4_000 == pytest.approx(drawing_styles.HELD_IN_ALL_STYLES, abs=0.015)


def test_a_concept_of_one_style_is_never_held_out():
  assert all(
    drawing_styles.split_of(f"concept {i}", "openmoji", {"openmoji"}) == "train" for i in range(500)
  )


def test_pairs_have_style_concept_and_license():
  drawings = {APPLE: openmoji.Drawing("1F34E", "apple.svg", "red apple", "red apple")}
  found = {
    "openmoji": {APPLE: "openmoji/1F34E.png"},
    "noto": {APPLE: "noto/img/google/64/1f34e.png"},
  }
  pairs = drawing_styles.make_pairs(found, drawings, lambda path: photo(path.startswith("noto")))
  ours, noto = (make_record(RawPair, fields, "test") for fields in pairs)
  assert (ours.key, ours.group, ours.license) == (
    "openmoji/1F34E",
    "openmoji/red apple",
    "CC-BY-SA-4.0",
  )
  assert (noto.key, noto.group, noto.license) == ("noto/1F34E", "noto/red apple", "Apache-2.0")
  assert ours.caption == noto.caption == ours.concept == noto.concept == "red apple"
  assert noto.source == "https://www.npmjs.com/package/emoji-datasource-google/v/16.0.0"
  assert "Google" in noto.attribution


def test_without_npm_the_message_says_what_is_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(drawing_styles.shutil, "which", lambda name: None)
  with refused(drawing_styles.Skipped):
    drawing_styles.fetch(FLUENT, tmp_path / "fluent")


def fake_npm(monkeypatch, run):
  monkeypatch.setattr(drawing_styles.shutil, "which", lambda name: "/bin/npm")
  monkeypatch.setattr(drawing_styles.subprocess, "run", run)


def test_a_package_is_fetched_once_and_only_its_drawings_and_license_are_unpacked(
  tmp_path, monkeypatch
):
  calls = []

  def run(command, cwd, **_):
    calls.append(command)
    with tarfile.open(cwd / "noto.tgz", "w:gz") as tar:
      for name in ("LICENSE", "README.md", "img/google/64/1f34e.png", "img/google/sheets/64.png"):
        member = tarfile.TarInfo(f"package/{name}")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    return subprocess.CompletedProcess(command, 0, "noto.tgz\n", "")

  fake_npm(monkeypatch, run)
  for _ in range(2):
    drawing_styles.fetch(NOTO, tmp_path / "noto")
  files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
  assert files == ["noto/LICENSE", "noto/README.md", "noto/img/google/64/1f34e.png"]
  assert calls == [["/bin/npm", "pack", "--silent", "emoji-datasource-google@16.0.0"]]


def test_the_error_of_a_failed_fetch_has_the_words_of_npm(tmp_path, monkeypatch):
  fake_npm(
    monkeypatch, lambda command, **_: subprocess.CompletedProcess(command, 1, "", "npm error 404")
  )
  with refused(UserError):
    drawing_styles.fetch(NOTO, tmp_path / "noto")
  assert not (tmp_path / "noto").exists()
