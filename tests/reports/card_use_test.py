import dataclasses

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import parameters
from cm3leon_jax.checkpoints import reading
from cm3leon_jax.export import formats
from cm3leon_jax.reports import model_card
from cm3leon_jax.tokenizers import published
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.trained.run import Run
from tests.generation.run import SETTINGS, save_run
from tests.models.tiny import tree_of
from tests.reports.snippets import execute, snippets

K, STEP = SETTINGS.vocab.image_size, 7
TINY = {"widths": (8, 8), "groups": 2, "latent_channels": 4, "code_dim": 4, "resolution": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("run"))
  save_run(root)
  return root


def write(run, folder, **choice) -> str:
  params = reading.open_params(run / "train")
  about = formats.TrainedRun(Run(run, SETTINGS), params, formats.Choice(**choice))
  numbers = formats.write(folder, about)
  model_card.write(folder, Run(run, SETTINGS), STEP, numbers)
  return (folder / "README.md").read_text()


def test_orbax_restores_the_parameters(run, tmp_path, monkeypatch):
  card = write(run, tmp_path, format="orbax", dtype="bfloat16")
  monkeypatch.chdir(tmp_path)
  found = snippets(card)
  assert [language for language, _ in found] == ["python"]
  params = execute(found)["params"]
  expected = tree_of(reading.open_params(run / "train"))
  rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), expected)
  jax.tree.map(np.testing.assert_array_equal, params, rounded)
  assert "stored as bfloat16, " in card
  assert "`python image_tokenizer/decode_image.py codes.json image.png`" in card
  assert "as a start for further training" in card
  assert "transformers" not in card.partition("## Use")[2]


# Only one family is fast enough here; `tests/tokenizers` tests all.
@pytest.fixture(
  params=[
    name if name == "taming_gumbel_f8" else pytest.param(name, marks=pytest.mark.slow)
    for name in published.FAMILIES
  ]
)
def with_published(request, run, monkeypatch):
  """Replaces the run's image tokenizer by a tiny one in a published format."""
  config = dataclasses.replace(published.FAMILIES[request.param], **TINY)
  monkeypatch.setitem(published.FAMILIES, request.param, config)
  rng = np.random.default_rng(0)
  types = parameters.to_dict(published.structure(config, K)[1])
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), types)
  tokenizer, before = ImageTokenizer(config, K, params), ImageTokenizer.load(run / "vqgan")
  tokenizer.save(run / "vqgan")
  yield tokenizer
  before.save(run / "vqgan")


@pytest.mark.slow
def test_a_published_tokenizer_decodes_as_the_card_says(with_published, run, tmp_path, monkeypatch):
  pytest.importorskip("torch")
  if with_published.config.family == "amused":
    pytest.importorskip("diffusers")
  card = write(run, tmp_path)
  monkeypatch.chdir(tmp_path)
  names = execute(snippets(card))
  codes = names["ids"][0, -16:].numpy() - SETTINGS.vocab.text_size
  [expected] = with_published.decode(codes[None])
  assert expected.std() > 5
  found = np.asarray(Image.open(tmp_path / "image.png")).astype(int)
  assert np.abs(found - expected).max() <= 1
  assert "decode_image.py" not in card


@pytest.mark.slow
def test_a_published_tokenizer_in_an_export_of_orbax(with_published, run, tmp_path, monkeypatch):
  if with_published.config.family == "amused":
    pytest.importorskip("diffusers")
  card = write(run, tmp_path, format="orbax")
  monkeypatch.chdir(tmp_path)
  execute(snippets(card))
  found = np.asarray(Image.open(tmp_path / "image.png")).astype(int)
  [expected] = with_published.decode(np.zeros((1, 16), int))
  assert np.abs(found - expected).max() <= 1
