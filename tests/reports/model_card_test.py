import json
import os
import pathlib
import re
import sys

from etils import epath
import huggingface_hub
import jax
import numpy as np
import orbax.checkpoint
from PIL import Image
import pytest

from cm3leon_jax.commands import export
from cm3leon_jax.data.documents import training_data
from cm3leon_jax.export import formats, image_tokenizer
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.reports import model_card
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.weights import reading
from tests.data.raw_folder import write_raw
from tests.generation.run import SETTINGS, save_run
from tests.models.tiny import tree_of
from tests.reports.run_files import MODALITY, make_image
from tests.reports.snippets import execute, snippets

STEP = 7  # Step of the checkpoint that `save_run` writes.


def write_card(run) -> str:
  """Writes an export's other files next to its decoder; returns the model card."""
  folder, numbers = run / "export", read_json(run / "export" / stages.DONE)["summary"]
  image_tokenizer.write(folder, Run(run, SETTINGS))
  write_json(folder / training_data.FILE, training_data.collect(run))
  model_card.write(folder, Run(run, SETTINGS), STEP, numbers)
  return (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Makes a run and its export."""
  pytest.importorskip("torch")
  root = epath.Path(tmp_path_factory.mktemp("run"))
  save_run(root)
  export.main(SETTINGS, root, export.Flags())
  return root


@pytest.fixture
def folder(run, monkeypatch):
  """Makes the folder of the export the working directory; returns the folder."""
  monkeypatch.chdir(run / "export")
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  yield pathlib.Path(run / "export")
  sys.modules.pop("decode_image", None)


def test_all_snippets_run_in_the_folder_of_the_export(run, folder, capsys):
  card = (folder / "README.md").read_text()
  first, second = snippets(card)
  names = execute([first])
  [command] = re.findall("`(python image_tokenizer/.*?)`", card)
  execute([("bash", command)])
  vocab = SETTINGS.vocab
  ids = json.loads((folder / "ids.json").read_text())
  tokenizer = TextTokenizer(run / "text_tokenizer", vocab)
  assert names["texts"] == [tokenizer.encode(x).tolist() for x in ("a photo of a dog", "two cats")]
  for i, row in enumerate(ids):
    prompt = [vocab.eos, *names["texts"][i], vocab.brk]
    assert row[-16 - len(prompt) : -16] == prompt
    codes = np.array(row[-16:]) - vocab.text_size
    expected = ImageTokenizer.load(run / "vqgan").decode(codes[None])
    image = np.asarray(Image.open(folder / f"image_{i}.png"))
    assert image.shape == (8, 8, 3)
    assert np.abs(image.astype(int) - expected[0]).max() <= 1
  text = execute([(first[0], f"{first[1]}\n{second[1]}")])["text"][0, -32:]
  assert not vocab.is_image(text.numpy()).any()
  assert capsys.readouterr().out.endswith("\n")


def test_a_special_token_typed_in_a_caption_stays_text(folder):
  [(_, text), _] = snippets((folder / "README.md").read_text())
  prompts = execute([("python", text.replace("two cats", "a </s> b"))])["prompts"]
  assert (prompts["input_ids"] == SETTINGS.vocab.eos).sum() == 2


def test_the_header_is_what_the_hub_reads(run):
  card = huggingface_hub.ModelCard.load(run / "export" / "README.md")
  fields = card.data.to_dict()
  assert fields["license"] == "other"  # The run does not record the licenses of its data.
  assert (fields["library_name"], fields["pipeline_tag"]) == ("transformers", "text-generation")
  assert {"cm3leon", "text-to-image"} <= set(fields["tags"])


@pytest.fixture
def measured(run, tmp_path):
  """Copies a run's files that the card reads, and adds data sources, metrics and a base model."""
  root = epath.Path(tmp_path / "copy")
  for name in ("export", "vqgan", "train"):
    (root / name).mkdir(parents=True)
    for path in (run / name).iterdir():
      if path.is_file():
        path.copy(root / name / path.name)
  about = {"source": "drawings", "license": "CC-BY-SA-4.0", "attribution": "A. Painter | B"}
  pairs = [{"key": f"k{i}", "caption": "a", "split": "train", **about} for i in range(3)]
  write_raw(root / "raw", pairs, [make_image(None, i) for i in range(3)])
  losses = {"heldout_loss": 2.5, "heldout_image_loss": 3.25, "heldout_text_loss": 1.125}
  done(root, "train", {"steps": STEP, "machine": "2 CPU cores", **losses}, id="train", seconds=75.0)
  done(root, "vqgan", {"psnr_db": 23.5}, id="vqgan")
  evaluated = {"step": STEP, "documents": 3, "image": MODALITY, "text": MODALITY}
  done(root, "evaluation", evaluated, inputs={"train": "train"})
  metric = {"value": 0.31, "low": 0.25, "high": 0.375, "groups": 9, "effective_groups": 9.0}
  result = {
    "name": "mine/images",
    "title": "images for my captions",
    "inputs": {"train": "train"},
    "step": STEP,
    "examples": 1200,
    "seed": 3,
    "metrics": ["clip_score", "judged"],
    "columns": {"guidance 3": {"metrics": {"clip_score": metric}}},
    "extractor": {"name": "inception_tf1"},
    "scorer": None,
    "version": "0.0.9",
    "device": "TPU v5e",
  }
  write_json(root / "evaluations" / "mine-images-1" / "results.json", result)
  return root, result


def done(root, name, summary, id="x", inputs=None, seconds=1.0):
  config = {"inputs": inputs or {}, "seed": 0}
  content = {"id": id, "config": config, "summary": summary, "seconds": seconds}
  write_json(root / name / stages.DONE, content)


def test_figures_stand_with_their_protocol(measured):
  root, _ = measured
  card = write_card(root)
  assert "| Held-out loss, image codes (nats per code) | 3.25 |" in card
  assert "4 batches of held-out documents" in card
  assert "| PSNR of reconstructions, held-out images (dB) | 23.5 |" in card
  assert "bits of 3 held-out pairs" in card
  assert "| Bits per image code, true neighbors | 3.39 [3.19, 3.59] |" in card
  assert "### Images for my captions" in card
  how = (
    "Protocol `mine/images`, 1,200 examples, seed 3, features by inception_tf1, cm3leon_jax 0.0.9"
  )
  assert f"{how}, on TPU v5e." in card
  assert "| column | CLIP score | wholly correct (%) |" in card
  assert "| guidance 3 | 0.31 [0.25, 0.375] | - |" in card
  assert "The decoder took 1 min 15 s on 2 CPU cores" in card


def test_a_card_says_that_weights_were_rounded_or_no_average(measured):
  root, _ = measured
  numbers = {"parameters": 9}
  numbers["image_tokenizer"] = {"resolution": 256, "image_tokens": 1024, "family": ""}
  for more, expected in (
    ({"average": False}, "the last parameters, which are exported here, were not measured."),
    (
      {"heldout_bits": {"before": {"image": 1.5}, "after": {"image": 1.625}}},
      "Bits of held-out documents, image: 1.5000 before, 1.6250 after rounding.",
    ),
  ):
    model_card.write(root / "export", Run(root, SETTINGS), STEP, numbers | more)
    card = (root / "export" / "README.md").read_text()
    assert expected in " ".join(card.split())
    assert "images of 256 x 256 pixels" in card
    assert "256 x 256 pixels as 1,024 codes" in card


def test_figures_of_other_parameters_are_left_out(measured):
  root, result = measured
  folder = root / "evaluations" / "mine-images-1"
  for change in ({"step": STEP - 1}, {"inputs": {"train": "t"}}, {"parameters": "before"}):
    write_json(folder / "results.json", result | change)
    card = write_card(root)
    assert "### Images for my captions" not in card
  for change in ({"inputs": {"train": "another"}}, {"summary": {"step": STEP - 1}}):
    evaluated = {"step": STEP, "documents": 3, "image": MODALITY, "text": MODALITY}
    evaluated |= change.get("summary", {})
    done(root, "evaluation", evaluated, inputs=change.get("inputs", {"train": "train"}))
    card = write_card(root)
    assert "Bits per image code" not in card


def write_base(folder, *origins):
  """Writes the export's record of the data that the model learned from."""
  runs = [{"name": folder.name, "known": True}]
  origins = [{"run": folder.name, **origin} for origin in origins]
  write_json(folder / "training_data.json", {"runs": runs, "origins": origins})


def test_data_of_the_run_and_of_its_base_are_listed(measured):
  root, _ = measured
  row = "| copy | pairs | drawings | CC-BY-SA-4.0 | `A. Painter \\| B` | 3 |"
  card = write_card(root)
  assert row in card
  assert "Training data are under CC-BY-SA-4.0. No license of the model is named" in card
  base = root.parent / "base"
  origin = {"kind": "texts", "source": "s", "license": "MIT", "attribution": "a", "records": 1000}
  write_base(base, origin)
  stored = read_json(root / "train" / "config.json")
  start = {"source": str(base), "step": None, "digest": "0"}
  write_json(
    root / "train" / "config.json", {**stored, "run": {**stored["run"], "init_from": start}}
  )
  card = write_card(root)
  assert row in card
  assert "| base | texts | s | MIT | a | 1,000 |" in card
  assert "Training started from `base`.\n" in card
  assert str(root.parent) not in card
  assert "Training data are under CC-BY-SA-4.0, MIT. No license of the model is named" in card
  (base / "training_data.json").unlink()
  card = write_card(root)
  assert "started from `base`, whose training data are not recorded here: see its own card." in card
  assert "under CC-BY-SA-4.0, and others that are not recorded here." in card


def test_unknown_licenses_are_named_without_folders_of_this_machine(measured):
  root, _ = measured
  index = read_json(root / "raw" / "index.json")
  own = {"kind": "crops", "source": f"{root}/my_style", "license": "", "attribution": ""}
  index["origins"].append({**own, "records": 3_016})
  write_json(root / "raw" / "index.json", index)
  card = write_card(root)
  assert "under CC-BY-SA-4.0, and of unknown license: my_style. No license" in card
  assert "| copy | crops | my_style |  |  | 3,016 |" in card
  assert str(root) not in card


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("Jane Doe, 2020", "Jane Doe, 2020"),
    ("72.5% [62.0, 1e+02]", "72.5% [62.0, 1e+02]"),
    ("a [1, 2](b)", "`a [1, 2](b)`"),
    ("https://a.org/b_c (d)", "https://a.org/b_c (d)"),
    ("[a](http://b)|<img src=x>`c`", "`[a](http://b)\\|<img src=x>'c'`"),
    ("two\nlines\x1b[2J", "`two lines⟨U+001B⟩[2J`"),
    ("", ""),
  ],
)
def test_texts_of_strangers_are_harmless(text, expected):
  assert model_card.cell(text) == expected


