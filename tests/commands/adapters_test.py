"""Trains, loads and exports adapters and groups by the commands, on the run of `generation.run`."""

import dataclasses
import pathlib
import shutil

from etils import epath
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.commands import common, export, train
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import bundle, huggingface
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json
from cm3leon_jax.generation import heldout
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.models import adapters
from cm3leon_jax.run import initial
from cm3leon_jax.run.run import Run, load_initial, open_params
from cm3leon_jax.stages import stages
from cm3leon_jax.weights import reading
from cm3leon_jax.weights.stored import of_tree
from tests.generation.run import SETTINGS, make_config, one_device, save_run
from tests.refusals import refused
from tests.retrieval.stores import write_neighbors

OTHER = dataclasses.replace(SETTINGS, seed=1)


def settings_with(steps=3, rank=4, only=(), **fields):
  config = make_config()
  config.data.update({"num_neighbors": 0, "text_share": 0.0, "pack_window": 8})
  config.train.update({"global_batch_size": 1, "steps": steps, "tensorboard": False})
  config.train.update({"eval_batches": 1, "checkpoint_every": 2, "only": only})
  config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 0})
  config.adapter.update({"rank": rank, **fields})
  return settings_from_config(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  save_run(root := epath.Path(tmp_path_factory.mktemp("base")))
  write_neighbors(root / "neighbors" / "train_pairs", ids=np.full((12, 4), -1, np.int32))
  return root


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(common, "use_mesh", lambda settings: one_device())
    patch.setattr(heldout, "sample_grids", lambda *_: None)
    yield


@pytest.fixture(scope="module")
def make(base, tmp_path_factory):
  """Returns a function that trains adapters of `base`, and returns the workdir."""

  def trained(**fields):
    folder = epath.Path(tmp_path_factory.mktemp("adapted")) / "run"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("train"))
    train.main(settings_with(**fields), folder, train.Flags(init_from=str(base)))
    return folder

  return trained


@pytest.fixture(scope="module")
def adapted(make):
  return make()


IMAGES = {"rank": 0, "only": ("embed.image",)}


def test_only_rows_of_image_codes_are_trained(base, full, make, tmp_path):
  folder = make(**IMAGES)
  done = read_json(folder / "train" / stages.DONE)["summary"]
  whole = read_json(full / stages.DONE)["summary"]
  assert done["heldout_before"] == whole["heldout_before"]
  assert done["heldout_loss"] < done["heldout_before"]["heldout_loss"]
  assert done["parameters"] == whole["parameters"]
  assert done["trained_parameters"] == SETTINGS.vocab.image_size * SETTINGS.model.width
  output, text = tmp_path / "orbax", SETTINGS.vocab.text_size
  export.main(settings_with(**IMAGES), folder, export.Flags(format="orbax", output=str(output)))
  with one_device():
    before, after = (Run.open(x).params()[0] for x in (base, folder))
    exported, _ = Run.open(output, exports=True).params()
  jax.tree.map(np.testing.assert_array_equal, exported, after)
  rows = (after.pop("embed") != before.pop("embed")).any(-1)
  assert rows.tolist() == [False] * text + [True] * SETTINGS.vocab.image_size
  jax.tree.map(np.testing.assert_array_equal, before, after)
  with refused(UserError, "peft", str(folder), "no adapters"):
    export.main(settings_with(**IMAGES), folder, export.Flags(format="peft"))
  for other in ({"only": ("embed",)}, {"only": ()}, {"rank": 4, "only": ()}):
    with refused(UserError, str(folder)):
      train.main(settings_with(**{**IMAGES, **other}, steps=4), folder, train.Flags())
  train.main(settings_with(**IMAGES, steps=4), folder, train.Flags())
  assert read_json(folder / "train" / stages.DONE)["summary"]["steps"] == 4
  with refused(UserError, "train.only", "embed.image", "--init_from"):
    initial.of_run(settings_with(**IMAGES), tmp_path, "", None)


@pytest.fixture(scope="module")
def full(make):
  """A full training's folder train/."""
  return make(rank=0, steps=1) / "train"


def files(folder):
  paths = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
  return {path: path.read_bytes() for path in paths}


def size_of(folder):
  return sum(map(len, files(folder).values()))


