import dataclasses
import json

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import CM3Leon
from cm3leon_jax.commands import common, evaluate
from cm3leon_jax.config import own_functions
from cm3leon_jax.data.documents.store import Document, DocumentStore, Segment, write_documents
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import judged
from cm3leon_jax.export import bundle
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import from_data
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.weights import reading
from examples.scenes import evaluate as scenes
from examples.scenes import source as scenes_source
from examples.scenes.judge.baselines import TrainingScenes
from examples.scenes.options import ScenesConfig
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device, save_run
from tests.refusals import refused
from tests.retrieval.stores import write_neighbors

NUM_SCENES = 24


JUDGE = """
def white(image, facts):
  assert image.shape == (8, 8, 3)
  return "" if facts["tag"] == "colors" else "no color"
"""


def settings_of(**fields):
  # All images fit into one batch of 16 rows, as in the bundled model.
  evaluation = {"num_documents": 4, "num_resamples": 100, "batch_size": 16, **fields}
  return dataclasses.replace(
    SETTINGS, evaluation=dataclasses.replace(SETTINGS.evaluation, **evaluation)
  )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Makes a finished run with random weights; held-out documents are scenes with random codes."""
  root = epath.Path(tmp_path_factory.mktemp("run"))
  save_run(root)
  encode, rng = TextTokenizer(root / "text_tokenizer", VOCAB).encode, np.random.default_rng(0)
  config, documents = ScenesConfig(train=10, heldout=NUM_SCENES), []
  for i in range(NUM_SCENES):
    pair = scenes_source.pair(config, "heldout", i)
    codes = VOCAB.image_ids(rng.integers(0, VOCAB.image_size, 16))
    segments = (Segment(False, encode(pair.caption)), Segment(True, codes))
    names = ("key", "source", "license", "attribution", "group", "concept", "facts")
    fields = {name: getattr(pair, name) for name in names}
    documents.append(Document(segments=segments, **fields))
  write_documents(root / "documents" / "heldout_pairs", documents, VOCAB)
  ids = np.stack([rng.permutation(12)[:4] for _ in documents]).astype(np.int32)
  (root / "neighbors" / "heldout_pairs").rmtree()
  write_neighbors(root / "neighbors" / "heldout_pairs", text_ids=ids)
  return root


@pytest.fixture
def run(made, monkeypatch):
  monkeypatch.setattr(common, "use_mesh", lambda settings: one_device())

  def call(settings, **values):
    evaluate.main(settings, made, evaluate.Flags(**values))

  return call


def pixels_of(path):
  with Image.open(path) as image:
    return np.asarray(image)


def facts_of(workdir):
  store = DocumentStore(workdir / "documents" / "heldout_pairs", VOCAB)
  return [store[i].facts for i in range(len(store))]


@pytest.fixture
def judge(tmp_path):
  (tmp_path / "own.py").write_text(JUDGE)
  return f"{tmp_path}/own.py:white"


def test_images_are_generated_judged_and_written(made, run, judge, capsys):
  settings = settings_of(captions=10, guidance=(1.0, 2.5), judge=judge)
  run(settings)
  folder = made / "evaluation"
  lines = read_json_lines(folder / "judged.jsonl")
  titles = ["reconstructions", "guidance 1", "guidance 2.5"]
  assert [line["title"] for line in lines] == [title for title in titles for _ in range(10)]
  for line in lines:
    assert line["correct"] == (line["reason"] == "") == (line["facts"]["tag"] == "colors")
    assert pixels_of(folder / line["file"]).shape == (8, 8, 3)
  known = [json.dumps(fact) for fact in facts_of(made)]
  assert all(json.dumps(line["facts"]) in known for line in lines)
  sheet = pixels_of(folder / "judged.png").reshape(-1, 3)
  framed = [(sheet == color).all(1).sum() for color in (judged.RIGHT, judged.WRONG)]
  right = sum(line["correct"] for line in lines[10:])  # All captions are on the sheet.
  assert framed[0] * (20 - right) == framed[1] * right > 0
  summary = read_json(folder / "metrics.json")
  result = summary["judged"]
  assert summary["documents"] == 4
  assert list(result["tables"]) == titles
  colors = sum(line["correct"] for line in lines[:10])
  for table in result["tables"].values():
    assert table["all"]["images"] == table["all"]["correct"]["groups"] == 10
    assert table["all"]["correct"]["share"] == colors / 10
    assert table["colors"]["correct"]["share"] == 1
    assert table["counting"]["correct"]["share"] == 0
    assert table["held-out: scene"]["images"] == sum(
      line["facts"]["heldout"] == "scene" for line in lines[:10]
    )
  assert result["best"] == "guidance 1"  # Both weights have the same result; the first is best.
  assert "guidance 2.5: 10 images, " in capsys.readouterr().out
  run(settings)
  assert "finished already, skipped" in capsys.readouterr().out
  warmer = dataclasses.replace(settings.sampling, temperature=0.5)
  run(dataclasses.replace(settings, sampling=warmer))  # A changed temperature needs new samples.
  assert "skipped" not in capsys.readouterr().out
  scenes.evaluate(folder, TrainingScenes(()), 100, 0)  # The demo's script reads the results.
  tables = read_json(folder / "scenes.json")["tables"]
  assert list(tables) == ["real images", *titles]
  assert tables["real images"]["all"]["correct"]["share"] == 1
  assert tables["guidance 1"]["all"]["correct"]["share"] == 0
  results = read_json_lines(folder / "scenes_results.jsonl")
  assert [one["filename"] for one in results] == [line["file"] for line in lines]


def test_scenes_are_spread_over_categories_and_kinds_by_the_seed(made):
  facts = facts_of(made)
  chosen = judged.choose(facts, 12, seed=0)
  assert len(set(chosen)) == 12
  groups = {(facts[i]["tag"], facts[i]["heldout"]) for i in chosen}
  assert len(groups) == 12
  assert judged.choose(facts, 12, seed=0) == chosen
  assert judged.choose(facts, 12, seed=1) != chosen
  assert judged.choose(facts, 14, seed=0)[:12] == chosen
  assert sorted(judged.choose(facts, NUM_SCENES, 0)) == list(range(NUM_SCENES))
  with refused(UserError, "config.evaluation.captions", "facts"):
    judged.choose(facts, 25, seed=0)
  with refused(UserError, "config.evaluation.captions", "facts"):
    judged.choose([{}, {}], 1, seed=0)


def test_too_many_captions_end_the_command_before_anything_is_measured(made, run, judge, capsys):
  (made / "evaluation").rmtree(missing_ok=True)
  with refused(UserError, "config.evaluation.captions", "facts"):
    run(settings_of(captions=25, judge=judge))
  assert "bits per image code" not in capsys.readouterr().out


ATTACK = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
def judge(image, facts):
  return ""
"""


