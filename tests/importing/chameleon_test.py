import copy
import dataclasses
import json
import pathlib
import shutil

from etils import epath
from hypothesis import given
from hypothesis import strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import tokenizers

from cm3leon_jax import CM3Leon
from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import formats, huggingface
from cm3leon_jax.export.published_layout import read_ids
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.importing import chameleon_ids, importer
from cm3leon_jax.models import adapters
from cm3leon_jax.run import initial
from cm3leon_jax.run.run import Run, ids, load_initial, open_params
from cm3leon_jax.stages import table
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import stored
from cm3leon_jax.weights.stored_tensors import StoredTensors
from tests.importing import published_chameleon
from tests.models.adapters_test import random_factors
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.reports.snippets import execute, snippets

SETTINGS = published_chameleon.make_settings()
VOCAB = SETTINGS.vocab


@pytest.fixture(scope="module")
def workdir(chameleon, tmp_path_factory):
  """Returns the workdir of an import."""
  folder = epath.Path(tmp_path_factory.mktemp("run"))
  importer.write(SETTINGS, folder, importer.plan(SETTINGS, str(chameleon[1])))
  return folder


@pytest.fixture(scope="module")
def theirs(workdir):
  """Returns the source's id of each of our ids."""
  return np.array(read_json(workdir / "init" / "published" / "ids.json")["theirs"])


def test_special_tokens_take_reserved_ids_by_their_names():
  names = {name: i for i, name in enumerate((*"ab", "<s>", "<pad>", "<unk>", "</s>", "<eoss>"))}
  names |= {"IMGIMGAZ": 7, "<reserved1>": 8, "IMGIMGBZ": 9, "<racm3:break>": 10, "<image>": 11}
  names |= {"<reserved08706>": 12, "<sentinel:0>": 13, "<reserved0>": 14}
  vocab = VocabLayout(num_special=8, text_size=264, image_size=2, template="chameleon")
  result = chameleon_ids.permutation(names, vocab, "config.json").tolist()
  assert result == [3, 2, 4, 10, 12, 8, 13, 6, 0, 1, 5, 11, 14, 7, 9]


def test_the_ids_are_a_permutation_of_theirs(chameleon, theirs):
  assert sorted(theirs) == list(range(published_chameleon.ROWS))
  names = read_json(chameleon[1] / "config.json")["vocabulary_map"]
  codes = [names[published_chameleon.image_name(code)] for code in range(VOCAB.image_size)]
  assert theirs[VOCAB.image_ids(range(VOCAB.image_size))].tolist() == codes
  assert codes[-1] - codes[0] > VOCAB.image_size  # Not a range.
  assert theirs[VOCAB.num_special - 1] == names["<eoss>"]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_have_the_ids_of_the_source(text, chameleon, workdir, theirs):
  original = _original(chameleon[1])
  ours = _tokenizer(workdir)
  ids = ours.encode(text)
  assert ours.decode(ids) == text
  assert ((ids >= VOCAB.num_special) & (ids < VOCAB.text_size)).all()
  assert theirs[ids].tolist() == original.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["a red bell left of 3 roads", " <image>IMGIMGABZ</s>  \t x"])
def test_names_of_special_tokens_and_codes_are_plain_text(text, chameleon, workdir, theirs):
  ids = _tokenizer(workdir).encode(text)
  assert _tokenizer(workdir).decode(ids) == text
  names = {i: name for name, i in read_json(chameleon[1] / "config.json")["vocabulary_map"].items()}
  assert not any(names[i].startswith(("<", "IMGIMG")) and len(names[i]) > 1 for i in theirs[ids])
  assert len(ids) < len(text)


_cache: dict = {}


def _tokenizer(workdir):
  return _cache.setdefault(workdir, TextTokenizer(workdir / "text_tokenizer", VOCAB))


def _original(folder):
  if folder not in _cache:
    _cache[folder] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    _cache[folder].encode_special_tokens = True
  return _cache[folder]


def test_tensors_stay_bit_for_bit_in_bfloat16(chameleon, workdir, theirs):
  source, made = StoredTensors(chameleon[1]), load_file(workdir / "init" / "model.safetensors")
  published = load_file(workdir / "init" / "published" / "vqmodel.safetensors")
  assert {*made} | {*published} == {*source.names}
  for name, x in (made | published).items():
    assert x.dtype == ml_dtypes.bfloat16
    expected = source.read(name)
    if name in ("lm_head.weight", "model.embed_tokens.weight"):
      expected = expected[theirs]
    np.testing.assert_array_equal(x.astype(np.float32), expected)
  for name in ("config.json", "tokenizer.json", "LICENSE"):
    kept = workdir / "init" / "published" / name
    assert kept.read_bytes() == (chameleon[1] / name).read_bytes()