def test_step_0_has_the_losses_of_the_base_and_only_adapters_are_saved(base, adapted, full):
  settings = settings_with()
  done = read_json(adapted / "train" / stages.DONE)["summary"]
  whole = read_json(full / stages.DONE)["summary"]
  assert done["heldout_before"] == whole["heldout_before"]
  assert done["heldout_loss"] < done["heldout_before"]["heldout_loss"]
  assert whole.keys() == done.keys() - {"adapter_parameters"}
  assert done["adapter_parameters"] == adapters.count(settings.model, settings.adapter)
  with one_device():
    params, _ = reading.load_params(base / "train", settings.model)
    factors, step = reading.load_params(adapted / "train", settings.model, tuned=settings.adapter)
  assert step == 3
  assert done["parameters"] == sum(x.size for x in jax.tree.leaves(params))
  assert all(np.abs(x["b"]).max() > 0 for x in jax.device_get(factors).values())
  described = read_json(adapted / "train" / "checkpoints" / "3" / "state" / "_METADATA")
  names = " ".join(described["tree_metadata"])
  assert "'q'" in names
  assert "embed" not in names
  run = read_json(adapted / "train" / "config.json")["run"]
  assert run["init_from"] == dataclasses.asdict(initial.find(settings, str(base)))
  assert run.keys() - read_json(full / "config.json")["run"].keys() == {"adapter"}
  # Under load, Orbax leaves data in a checkpoint that nothing reads: 56 kB were seen.
  small, large = (
    min(size_of(step) for step in (folder / "checkpoints").iterdir())
    for folder in (adapted / "train", full)
  )
  # Half of the bytes of a small checkpoint describe the arrays.
  assert 3 * 2 * small < 2 * large


def test_several_adapters_share_a_base_that_never_changes(base, adapted, make):
  """One of the runs continues. A run can also start from the sum of a base and its adapters."""
  before = files(base)
  other = make(rank=2, targets=("v", "down"))
  with one_device():
    (a, _), (b, _), (plain, _) = (Run.open(folder).params() for folder in (adapted, other, base))
    found = initial.find(settings_with(rank=0), str(adapted))
    jax.tree.map(np.testing.assert_array_equal, load_initial(found, settings_with(rank=0)), a)
  jax.tree.map(np.testing.assert_array_equal, b["blocks"]["up"], plain["blocks"]["up"])
  np.testing.assert_array_equal(b["blocks"]["qkv"][:, :2], plain["blocks"]["qkv"][:, :2])
  for changed in (a["blocks"]["down"], plain["blocks"]["down"]):
    assert np.abs(b["blocks"]["down"] - changed).max() > 1e-4
  train.main(settings_with(rank=2, targets=("v", "down"), steps=4), other, train.Flags())
  assert read_json(other / "train" / stages.DONE)["summary"]["steps"] == 4
  assert files(base) == before


@pytest.mark.parametrize("name", ["orbax", pytest.param("hf", marks=pytest.mark.slow)])
def test_the_loaded_sum_is_that_of_the_merged_export_to_the_bit(base, adapted, tmp_path, name):
  folder = tmp_path / name
  export.main(settings_with(), adapted, export.Flags(format=name, output=str(folder)))
  with one_device():
    merged, step = Run.open(adapted).params()
    exported, at = Run.open(folder, exports=True).params()
    assert at == step == 3
    jax.tree.map(np.testing.assert_array_equal, exported, merged)
    plain, _ = Run.open(base).params()
  differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), merged, plain)
  assert differ == {
    "embed": False,
    "positions": False,
    "blocks": dict.fromkeys(("qkv", "out", "up", "down"), True),
  }


@pytest.mark.parametrize("fields", [{}, {"rank": 0, "only": ("embed", "layers.0-0")}])
def test_parameters_are_merged_as_they_are_read(base, make, fields):
  """All at once and one layer at a time they equal the sum in memory, and not the base."""
  folder = make(**fields)
  with one_device():
    lazy, plain = (open_params(Run.open(x), None) for x in (folder, base))
    whole = of_tree(Run.open(folder).params()[0])
  assert whole.shapes == lazy.shapes
  for name in whole.shapes:
    np.testing.assert_array_equal(lazy.read(name), expected := whole.read(name))
    if name.startswith("blocks."):
      np.testing.assert_array_equal(lazy.read(name, 0), expected[0])
      changed = ".norm" not in name and name != "blocks.final_norm"
      assert np.array_equal(plain.read(name, 0), expected[0]) is not changed, name


