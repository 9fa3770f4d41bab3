import dataclasses
import json
import pathlib

from absl import flags
from absl.testing import flagsaver
from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import CM3Leon
from cm3leon_jax.checkpoints import reading
from cm3leon_jax.commands import common, evaluate
from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Document, DocumentStore, Segment, write_documents
from cm3leon_jax.evaluation import strata
from cm3leon_jax.export import bundle
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.scenes import source as scenes_source
from cm3leon_jax.scenes.config import ScenesConfig
from cm3leon_jax.scenes.interface import WORLD
from cm3leon_jax.scenes.judge import samples, sheet
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.trained import bundles
from cm3leon_jax.trained.run import Run
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device, save_run
from tests.refusals import refused
from tests.retrieval.stores import write_neighbors

NUM_SCENES = 24


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
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

  def call(settings, **values):
    with flagsaver.flagsaver(**values):
      evaluate.main(settings, made)

  return call


def pixels_of(path):
  with Image.open(path) as image:
    return np.asarray(image)


def facts_of(workdir):
  store = DocumentStore(workdir / "documents" / "heldout_pairs", VOCAB)
  return [store[i].facts for i in range(len(store))]


def test_scenes_are_generated_judged_and_written(made, run, capsys):
  settings = settings_of(scenes=10, scene_guidance=(1.0, 2.5))
  run(settings)
  folder = made / "evaluation"
  result = read_json(folder / "scenes.json")
  titles = ["real images", "reconstructions", "guidance 1", "guidance 2.5"]
  assert list(result["tables"]) == titles
  assert result["judge"]["real"] == 1
  assert result["tables"]["real images"]["all"]["correct"]["share"] == 1
  assert result["tables"]["guidance 1"]["all"]["correct"]["share"] == 0
  assert all(table["all"]["images"] == 10 for table in result["tables"].values())
  lines = read_json_lines(folder / "scenes_results.jsonl")
  assert [line["guidance"] for line in lines] == [1.0] * 10 + [2.5] * 10
  first = lines[0]
  assert pixels_of(folder / first["filename"]).shape == (8, 8, 3)
  known = {(fact["tag"], json.dumps(fact["include"])) for fact in facts_of(made)}
  metadata = json.loads(first["metadata"])
  assert (metadata["tag"], json.dumps(metadata["include"])) in known
  assert metadata["prompt"] == first["prompt"]
  assert pixels_of(folder / "scenes.png").shape[1] > 400
  assert result["gain"]["title"] == "guidance 2.5"
  assert result["gain"]["share"] == 0
  summary = read_json(folder / "metrics.json")
  # Both columns have the same result; the first is the best.
  assert summary["scenes"]["best"]["title"] == "guidance 1"
  assert summary["scenes"]["best"]["correct"]["groups"] == 10
  assert summary["scenes"]["real images"]["correct"] == 1
  assert summary["documents"] == 4
  printed = capsys.readouterr().out
  assert "guidance 2.5: 10 images" in printed
  assert "guidance 2.5 minus guidance 1: 0.0%" in printed
  run(settings)
  assert "finished already, skipped" in capsys.readouterr().out
  warmer = dataclasses.replace(settings.sampling, temperature=0.5)
  run(dataclasses.replace(settings, sampling=warmer))  # A changed temperature needs new samples.
  assert "skipped" not in capsys.readouterr().out


def test_scenes_are_spread_over_categories_and_kinds_by_the_seed(made):
  facts = facts_of(made)
  chosen = strata.choose(facts, 12, seed=0)
  assert len(set(chosen)) == 12
  groups = {(facts[i]["tag"], facts[i]["heldout"]) for i in chosen}
  assert len(groups) == 12
  assert strata.choose(facts, 12, seed=0) == chosen
  assert strata.choose(facts, 12, seed=1) != chosen
  assert strata.choose(facts, 14, seed=0)[:12] == chosen
  assert sorted(strata.choose(facts, NUM_SCENES, 0)) == list(range(NUM_SCENES))
  with refused(UserError, "config.evaluation.scenes", "config.raw.source"):
    strata.choose(facts, 25, seed=0)
  with refused(UserError, "config.evaluation.scenes", "config.raw.source"):
    strata.choose([{}, {}], 1, seed=0)


def test_too_many_scenes_end_the_command_before_anything_is_measured(made, run, capsys):
  (made / "evaluation").rmtree(missing_ok=True)
  with refused(UserError, "config.evaluation.scenes", "config.raw.source"):
    run(settings_of(scenes=25))
  assert "bits per image code" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def bundled(made):
  """Makes a bundle of `made` without its bank, like the bundled models of the package."""
  folder = made.parent / "bundled"
  cost = {"train_seconds": 60.0, "other_seconds": 7.0, "machine": "1 CPU core"}
  with one_device():
    params, step = reading.load_params(made / "train", SETTINGS.model)
    bundle.write(folder, Run(made, SETTINGS), params, step, cost)
  return folder


def of_source(source, **fields):
  settings = settings_of(**fields)
  return dataclasses.replace(settings, raw=dataclasses.replace(settings.raw, source=source))


