import dataclasses
import json
import pathlib
import re
import shutil
from typing import get_args

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.commands import common, drawing, explain, generate, shared_flags
from cm3leon_jax.data.documents.store import DocumentStore, write_documents
from cm3leon_jax.decoding import cache, params
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import bundle
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.generation import prompt_file
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.text_tasks import Question
from cm3leon_jax.reports import summary
from cm3leon_jax.retrieval import removed
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages, table
from cm3leon_jax.weights import reading
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, clip_params, make_run, one_device
from tests.models.tiny import random_params
from tests.refusals import refused


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("run"))
  make_run(root)
  clip_lib.CLIP(SETTINGS.clip, VOCAB.text_size, clip_params()).save(root / "clip")
  for name in ("text_tokenizer", "vqgan", "documents", "neighbors", "clip", "train"):
    write_json(root / name / stages.DONE, {"id": name, "config": {}, "summary": {}, "seconds": 1.0})
  stored = {"run": table.identity(SETTINGS, "train"), "settings": dataclasses.asdict(SETTINGS)}
  write_json(root / "train" / "config.json", stored)
  return root


@pytest.fixture
def run(workdir, monkeypatch):
  monkeypatch.setattr(common, "use_mesh", lambda settings: one_device())
  monkeypatch.setattr(reading, "load_params", lambda folder, config, *_: (random_params(config), 7))

  def call(folder=workdir, command=generate, **values):
    command.main(SETTINGS, folder, command.Flags(**values))

  return call


@pytest.fixture
def image_file(tmp_path):
  path = tmp_path / "a.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
  return str(path)


def read_lines(folder):
  return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_heldout_captions_go_to_samples(run, workdir, capsys):
  run(captions=2, guidance=["1", "3"], retrieve=["0"])
  records = read_lines(workdir / "samples")
  assert [(r["prompt"], r["guidance"]) for r in records] == [
    (p, g) for g in (1.0, 3.0) for p in ("red apple", "new house")
  ]
  scores = summary.collect(workdir)["samples"]["clip_score"]
  columns = [(row["guidance"], row["retrieve"], row["samples"]) for row in scores]
  assert columns == [(1.0, 0, 2), (3.0, 0, 2)]
  out = capsys.readouterr().out
  assert [record["concept"] for record in records] == ["apple", "house"] * 2
  score = r"CLIP score -?0\.\d{3} \[.*\], 2 samples of 2 con"
  assert re.search(f"guidance 3, 0 retrieved: {score}", out)
  assert f"generate: results in {workdir / 'samples'}, overview in " in out
  run(captions=2, guidance=["1", "3"], retrieve=["0"])
  assert "finished already, skipped" in capsys.readouterr().out
  with refused(UserError, "--workdir", "1"):
    run(captions=2, guidance=["1", "3"], retrieve=["0"], samples=2)