def test_only_the_config_of_the_command_names_a_judge(made, tmp_path, monkeypatch, capsys):
  """Otherwise measuring the run of a stranger would run the stranger's code."""
  (tmp_path / "own.py").write_text(ATTACK)
  stored = made / "train" / "config.json"
  before = stored.read_text()
  config = json.loads(before)
  evil = f"{tmp_path}/own.py:judge"
  config["settings"]["evaluation"] |= {"judge": evil, "captions": 3}
  config["settings"]["raw"]["source"] = config["settings"]["reinforce"]["reward"] = evil
  stored.write_text(json.dumps(config))
  try:
    with monkeypatch.context() as patch:
      patch.setattr(common, "_folder", lambda: made)
      settings = common._settings(None, optional=True, prepares=False, starts=False)
    with one_device():
      CM3Leon.load(made).generate("a bell", seed=0, retrieve=0)
      params, step = reading.load_params(made / "train", SETTINGS.model)
      bundle.write(tmp_path / "bundle", Run.open(made), params, step)
    bundled = tmp_path / "bundle" / "bundle.json"
    assert evil not in bundled.read_text()
    described = json.loads(bundled.read_text())
    described["settings"]["raw"]["source"] = described["settings"]["reinforce"]["reward"] = evil
    described["settings"]["evaluation"] |= {"judge": evil, "captions": 3}
    bundled.write_text(json.dumps(described))  # As a stranger can write it.
    CM3Leon.load(tmp_path / "bundle").generate("a bell", seed=0)
    stored_of_parent = config["settings"]
    fields = from_data.parent_fields(stored_of_parent, documents=True)
    assert not {"raw.source", "evaluation.judge", "reinforce.reward"} & fields.keys()
  finally:
    stored.write_text(before)
  assert settings.evaluation.judge == ""
  assert "is not imported" in capsys.readouterr().out
  assert not (tmp_path / "imported").exists()
  own_functions.load(evil, "evaluation.judge")  # Negative control.
  assert (tmp_path / "imported").exists()
