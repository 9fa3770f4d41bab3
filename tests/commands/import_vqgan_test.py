import dataclasses

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.commands import (
  common,
  encode_documents,
  generate,
  import_vqgan,
  train,
  train_clip,
  train_text_tokenizer,
  train_vqgan,
)
from cm3leon_jax.commands.shared_flags import Encoding
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.reports import report
from cm3leon_jax.run import bundles, copies
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages
from cm3leon_jax.tokenizers import published, published_files, published_source, text, vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.data.raw_folder import write_raw
from tests.data.stores import VOCAB
from tests.generation.run import clip_params, make_config
from tests.models.tiny import random_arrays
from tests.refusals import refused
from tests.retrieval.stores import write_neighbors
from tests.tokenizers.published_random import FAMILY, save_random
from tests.tokenizers.tiny import tiny_config

NAME = published_source.DIFFUSERS


def make_settings(**vqgan):
  """Returns settings for an f16 tokenizer at 256 pixels with a tiny decoder model."""
  config = make_config(320)
  config.vqgan.update({"resolution": 256, "downsample": 16, "stem": 16, **vqgan})
  config.data.update({"num_neighbors": 0, "text_share": 0.0, "pack_window": 16})
  config.clip.update({"resolution": 256, "patch": 128})
  config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1})
  config.train.update({"steps": 1, "global_batch_size": 2, "eval_every": 1, "eval_batches": 1})
  config.train.update({"tensorboard": False, "checkpoint_every": 1})
  config.optimizer.update({"warmup_steps": 1})
  return settings_from_config(config)