def test_logits_of_texts_and_images_are_those_of_transformers(chameleon, workdir, theirs):
  import torch

  rng = np.random.default_rng(0)
  sample = np.concatenate([[VOCAB.eos], rng.integers(VOCAB.size, size=30)]).astype(np.int32)
  assert VOCAB.is_image(sample).any()
  with torch.no_grad():
    hidden = chameleon[0].model(input_ids=torch.from_numpy(theirs[sample])[None])[0]
    expected = chameleon[0].lm_head(hidden)[0].numpy()[:, theirs]
  model = dataclasses.replace(SETTINGS.model, attention="plain")
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params = load_initial(initial.find(SETTINGS, str(workdir / "init")), SETTINGS)
    positions = np.arange(len(sample), dtype=np.int32)
    logits = np.asarray(huggingface.causal_logits(model, params, sample, positions))
  assert np.abs(expected).max() > 1
  assert np.abs(logits - expected).max() < 1e-4
  assert np.abs(logits - expected[:, np.argsort(theirs)]).max() > 0.1  # Other ids, other logits.


def test_an_interrupted_import_starts_again(chameleon, tmp_path):
  workdir, source = epath.Path(tmp_path), str(chameleon[1])
  importer.write(SETTINGS, workdir, importer.plan(SETTINGS, source))
  weights = (workdir / "init" / "model.safetensors").read_bytes()
  (workdir / "init" / "done.json").unlink()
  (workdir / "init" / "model.safetensors").write_bytes(weights[:100])
  importer.write(SETTINGS, workdir, importer.plan(SETTINGS, source))
  assert (workdir / "init" / "model.safetensors").read_bytes() == weights
  (workdir / "init" / "published" / "ids.json").write_text("{}")
  with refused(UserError, "ids.json"):
    importer.write(SETTINGS, workdir, importer.plan(SETTINGS, source))


def refuses(folder, tmp_path, *words) -> None:
  with refused(UserError, str(folder), *words):
    importer.write(SETTINGS, tmp_path / "run", importer.plan(SETTINGS, str(folder)))
  assert not (tmp_path / "run").exists()


def renamed(**changed):
  """Returns a change of config.json: new names of ids, by their old names; None removes one."""

  def change(described):
    names = {changed.get(name, name): i for name, i in described["vocabulary_map"].items()}
    return {"vocabulary_map": {name: i for name, i in names.items() if name}}

  return change


def exchanged(described):
  names = dict(described["vocabulary_map"])
  names["IMGIMGCZ"], names["IMGIMGDZ"] = names["IMGIMGDZ"], names["IMGIMGCZ"]
  return {"vocabulary_map": names}