def test_adapters_are_added_to_their_base_and_to_no_other(base, adapted, tmp_path):
  folder = tmp_path / "peft"
  export.main(settings_with(), adapted, export.Flags(format="peft", output=str(folder)))
  tensors = safetensors.load_file(str(folder / "adapter_model.safetensors"))
  name = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora"
  assert [tensors[f"{name}_{x}.weight"].shape for x in "AB"] == [(4, 32), (32, 4)]
  assert size_of(folder) < 40_000
  with one_device() as mesh:
    merged, _ = Run.open(adapted).params()
    sums, step = Run.open(base, adapter=adapted).params()
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, sums, merged)
    model = CM3Leon.load(base, adapter=adapted, mesh=mesh)
    whole = CM3Leon.load(adapted, mesh=mesh)
  assert model.step == 3
  decoding, same = (one.pipeline.generator.params for one in (model, whole))
  jax.tree.map(np.testing.assert_array_equal, decoding, same)
  red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
  assert model.score("a red apple", red) == whole.score("a red apple", red)
  other = tmp_path / "other"
  save_run(epath.Path(other), OTHER)
  with refused(UserError, str(adapted), str(other), "other parameters"):
    initial.over(str(other), adapted)
  with refused(UserError, str(base), "no adapters"):
    initial.over(str(base), base)
  with refused(UserError, str(folder), "peft"):
    CM3Leon.load(folder)


def test_a_base_in_bfloat16_keeps_its_dtype(base, tmp_path):
  """Losses and parameters are those of a base with the same values in fp32."""
  settings = settings_with(steps=2)
  settings = dataclasses.replace(settings, model=settings.model.computing_in("bfloat16"))
  results = []
  for dtype in ("bfloat16", "float32"):
    start, folder = tmp_path / f"base_{dtype}", epath.Path(tmp_path / dtype)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("train"))
    with one_device():
      params = jax.tree.map(lambda x: x.astype("bfloat16"), Run.open(base).params()[0])
      huggingface.export(start, params, settings.model, settings.vocab, None, dtype)
      train.main(settings, folder, train.Flags(init_from=str(start)))
      run = Run.open(folder)
      frozen = train._frozen_params(run, initial.recorded(folder))()
      wide, narrow = (run.params(dtype=x)[0] for x in ("float32", "bfloat16"))
      drawing = Pipeline.open(run, None)[0].generator.params
    for tree, kind in ((frozen, dtype), (narrow, dtype), (wide, "float32")):
      assert {x.dtype.name for x in jax.tree.leaves(tree)} == {kind}
    lines = read_json_lines(folder / "train" / "metrics" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), (frozen, narrow, wide))
    results.append((losses, rounded, drawing))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_base_that_is_absent_or_has_changed_is_refused(base, adapted, tmp_path, monkeypatch):
  folder = tmp_path / "copy"
  shutil.copytree(adapted, folder)
  moved = tmp_path / "base"
  config = read_json(folder / "train" / "config.json")
  config["run"]["init_from"]["source"] = str(moved)
  write_json(folder / "train" / "config.json", config)
  monkeypatch.setattr("cm3leon_jax.training.decoder.train", None)
  for change in ("another", "gone", None):
    with refused(UserError, str(moved)), one_device():
      Run.open(folder).params()
    with refused(UserError, str(moved)):
      train.main(settings_with(steps=9), folder, train.Flags())
    if change == "another":
      save_run(epath.Path(moved), OTHER)  # The digest of its checkpoint differs.
    elif change == "gone":
      shutil.move(moved / "train" / "checkpoints" / "7", tmp_path / "7")


@pytest.mark.slow
def test_a_bundle_has_the_rounded_sum_and_needs_no_base(adapted, tmp_path):
  with one_device():
    merged, _ = Run.open(adapted).params()
    bundle.write(tmp_path / "bundle", Run.open(adapted), merged, 3)
    found, step = Run.open(tmp_path / "bundle").params()
  assert step == 3
  rounded = jax.tree.map(lambda x: x.astype("float16").astype("float32"), merged)
  jax.tree.map(np.testing.assert_array_equal, found, rounded)
  with refused(UserError, str(tmp_path / "bundle")):
    initial.over(str(tmp_path / "bundle"), adapted)