SETTINGS = make_settings()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Saves random weights with diffusers; returns the folder and the diffusers tokenizer."""
  folder = tmp_path_factory.mktemp("source")
  return folder, save_random(folder, VOCAB.image_size)


def test_a_tokenizer_is_imported_once(source, tmp_path, capsys):
  folder, tokenizer = source
  import_vqgan.main(SETTINGS, tmp_path, import_vqgan.Flags(source=str(folder), family="amused"))
  numbers = sum(x.size for x in jax.tree.leaves(tokenizer.params))
  tensors = len(published_files.tensor_shapes(FAMILY, VOCAB.image_size))
  assert capsys.readouterr().out.splitlines() == [
    f"import_vqgan: amused, {numbers:,} parameters in {tensors} tensors.",
    f"import_vqgan: read {folder / NAME}, SHA-256 {digest(folder / NAME)}.",
    "import_vqgan: 256x256 pixels are 16x16 = 256 of 64 codes, each of width 4; in "
    f"{tmp_path / 'vqgan'}.",
  ]
  loaded = ImageTokenizer.load(tmp_path / "vqgan")
  assert (loaded.config, loaded.batch_size) == (FAMILY, 16)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, tokenizer.params)
  before = read_json(tmp_path / "vqgan" / stages.DONE)
  assert stages.ids(SETTINGS, tmp_path, ["vqgan"]) == {"vqgan": before["id"]}
  import_vqgan.main(
    SETTINGS, tmp_path, import_vqgan.Flags(source=str(folder / NAME), family="amused")
  )
  assert "vqgan: finished already, skipped." in capsys.readouterr().out
  assert read_json(tmp_path / "vqgan" / stages.DONE) == before
  import_vqgan.main(SETTINGS, tmp_path / "copy", import_vqgan.Flags(source=str(tmp_path / "vqgan")))
  assert capsys.readouterr().out.startswith(f"import_vqgan: amused, {numbers:,} parameters in ")
  train_vqgan.main(SETTINGS, tmp_path)  # Training would fail here, because raw/ is missing.
  printed = (
    f"{tmp_path / 'vqgan'}: made by cm3leon import_vqgan, stays as it is; nothing is trained."
  )
  assert capsys.readouterr().out.startswith(printed)


def test_the_tokenizer_of_an_export_needs_no_family(tmp_path, capsys):
  config = tiny_config(resolution=256, downsample=16, stem=16)
  types = jax.eval_shape(lambda: vqgan.init_params(config, VOCAB.image_size, jax.random.key(0)))
  params = random_arrays(types)
  folder = tmp_path / "export" / "image_tokenizer"
  ImageTokenizer(config, VOCAB.image_size, params).save(folder)
  import_vqgan.main(SETTINGS, tmp_path, import_vqgan.Flags(source=str(folder)))
  assert ImageTokenizer.load(tmp_path / "vqgan").config == config
  assert digest(tmp_path / "vqgan" / vqgan.PARAMS) == digest(folder / vqgan.PARAMS)
  import_vqgan.main(SETTINGS, tmp_path, import_vqgan.Flags(source=str(folder)))
  train_vqgan.main(SETTINGS, tmp_path)  # Training would fail here, because raw/ is missing.
  printed = capsys.readouterr().out
  assert "import_vqgan: trained by cm3leon train_vqgan, " in printed
  assert "vqgan: finished already, skipped." in printed
  assert "made by cm3leon import_vqgan, stays as it is; nothing is trained." in printed
  page = report.render(tmp_path, report.summary_lib.collect(tmp_path), "cm3leon_350m")
  assert "The image tokenizer of an export, " in page
  import_vqgan.main(
    SETTINGS, tmp_path / "again", import_vqgan.Flags(source=str(tmp_path / "vqgan"))
  )
  with refused(UserError, "--config.vqgan.resolution=256"):
    import_vqgan.main(
      make_settings(resolution=512), tmp_path / "b", import_vqgan.Flags(source=str(folder))
    )


def test_the_family_is_found_and_recorded(tmp_path, monkeypatch, capsys):
  small = dataclasses.replace(FAMILY, family="janus", resolution=384, level_attention=True)
  monkeypatch.setitem(published.FAMILIES, "janus", small)
  tokenizer = save_random(tmp_path / "source", VOCAB.image_size, family=small)
  source = str(tmp_path / "source")
  import_vqgan.main(SETTINGS, tmp_path, import_vqgan.Flags(source=source))
  assert capsys.readouterr().out.startswith("import_vqgan: janus, ")
  assert read_json(tmp_path / "vqgan" / stages.DONE)["summary"]["family"] == "janus"
  loaded = ImageTokenizer.load(tmp_path / "vqgan")
  assert loaded.config == dataclasses.replace(small, resolution=256)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, tokenizer.params)
  with refused(UserError, "--config.vqgan.published"):
    import_vqgan.main(
      make_settings(published="amused"),
      tmp_path / "b",
      import_vqgan.Flags(source=source, family="janus"),
    )
  path = tmp_path / "source" / NAME
  path.write_bytes(path.read_bytes()[:-1])
  with refused(UserError, str(path), "not a whole safetensors file"):
    import_vqgan.main(SETTINGS, tmp_path / "b", import_vqgan.Flags(source=source))


def test_another_tokenizer_is_not_overwritten(source, tmp_path):
  folder, _ = source
  import_vqgan.main(SETTINGS, tmp_path, import_vqgan.Flags(source=str(folder), family="amused"))
  save_random(tmp_path / "other", VOCAB.image_size, seed=1)
  with refused(UserError, str(tmp_path / "vqgan")):
    import_vqgan.main(
      SETTINGS, tmp_path, import_vqgan.Flags(source=str(tmp_path / "other"), family="amused")
    )
  with refused(UserError, str(tmp_path / "vqgan")):
    import_vqgan.main(
      make_settings(resolution=512),
      tmp_path,
      import_vqgan.Flags(source=str(folder), family="amused"),
    )
  for name in ("config.json", "training/1/file"):
    path = tmp_path / name.partition(".")[0] / "vqgan" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"vqgan": {}, "num_codes": 64}')
    with refused(UserError, "vqgan"):
      import_vqgan.main(
        SETTINGS,
        tmp_path / name.partition(".")[0],
        import_vqgan.Flags(source=str(folder), family="amused"),
      )


def test_an_imported_tokenizer_is_copied_into_a_tuned_run(source, tmp_path, monkeypatch, capsys):
  """The tuned run's config may set other VQGAN sizes, which are unused, but not another grid."""
  run, tuned = tmp_path / "run", tmp_path / "tuned"
  (run / "train").mkdir(parents=True)
  (run / "train" / "config.json").touch()  # `settings_of_run` is replaced below.
  write_data(run)
  import_vqgan.main(SETTINGS, run, import_vqgan.Flags(source=str(source[0]), family="amused"))
  monkeypatch.setattr(bundles, "settings_of_run", lambda folder: SETTINGS)
  with refused(UserError, "vqgan"):
    copies.copy_tokenizers(Run(tuned, make_settings(resolution=512)), str(run))
  other = make_settings(code_dim=4 * SETTINGS.vqgan.code_dim)
  made = copies.copy_tokenizers(Run(tuned, other), str(run))
  assert made == dict.fromkeys(("text_tokenizer", "vqgan", "clip"), "copied")
  capsys.readouterr()
  for command in (train_text_tokenizer, train_vqgan, train_clip):
    command.main(other, tuned)  # Training would fail here, because raw/ is missing.
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    f"{tuned / name}: made by cm3leon copy_tokenizers, stays as it is; nothing is trained."
    for name in made
  ]
  assert copies.copy_tokenizers(Run(tuned, other), str(run)) == dict.fromkeys(made, "there already")
  page = report.render(tuned, report.summary_lib.collect(tuned), "sft")
  assert page.count("<code>cm3leon copy_tokenizers</code>") == 3
  assert "cm3leon train_vqgan" not in page
  assert "--workdir=DIR --init_from=RUN" in page
  assert f"Copied from <code>{run}</code>, with its codes" in page