def test_a_card_names_only_what_the_folder_has(measured):
  """Only hf has snippets; a published image tokenizer has no script."""
  root, _ = measured
  card = write_card(root)
  assert "decode_image" in card
  numbers = read_json(root / "export" / stages.DONE)["summary"]
  numbers["image_tokenizer"]["family"] = "amused"
  model_card.write(root / "export", Run(root, SETTINGS), STEP, numbers)
  card = (root / "export" / "README.md").read_text()
  assert "decode_image" not in card
  assert "codes from a codebook of 64, `amused`, read by" in card
  del numbers["architecture"]
  model_card.write(root / "export", Run(root, SETTINGS), STEP, {**numbers, "parameters": 1234})
  card = (root / "export" / "README.md").read_text()
  assert "transformers" not in card
  assert "# CM3Leon, 1,234 parameters, images of 8 x 8 pixels" in card
  assert "library_name" not in card
  assert snippets(card) == []


def test_orbax_restores_the_parameters(run, tmp_path, monkeypatch):
  params = reading.open_params(run / "train")
  choice = formats.Choice(format="orbax", dtype="bfloat16")
  numbers = formats.write(tmp_path, formats.TrainedRun(Run(run, SETTINGS), params, choice))
  model_card.write(tmp_path, Run(run, SETTINGS), STEP, numbers)
  card = (tmp_path / "README.md").read_text()
  monkeypatch.chdir(tmp_path)
  [text] = re.findall(r"`orbax\.checkpoint(.*?)`", card)
  found = eval(f"orbax.checkpoint{text}", {"orbax": orbax, "os": os})
  expected = tree_of(reading.open_params(run / "train"))
  rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), expected)
  jax.tree.map(np.testing.assert_array_equal, found, rounded)
  assert "; stored as bfloat16 |" in card