def test_a_run_without_documents_retrieves_from_the_given_bank(run, workdir, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(workdir, other)
  inputs = {name: name for name in ("text_tokenizer", "vqgan", "clip")}
  built = {"inputs": inputs, "retrieval": {"clip": SETTINGS.retrieval.clip}}
  for name in ("documents", "neighbors"):
    about = {"id": name, "config": built, "summary": {}, "seconds": 1.0}
    write_json(other / name / stages.DONE, about)
  (workdir / "documents").rename(workdir / "hidden")
  try:
    run(prompt=["red house"], bank=str(other))
  finally:
    (workdir / "hidden").rename(workdir / "documents")
  [folder] = (workdir / "prompts").glob("red-house-*")
  assert read_lines(folder)[0]["retrieve"] == SETTINGS.data.num_neighbors > 0


@pytest.fixture
def bundled(run, workdir, tmp_path):
  """Returns a bundle of a run that retrieves from the split `bank`, with five documents."""
  copied, folder = epath.Path(tmp_path / "copied"), epath.Path(tmp_path / "bundle")
  shutil.copytree(workdir, copied)
  store = DocumentStore(copied / "documents" / "train_pairs", VOCAB)
  documents = [store[i] for i in range(len(store) - 5, len(store))]
  write_documents(copied / "documents" / "bank_pairs", documents, VOCAB)
  write_json(copied / "neighbors" / "train" / "rows.json", {"first_bank": len(store) - 5})
  retrieval = dataclasses.replace(SETTINGS.retrieval, train_documents=False)
  settings = dataclasses.replace(SETTINGS, retrieval=retrieval)
  with one_device():
    bundle.write(folder, Run(copied, settings), random_params(SETTINGS.model), 7)
  return folder


def test_a_run_that_started_from_a_bundle_retrieves_from_it(run, workdir, bundled, tmp_path):
  started = epath.Path(tmp_path / "started")
  shutil.copytree(workdir, started, ignore=lambda *_: ["documents", "neighbors", "prompts"])
  for name in ("text_tokenizer", "vqgan", "clip"):
    shutil.copytree(bundled / name, started / name, dirs_exist_ok=True)
    id_ = stages.id_of(stages.describe_files(started / name, table.STAGES[name].files))
    write_json(started / name / stages.DONE, {"id": id_, "config": {}, "summary": {}})
  run(started, prompt=["red house"], bank=str(bundled))
  [folder] = (started / "prompts").glob("red-house-*")
  [first] = read_lines(folder)
  assert first["retrieve"] == len(first["neighbors"]) == SETTINGS.data.num_neighbors > 0


def test_the_bank_of_a_bundle_with_other_tokenizers_is_refused(run, bundled):
  with refused(UserError, "--bank", "different"):
    run(prompt=["red house"], bank=str(bundled))


def test_a_bundle_without_documents_is_no_bank(run, workdir, tmp_path):
  folder = tmp_path / "bundle"
  with one_device():
    bundle.write(epath.Path(folder), Run(workdir, SETTINGS), random_params(SETTINGS.model), 7)
  with refused(UserError, "--bank", "without"):
    run(prompt=["red house"], bank=str(folder))


def test_explanations_and_samples_without_a_document(run, workdir, tmp_path, capsys):
  asked = {"prompt": ["green car"], "retrieve": ["2"], "samples": 2, "batch_size": 4}
  run(command=explain, **asked, out=str(tmp_path))
  [folder] = (tmp_path / "prompts").iterdir()
  records, out = read_lines(folder), capsys.readouterr().out
  found = records[0]["neighbors"]
  for record in records:
    name = record["file"].replace(".png", "_explained.png")
    with Image.open(folder / name) as image:
      assert image.width > 3 * 128
    assert out.count(f"{name}: ") == 2
  assert all(f" · {x['key']} · {x['source']} · {x['license']}" in out for x in found)
  run(command=explain, **asked, without=[found[0]["key"]], out=str(tmp_path))
  [other] = set((tmp_path / "prompts").iterdir()) - {folder}
  after, out = read_lines(other), capsys.readouterr().out
  assert [r["seed"] for r in after] == [r["seed"] for r in records]
  assert all(found[0]["key"] not in [n["key"] for n in r["neighbors"]] for r in after)
  changed = [a["seed"] for a, b in zip(after, records) if a["tokens"] != b["tokens"]]
  assert f"explain: without {found[0]['key']}, {len(changed)} of 2 samples change:\n" in out
  counts = [np.not_equal(a["tokens"], b["tokens"]).sum() for a, b in zip(after, records)]
  listed = re.findall(r"\n  green car, sample \d, seed (\d+): (\d+) of 17 tokens", out)
  assert [(int(seed), int(count)) for seed, count in listed] == [
    *zip(changed, filter(None, counts), strict=True)
  ]


def test_a_removed_document_changes_the_folder_and_the_neighbors(run, workdir, tmp_path):
  root = epath.Path(tmp_path) / "run"
  shutil.copytree(workdir, root)
  asked = {"prompt": ["green car"], "retrieve": ["1"], "out": str(tmp_path)}
  run(root, **asked)
  [folder] = (tmp_path / "prompts").iterdir()
  key = read_lines(folder)[0]["neighbors"][0]["key"]
  removed.remove(root / "neighbors", [key])
  run(root, **asked)
  [other] = set((tmp_path / "prompts").iterdir()) - {folder}
  [neighbor] = read_lines(other)[0]["neighbors"]
  assert neighbor["key"] != key


WITHOUT_DOCUMENTS = [
  ({"retrieve": ["0"]}, "set retrieve."),
  ({"without": ["x"], "retrieve": ["1"]}, "'x' is not in the bank"),
]


@pytest.mark.parametrize(("values", "fact"), WITHOUT_DOCUMENTS)
def test_nothing_to_explain_is_one_sentence(run, monkeypatch, values, fact):
  monkeypatch.setattr(Run, "params", None)  # Nothing is loaded.
  with refused(UserError, fact):
    run(command=explain, prompt=["green car"], **values)


def test_a_file_of_prompts(run, workdir, image_file, tmp_path, capsys):
  lines = [{"prompt": "red apple", "retrieve": 0}]
  lines += [{"task": "caption", "image": "a.png", "length": 5}]
  (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  run(prompts=str(tmp_path / "mine.jsonl"), seed=3)
  (folder,) = (workdir / "prompts").glob("mine-*")
  image, caption = read_lines(folder)
  assert (image["task"], image["seed"]) == ("text_to_image", 3)
  assert (caption["task"], caption["seed"], caption["image"]) == ("caption", 4, image_file)
  assert f"{image_file}: " in capsys.readouterr().out
  # Finds the finished samples although the prompt file was renamed.
  (tmp_path / "mine.jsonl").rename(tmp_path / "renamed.jsonl")
  run(prompts=str(tmp_path / "renamed.jsonl"), seed=3)
  assert f"{folder}: finished already, skipped." in capsys.readouterr().out
  assert not list((workdir / "prompts").glob("renamed-*"))
  # A file of the same name with other pixels is another input.
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image_file)
  run(prompts=str(tmp_path / "renamed.jsonl"), seed=3)
  assert len(list((workdir / "prompts").glob("renamed-*"))) == 1


def test_images_of_a_file_of_prompts_are_in_its_folder(run, workdir, image_file, tmp_path):
  (tmp_path / "set").mkdir()
  path = tmp_path / "set" / "outside.jsonl"
  path.write_text('{"task": "caption", "image": "../a.png", "length": 5}')
  with refused(UserError, "--allow_outside", "allow_outside"):
    run(prompts=str(path))
  run(prompts=str(path), allow_outside=True)
  (folder,) = (workdir / "prompts").glob("outside-*")
  (caption,) = read_lines(folder)
  assert pathlib.Path(caption["image"]).samefile(image_file)


def test_prompts_without_a_known_word_are_named(capsys):
  trained = Run.open("scenes")
  asked = [TextToImage(prompt) for prompt in ("zxqv кот", "a qwfp bell", "🐱")]
  drawing._warn_of_unknown_words(trained, [*asked, Question(prompt="what?", image="a.png")])
  printed = capsys.readouterr().out
  assert printed.startswith("warning: ")
  assert printed.endswith(": zxqv кот; 🐱.\n")
  drawing._warn_of_unknown_words(trained, asked[1:2])
  assert not capsys.readouterr().out


MISTAKES = [  # The values of the flags, and a fact of the sentence.
  ({"task": "caption", "image": ["a.png"], "guidance": ["3"]}, "--guidance is given"),
  ({"task": "caption", "image": ["a.png"], "sampling": {"temperature": 0.5}}, "text_temperature"),
  ({"prompt": ["a"], "sampling": {"contrastive_k": 3}}, "--contrastive_k is given"),
  ({"task": "infill_text", "prompt": ["<mask>"], "retrieve": ["0", "1"]}, "--retrieve"),
  ({"prompts": "a.jsonl", "prompt": ["b"]}, "--prompts and --prompt"),
  ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
  ({"prompt": ["a"], "bank": "elsewhere"}, "elsewhere"),
  ({"task": "infill_image", "image": ["a.png"], "box": ["0", "x"]}, "--box is '0,x'"),
  ({"task": "infill_image", "image": ["a.png"], "box": ["0", "0", "9", "2"]}, "0,0,9,2"),
  ({"task": "question", "image": ["nowhere.png"], "prompt": ["a"], "length": 9}, "nowhere.png"),
  ({"prompt": ["car " * 200], "retrieve": ["0"]}, "203 tokens"),
]


@pytest.mark.parametrize(("values", "fact"), MISTAKES)
def test_a_mistake_ends_the_command_before_any_work(run, workdir, values, fact, monkeypatch):
  monkeypatch.setattr(Pipeline, "generate", None)
  monkeypatch.setattr(reading, "load_params", None)
  before = sorted(workdir.glob("*/*"))
  with refused(UserError, fact):
    run(**values)
  assert sorted(workdir.glob("*/*")) == before


def test_flags_of_generate_name_the_dtypes_and_tasks_that_there_are():
  assert {cls.name: cls.required for cls in prompt_file.TASKS} == generate.TASKS
  assert cache.DTYPES == params.DTYPES == get_args(shared_flags.Dtype)