def test_a_damaged_or_unfinished_import_says_to_import_again(source, tmp_path):
  import_vqgan.main(SETTINGS, tmp_path, import_vqgan.Flags(source=str(source[0]), family="amused"))
  path = tmp_path / "vqgan" / "params.safetensors"
  path.write_bytes(path.read_bytes()[:-1])
  with refused(UserError, "params.safetensors"):
    ImageTokenizer.load(tmp_path / "vqgan")
  (tmp_path / "vqgan" / stages.DONE).unlink()
  with refused(UserError, str(tmp_path / "vqgan")):
    train_vqgan.main(SETTINGS, tmp_path)
  import_vqgan.main(SETTINGS, tmp_path, import_vqgan.Flags(source=str(source[0]), family="amused"))
  ImageTokenizer.load(tmp_path / "vqgan")


def write_data(root) -> np.ndarray:
  """Writes eight pairs of 256 pixels, a text tokenizer and a random CLIP; returns the images."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
  images = np.repeat(np.repeat(coarse, 32, 1), 32, 2)
  pairs = [
    {"key": f"k{i}", "caption": f"word{i} word", "split": "heldout" if i > 5 else "train"}
    for i in range(8)
  ]
  write_raw(root / "raw", pairs, images)
  # Has enough different words to train the text tokenizer.
  words = [f"word{i} word{i + 1}" for i in range(400)]
  text.train_text_tokenizer(words, VOCAB, TextTokenizerConfig(), root / "text_tokenizer")
  clip_lib.CLIP(SETTINGS.clip, VOCAB.text_size, clip_params(SETTINGS)).save(root / "clip")
  for split, count in (("train", 6), ("heldout", 2)):
    ids = np.zeros((count, 4), np.int32)
    write_neighbors(root / "neighbors" / f"{split}_pairs", ids=ids, text_ids=ids)
  for name in ("raw", "text_tokenizer", "clip", "neighbors"):
    write_json(root / name / stages.DONE, {"id": name, "config": {}, "summary": {}, "seconds": 1.0})
  return images


@pytest.fixture
def one_mesh(monkeypatch):
  mesh = create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  monkeypatch.setattr(common, "make_mesh", lambda settings, stage="": mesh)


@pytest.mark.slow
def test_a_run_on_an_imported_tokenizer(source, tmp_path, one_mesh, capsys):
  """Imports, encodes, trains a step, generates and decodes; compares with diffusers' results."""
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  model = diffusers.VQModel.from_pretrained(source[0]).eval()
  root = epath.Path(tmp_path)
  images = write_data(root)
  import_vqgan.main(SETTINGS, root, import_vqgan.Flags(source=str(source[0]), family="amused"))
  encode_documents.main(SETTINGS, root, Encoding())
  store = DocumentStore(root / "documents" / "train_pairs", VOCAB)
  codes = np.stack([VOCAB.image_codes(store[i].segments[1].tokens) for i in range(6)])
  with torch.no_grad():
    pixels = torch.tensor(images[:6]).permute(0, 3, 1, 2) / 255
    expected = model.quantize(model.encode(pixels).latents)[2][2].reshape(6, 256).numpy()
  assert len(np.unique(expected)) > 5
  assert (codes == expected).mean() > 0.999
  train.main(SETTINGS, root, train.Flags())
  assert stages.require(root, "train", summary=dict)["summary"]["steps"] == 1
  asked = {"prompt": ("word1 word",), "guidance": ("3",), "retrieve": ("0",), "samples": 2}
  generate.main(SETTINGS, root, generate.Flags(**asked))
  [folder] = (root / "prompts").iterdir()
  for line in read_json_lines(folder / "results.jsonl"):
    tokens = np.array(line["tokens"])
    made = VOCAB.image_codes(tokens[tokens >= VOCAB.text_size])
    assert made.shape == (256,)
    with torch.no_grad():
      shape = (1, 16, 16, FAMILY.code_dim)
      decoded = model.decode(torch.tensor(made), force_not_quantize=True, shape=shape).sample
    image = np.asarray(Image.open(folder / line["file"]))
    assert image.std() > 5
    expected = np.clip(decoded[0].permute(1, 2, 0).numpy() * 255, 0, 255)
    assert np.abs(image - expected).max() < 0.55
