import json
import re

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.commands import common, score
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from tests.data.stores import IMAGE_TOKENS
from tests.generation.run import SETTINGS, one_device, save_run
from tests.refusals import refused


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("run"))
  save_run(root)
  return root


@pytest.fixture
def run(workdir, monkeypatch):
  monkeypatch.setattr(common, "use_mesh", lambda settings: one_device())

  def call(documents, retrieve=None, **values):
    retrieve = retrieve and tuple(retrieve.split(","))
    asked = score.Flags(documents=str(documents), retrieve=retrieve, **values)
    score.main(SETTINGS, workdir, asked)

  return call


@pytest.fixture
def file(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  Image.fromarray(image).save(tmp_path / "a.png")
  lines = [
    {"text": "red apple"},
    {"key": "pair", "image": "a.png", "caption": "green apple"},
    {"segments": [{"text": "old house"}, {"image": "a.png"}, {"text": "new house"}]},
  ]
  path = tmp_path / "My docs.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  return path


def results(workdir, pattern):
  found = []
  for folder in sorted((workdir / "scores").glob(pattern)):
    lines = (folder / "scores.jsonl").read_text().splitlines()
    found.append((list(map(json.loads, lines)), read_json(folder / "summary.json")))
  return found


def test_a_file_is_scored_once(run, workdir, file, capsys):
  run(file)
  [(lines, summary)] = results(workdir, "my-docs-*")
  assert [line["key"] for line in lines] == ["My docs.jsonl/0", "pair", "My docs.jsonl/2"]
  assert [line["image"]["tokens"] for line in lines] == [0, IMAGE_TOKENS, IMAGE_TOKENS]
  assert (summary["step"], summary["retrieve"], summary["documents"]) == (7, 0, 3)
  # The last parameters are NaN, so finite scores must come from their average.
  assert summary["text"]["low"] < summary["text"]["bits"] < summary["text"]["high"]
  for modality in ("text", "image", "special"):
    total = sum(line[modality]["log_prob"] for line in lines)
    assert summary[modality]["log_prob"] == pytest.approx(total)
  assert summary["special"]["tokens"] == 1 + 2 + 3
  first, second = capsys.readouterr().out.splitlines()
  assert re.match(r"score: 3 documents; text: perplexity [\d.e+]+ \[.*\], [\d.]+ bits a to", first)
  assert second.startswith(f"score: each token is in {workdir / 'scores' / 'my-docs-'}")
  run(file)
  skipped, *same = capsys.readouterr().out.splitlines()
  assert skipped.endswith("finished already, skipped.")
  assert same == [first, second]
  file.write_text(file.read_text().replace("red", "blue"))
  run(file)
  assert "skipped" not in capsys.readouterr().out
  assert len(results(workdir, "my-docs-*")) == 2


def test_more_training_has_a_folder_of_its_own(run, workdir, file):
  run(file)
  before = len(results(workdir, "my-docs-*"))
  done = read_json(workdir / "train" / "done.json")
  for name in ("again", done["id"]):
    write_json(workdir / "train" / "done.json", {**done, "id": name})
    run(file)
    assert len(results(workdir, "my-docs-*")) == before + 1


def test_a_store_is_scored_after_neighbors(run, workdir):
  folder = workdir / "documents" / "heldout_pairs"
  run(folder)
  run(folder, "2")
  run(folder, "0")
  found = {summary["retrieve"]: lines for lines, summary in results(workdir, "heldout-pairs-*")}
  assert sorted(found) == [0, 2]
  assert [line["neighbors"] for line in found[0]] == [[]] * 5
  assert {len(line["neighbors"]) for line in found[2]} == {2}
  for alone, after in zip(found[0], found[2], strict=True):
    assert alone["tokens"] == after["tokens"]
    assert alone["image"]["log_prob"] != pytest.approx(after["image"]["log_prob"], rel=1e-3)


@pytest.mark.parametrize(
  ("documents", "retrieve", "fact"),
  [
    ("no.jsonl", None, "no.jsonl"),
    ("{file}", "65", "--retrieve"),
    ("{wrong}", None, "wrong.jsonl, line 1"),
  ],
)
def test_mistakes_end_the_command_before_any_work(
  run, workdir, file, tmp_path, documents, retrieve, fact
):
  wrong = tmp_path / "wrong.jsonl"
  wrong.write_text('{"text"\n')
  folders = sorted((workdir / "scores").glob("*"))
  with refused(UserError, fact):
    run(documents and documents.format(file=file, wrong=wrong), retrieve)
  assert sorted((workdir / "scores").glob("*")) == folders


def test_images_are_in_the_folder_of_the_file_unless_it_is_trusted(run, workdir, file, tmp_path):
  (tmp_path / "set").mkdir()
  path = tmp_path / "set" / "outside.jsonl"
  path.write_text('{"image": "../a.png", "caption": "green apple"}')
  with refused(UserError, "../a.png"):
    run(path)
  run(path, allow_outside=True)
  assert list((workdir / "scores").glob("outside-*"))