@pytest.mark.parametrize(
  ("change", "word"),
  [
    ({"architectures": ["ChameleonXLLMXForConditionalGeneration"]}, "Lumina"),
    ({"z_loss_weight": 0.0}, "Lumina"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ({"model_type": "llama"}, "model_type"),
    ({"sliding_window": 3}, "sliding_window"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
    ({"hidden_size": 64}, "--config.model.width=64"),
    ({"swin_norm": True}, "--config.model.swin_norm=True"),
    ({"vq_config": {"attn_resolutions": [8]}}, "attn_resolutions"),
    ({"vq_config": {**published_chameleon.VQ, "resolution": 16}}, "vqgan.resolution=16"),
    ({"vocabulary_map": None}, "vocabulary_map"),
    ({"vocabulary_map": {"a": 10**6}}, "1000000"),
    (renamed(IMGIMGBZ="IMGIMGZ"), "two names"),
    (exchanged, "tokenizer.json"),
  ],
)
def test_another_config_is_refused_before_anything_is_written(change, word, chameleon, tmp_path):
  folder = tmp_path / "source"
  shutil.copytree(chameleon[1], folder)
  described = read_json(folder / "config.json")
  change = change(described) if callable(change) else change
  write_json(folder / "config.json", described | change)
  refuses(folder, tmp_path, word)


def swap(names, a, b):
  names[a], names[b] = names[b], names[a]


@pytest.mark.parametrize(
  ("change", "word"),
  [
    (lambda names: swap(names, "IMGIMGCZ", "IMGIMGDZ"), "code 2"),
    (lambda names: names.update({"IMGIMGABZ": names.pop("IMGIMGCZ")}), "IMGIMGABZ"),
    (lambda names: names.update({"IMGIMGcZ": names.pop("IMGIMGCZ")}), "IMGIMGcZ"),
    (lambda names: names.update({"zzzz": names.pop("IMGIMGCZ")}), "code 2"),
    (lambda names: names.update({"zzzz": names["IMGIMGCZ"]}), "two names"),
    (lambda names: names.update({"zzzz": names.pop("<eoss>")}), "<eoss>"),
    (lambda names: [names.update({f"z{k}": names.pop(k)}) for k in [*names] if k[:4] == "<res"],
     "<reserved08706>"),
    (lambda names: [names.update({f"z{k}": names.pop(k)}) for k in [*names] if k[:3] == "IMG"],
     "no image codes"),
    (lambda names: names.pop("IMGIMGCZ"), "no name"),
  ],
)  # fmt: skip
def test_another_vocabulary_is_refused(change, word, chameleon, tmp_path):
  folder = tmp_path / "source"
  shutil.copytree(chameleon[1], folder)
  described, text = (read_json(folder / name) for name in ("config.json", "tokenizer.json"))
  names = described["vocabulary_map"]
  change(names)
  by_id = {i: name for name, i in names.items()}
  write_json(folder / "config.json", described)
  vocab = {by_id.get(i, name): i for name, i in text["model"]["vocab"].items() if i in by_id}
  text["added_tokens"] = [
    {**token, "content": by_id[token["id"]]}
    for token in text["added_tokens"]
    if token["id"] in by_id
  ]
  text["model"]["vocab"] = vocab
  (folder / "tokenizer.json").write_text(json.dumps(text))
  refuses(folder, tmp_path, word)


@pytest.mark.parametrize("part", ["shard", "nan", "surplus", "decoder", "other images", "bytes"])
def test_other_files_are_refused(part, chameleon, tmp_path):
  folder, word = tmp_path / "source", part
  shutil.copytree(chameleon[1], folder)
  shard, vqgan = sorted(folder.glob("model-*.safetensors"))[0], folder / "vqgan.safetensors"
  tensors, images = load_file(shard), load_file(vqgan)
  if part == "shard":
    shard.unlink()
    word = shard.name
  elif part == "decoder":
    vqgan.unlink()
    word = "vqgan.ckpt"
  elif part == "other images":
    images["quantize.embedding.weight"][3] += 1
    save_file(images, vqgan)
    word = "quantize.embedding.weight"
  elif part == "bytes":
    text = read_json(folder / "tokenizer.json")
    text["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(text))
    word = "byte_fallback"
  else:
    name = next(iter(tensors))
    bad = np.array(tensors[name], np.float32)
    bad.flat[-1] = np.nan
    changed = {name: bad.astype(ml_dtypes.bfloat16)} if part == "nan" else {"model.other": bad}
    word = next(iter(changed))
    save_file(tensors | changed, shard)
  refuses(folder, tmp_path, word)


def test_a_bank_in_the_workdir_of_an_import_names_its_clip(workdir, tmp_path):
  retrieval = dataclasses.replace(SETTINGS.retrieval, clip="a-clip")
  shutil.copytree(workdir, tmp_path / "run")
  stored = {"config": {"retrieval": dataclasses.asdict(retrieval)}}
  write_json(tmp_path / "run" / "neighbors" / "done.json", stored)
  run = Run.open(tmp_path / "run")
  assert run.has_clip
  assert run.settings == dataclasses.replace(SETTINGS, retrieval=retrieval)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
  """Returns the folder of an export of the import."""
  run, folder = Run.open(workdir), tmp_path_factory.mktemp("exported") / "export"
  with jax.set_mesh(mesh_of(1, 1, 1)):
    choice = formats.Choice(dtype="bfloat16")
    formats.write(folder, formats.TrainedRun(run, open_params(run, None), choice))
  return folder


def test_an_import_is_a_model_and_is_exported_bit_for_bit(chameleon, workdir, exported):
  """The workdir has no training, and a model that transformers loads without a missing tensor."""
  import transformers

  run = Run.open(workdir)
  assert run.settings == SETTINGS
  assert not run.has_clip
  assert ids(run, ["text_tokenizer", "vqgan", "train"])["train"]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    assert run.params()[1] == 0
  folder, source = exported, chameleon[1]
  ours, original = StoredTensors(folder), StoredTensors(source)
  assert {*ours.names} == {*original.names}
  for name in original.names:
    assert ours.dtype(name) == "BF16"
    np.testing.assert_array_equal(ours.read(name), original.read(name))
  for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
    assert (folder / name).read_bytes() == (source / name).read_bytes()
  described = read_json(folder / "config.json")
  assert described.pop("cm3leon")["published_ids"]
  assert described == read_json(source / "config.json")
  model = transformers.ChameleonForConditionalGeneration
  loaded, found = model.from_pretrained(folder, output_loading_info=True)
  assert not any(found.values()), found
  assert loaded.config.vocabulary_map == chameleon[0].config.vocabulary_map
  with refused(UserError, "published"):
    Run.open(folder, exports=True)
  again = importer.plan(SETTINGS, str(folder))  # It is imported like the original.
  assert again.published.theirs.tolist() == read_ids(workdir / "init" / "published").tolist()


def test_an_export_draws_the_codes_of_this_project(workdir, theirs, exported):
  """Greedy, of captions with their tokenizer in one padded batch, by the stock class."""
  import torch
  import transformers

  captions = ["a red bell", "3 roads left of a blue house"]
  model = transformers.ChameleonForConditionalGeneration.from_pretrained(exported, dtype="float32")
  names, own = model.config.vocabulary_map, model.config.cm3leon
  texts = [_original(exported).encode(text, add_special_tokens=False).ids for text in captions]
  end = [names["<reserved08706>"], names["<racm3:break>"]]
  prompts = [[names["<s>"], *text, *end] for text in texts]
  longest = max(map(len, prompts))
  assert min(map(len, prompts)) < longest
  given = torch.tensor([[names["<pad>"]] * (longest - len(x)) + x for x in prompts])

  def draw(**options):
    options |= {"custom_generate": str(exported), "trust_remote_code": True, "do_sample": False}
    return model.generate(given, **options)[:, longest:].numpy()

  ours = CM3Leon.load(workdir, mesh=mesh_of(1, 1, 1))
  for scale in (1.0, 3.0):
    expected = [
      theirs[sample.tokens] for [sample] in ours.generate(captions, top_k=1, guidance=scale)
    ]
    found = draw(guidance_scale=scale)
    np.testing.assert_array_equal(found, expected)
    assert (found[:, -1] == names["<eoss>"]).all()
    assert {*found[:, :-1].flat} <= {*own["image_ids"]}
  assert (draw(guidance_scale=1.0) != expected).any()
  page = pathlib.Path(__file__).parents[2].joinpath("docs/weights.md").read_text("utf-8")
  [(_, lines)] = [x for x in snippets(page) if "ChameleonFor" in x[1]]
  result = execute([("python", lines.replace("mine/export", str(exported)))])
  side = published_chameleon.SIDE
  assert result["image"].shape == (side, side, 3)
  for change in ({"pad": names["<s>"]}, {"unconditional_prompt": [1, 3]}):
    model.config.cm3leon = own | change  # Ids of ours.
    assert (draw(guidance_scale=3.0) != expected).any()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_exported_for_peft_and_merged(chameleon, workdir, tmp_path):
  """Our sum, `peft` on the downloaded folder, and the merged export have the same logits."""
  import torch

  settings = dataclasses.replace(SETTINGS, adapter=AdapterConfig(rank=3, alpha=6.0))
  folder, start = epath.Path(tmp_path / "run"), initial.find(settings, str(workdir / "init"))
  identity = {**table.identity(settings, "train"), "init_from": dataclasses.asdict(start)}
  stored_settings = dataclasses.asdict(settings)
  write_json(folder / "train" / "config.json", {"run": identity, "settings": stored_settings})
  shutil.copytree(workdir / "vqgan", folder / "vqgan")
  sample = np.random.default_rng(0).integers(VOCAB.size, size=24).astype(np.int32)
  renumbered = read_ids(workdir / "init" / "published")
  given = torch.from_numpy(renumbered[sample])[None].long()
  model = dataclasses.replace(SETTINGS.model, attention="plain")
  with jax.set_mesh(mesh_of(1, 1, 1)):
    base, factors = load_initial(start, settings), random_factors(model, settings.adapter)
    for name, params in {
      "peft": factors,
      "hf": adapters.merge(base, factors, settings.adapter),
    }.items():
      made = stored.of_tree(jax.device_get(params), 3)
      choice = formats.Choice(format=name)
      formats.write(tmp_path / name, formats.TrainedRun(Run(folder, settings), made, choice))
    compared = huggingface.compare_logits(tmp_path / "hf", params, model, [sample], renumbered)
  assert compared["max_difference"] < 1e-4 < 1 < compared["max_logit"]
  peft = pytest.importorskip("peft")
  assert "ChameleonForConditionalGeneration" in (tmp_path / "peft" / "README.md").read_text()
  tuned = peft.PeftModel.from_pretrained(copy.deepcopy(chameleon[0]), str(tmp_path / "peft")).eval()
  merged = type(chameleon[0]).from_pretrained(tmp_path / "hf").eval()
  with torch.no_grad():
    found, expected, before = (
      x.model(input_ids=given)[0] for x in (tuned.base_model.model, merged, chameleon[0])
    )
  assert float((found - expected).abs().max()) < 1e-4
  assert float((found - before).abs().max()) > 0.1