@pytest.mark.slow
def test_the_bundled_model_gets_the_captions_of_the_sheet(made, bundled, run, monkeypatch, capsys):
  monkeypatch.setattr(WORLD, "bundled", str(bundled))
  shown, render = [], sheet.render
  monkeypatch.setattr(sheet, "render", lambda scenes: shown.extend(scenes) or render(scenes))
  (made / "evaluation").rmtree(missing_ok=True)
  settings = of_source("scenes", scenes=14, scene_guidance=(1.0, 2.0))
  run(settings)
  titles = ["guidance 1", "guidance 2", "bundled model"]
  assert len(shown) == 12
  assert all(list(scene.samples) == titles for scene in shown)
  model = CM3Leon.load(bundled, batch_size=12)
  expected = model.generate([scene.caption for scene in shown], seed=SETTINGS.seed)
  for scene, [sample] in zip(shown, expected):
    np.testing.assert_array_equal(scene.samples["bundled model"][0], np.asarray(sample.image))
    assert sample.neighbors == ()
  found = read_json(made / "evaluation" / "metrics.json")["scenes"]["bundled"]
  with one_device():
    params, _ = reading.load_params(made / "train", SETTINGS.model)
  assert found.pop("parameters") == sum(x.size for x in jax.tree.leaves(params))
  size = sum(path.stat().st_size for path in pathlib.Path(bundled).rglob("*") if path.is_file())
  assert found.pop("bytes") == size - (bundled / bundles.FILE).stat().length
  assert found == {
    "images": 12,
    "right": dict.fromkeys(titles, 0),
    "guidance": SETTINGS.sampling.guidance,
    "neighbors": 0,
    "step": 7,
    "training_scenes": SETTINGS.scenes.train,
    "cost": {"train_seconds": 60.0, "other_seconds": 7.0, "machine": "1 CPU core"},
  }
  assert "correct of the 12 images on the sheet: guidance 1 0, guidance 2 0" in (
    capsys.readouterr().out
  )
  run(settings)
  assert "skipped" in capsys.readouterr().out
  store = DocumentStore(made / "documents" / "heldout_pairs", VOCAB)
  decode = TextTokenizer(made / "text_tokenizer", VOCAB).decode
  real = {
    decode(document.segments[0].tokens): samples.real_image(document.facts)
    for document in (store[i] for i in range(len(store)))
  }
  monkeypatch.setattr(evaluate, "_images_of", lambda model, seed, texts: [real[t] for t in texts])
  (bundled / bundles.FILE).write_text((bundled / bundles.FILE).read_text() + " ")
  run(settings)  # Repeats the evaluation, because a file of the bundled model changed.
  found = read_json(made / "evaluation" / "metrics.json")["scenes"]["bundled"]
  assert found["right"] == {"guidance 1": 0, "guidance 2": 0, "bundled model": 12}


@pytest.mark.slow
def test_a_run_of_another_source_loads_no_bundled_model(made, run, monkeypatch):
  monkeypatch.setattr(WORLD, "bundled", str(made / "absent"))
  (made / "evaluation").rmtree(missing_ok=True)
  run(of_source("folder/of/own", scenes=10))
  assert "bundled" not in read_json(made / "evaluation" / "metrics.json")["scenes"]


PROMPTS = [
  {"tag": "colors", "include": [{"class": "bird", "count": 1, "color": "red"}], "prompt": "a bird"},
  {"prompt": "two cars", "atom_count": 2, "vqa_list": [["How many?", "two"]], "skills": ["count"]},
]


def test_an_export_has_the_folders_of_geneval_and_the_paths_of_geneval_2(made, run, tmp_path):
  path = tmp_path / "My prompts.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
  run(settings_of(), export="geneval", prompts=str(path))
  (folder,) = (made / "geneval").glob("my-prompts-*")
  found = []
  # Reads the folder in the same way as GenEval's evaluate_images.py.
  for sub in sorted(x for x in folder.iterdir() if x.is_dir() and x.name.isdigit()):
    metadata = json.loads((sub / "metadata.jsonl").read_text())
    images = sorted(x.name for x in (sub / "samples").iterdir())
    assert images == ["0000.png", "0001.png", "0002.png", "0003.png"]
    pixels = [pixels_of(sub / "samples" / name) for name in images]
    assert pixels[0].shape == (8, 8, 3)
    assert any((pixels[0] != other).any() for other in pixels[1:])
    found.append(metadata)
  assert found == PROMPTS
  paths = read_json(folder / "image_paths.json")  # GenEval 2 reads a map from prompts to images.
  assert list(paths) == ["a bird", "two cars"]
  assert paths["two cars"] == str(folder / "00001" / "samples" / "0000.png")


def test_an_export_without_prompts_has_the_heldout_scenes(made, run, capsys):
  run(settings_of(scenes=3), export="geneval", samples=1)
  (folder,) = (made / "geneval").glob("heldout-*")
  found = [json.loads((folder / f"{i:05d}" / "metadata.jsonl").read_text()) for i in range(3)]
  chosen = strata.choose(facts_of(made), 3, seed=0)
  assert [x["include"] for x in found] == [facts_of(made)[i]["include"] for i in chosen]
  assert all(list(x) == ["tag", "include", "exclude", "prompt"] for x in found)
  assert [x.name for x in (folder / "00002" / "samples").iterdir()] == ["0000.png"]
  capsys.readouterr()
  run(settings_of(scenes=3), export="geneval", samples=1)
  assert "finished already, skipped" in capsys.readouterr().out


def test_mistakes_in_prompts_are_named(run, tmp_path):
  with refused(UserError, "--prompts", "--export"):
    run(settings_of(), prompts="p.jsonl")
  with refused(UserError, "--samples", "--export"):
    run(settings_of(), samples=2)
  path = tmp_path / "p.jsonl"
  for text, fact in (
    (None, "not exist"),
    ("\n", "empty"),
    ('{"prompt": "a"}\n{', "line 2"),
    ('{"tag": "colors"}', "line 1"),
    ('["a"]', "line 1"),
    (json.dumps({"prompt": "word " * 300}), "prompt 1"),
  ):
    if text is not None:
      path.write_text(text)
    with refused(UserError, "p.jsonl", fact):
      run(settings_of(), export="geneval", prompts=str(path))
