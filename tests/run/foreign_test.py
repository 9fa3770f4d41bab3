"""Tests that a bundle or export of a stranger is read, or refused in one sentence."""

import json
import os
import pathlib
import shutil
import signal

from etils import epath
import numpy as np
import pytest
import tensorstore

from cm3leon_jax.commands import export
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import bundle
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import FOREIGN_VALUES, read_json, write_json
from cm3leon_jax.run.run import Run
from cm3leon_jax.weights import reading, sealing
from tests.export.conftest import with_bank
from tests.generation.run import SETTINGS, one_device
from tests.refusals import refused

NAMES = ("bundle", "hf", "orbax")
INDEX = "documents/bank_pairs/index.json"
MANY = '{"ids": [' + "0," * FOREIGN_VALUES + "0]}"


@pytest.fixture(scope="module")
def models(run, tmp_path_factory):
  """Returns a folder with a bundle with a bank, and an export in each format."""
  root = epath.Path(tmp_path_factory.mktemp("models"))
  with one_device():
    params, step = reading.load_params(run / "train", SETTINGS.model)
    bundle.write(root / "bundle", with_bank(run, root / "run"), params, step)
  for name in NAMES[1:]:
    export.main(SETTINGS, run, export.Flags(format=name, output=str(root / name)))
  return pathlib.Path(root)


def text(name, content):
  return lambda folder: (folder / name).write_text(content)


def link(name, to):
  return lambda folder: ((folder / name).unlink(missing_ok=True), (folder / name).symlink_to(to))


def pipe(name):
  return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))


def fields(name, change):
  def edit(folder):
    stored = read_json(folder / name)
    change(stored)
    write_json(folder / name, stored)

  return edit


def digest_of(name):
  return fields("bundle.json", lambda x: x["digests"].update({name: "0" * 64}))


def array(change, rows=5, name="neighbors/train/documents"):
  def edit(folder):
    folder = folder / name
    fields("zarr.json", change)(folder)
    write_json(folder / "index.json", {"schema_version": 1, "rows": rows})

  return edit


def large_chunk(folder):
  found = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/params/"}).result()
  about = json.loads(found["embed/.zarray"])
  found["embed/.zarray"] = json.dumps({**about, "chunks": [10**9, about["chunks"][1]]})


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
# Name -> model, change of its files. "=" in the name of a model: the digests are computed again.
ATTACKS = {
  "text doubled": ("bundle=", fields("text_tokenizer/tokenizer.json",
                                     lambda x: x.update(normalizer=REPLACE))),
  "endless weights": ("bundle", link("vqgan/params.safetensors", "/dev/zero")),
  "no digest": ("bundle", fields("bundle.json", lambda x: x["digests"].pop("clip/config.json"))),
  "file outside": ("bundle", digest_of("/etc/hostname")),
  "link to itself": ("bundle", link("config.json", "config.json")),
  "unlisted run": ("bundle", lambda folder: shutil.copytree(folder / "clip", folder / "train")),
  "pipe": ("bundle", pipe("bundle.json")),
  "many values": ("bundle", text("bundle.json", MANY)),
  "header": ("bundle=", lambda folder: (folder / "documents/bank_pairs/offsets.npy").write_bytes(
    b"\x93NUMPY\1\0\5\0(('''\n")),
  "chunk": ("bundle=", array(lambda x: x["chunk_grid"]["configuration"].update(
    chunk_shape=[10**9, x["shape"][1]]))),
  "compressed": ("bundle=", array(lambda x: x["codecs"].append({"name": "gzip"}))),
  "many rows": ("bundle=", array(lambda x: x.update(shape=[10**12, *x["shape"][1:]]), 10**12)),
  "replay rows": ("bundle=", array(lambda x: x.update(shape=[10**12, *x["shape"][1:]]), 10**12,
                                   "replay/neighbors/train_pairs/ids")),
  "replay shards": ("bundle=", fields("replay/documents/train_pairs/index.json",
                                      lambda x: x.update(shards={"000000": 1}))),
  "replay lengths": ("bundle=", lambda folder: np.save(
    folder / "replay/documents/train_pairs/lengths.npy", np.array(["a"]))),
  "first of the bank": ("bundle=", text("neighbors/train/rows.json", '{"first_bank": 1000000}')),
  "shard outside": ("bundle=", fields(INDEX, lambda x: x.update(shards={"../x": 5}))),
  "bucket": ("bundle", fields("bundle.json", lambda x: x.update(
    base={"name": "gs://bucket/x", "digest": ""}))),
  "base": ("bundle", fields("bundle.json", lambda x: x.update(base=[1]))),
  "other CLIP": ("bundle", fields("bundle.json", lambda x: x["settings"]["retrieval"].update(
    clip="/etc"))),
  "layers": ("bundle", fields("bundle.json", lambda x: x["settings"]["model"].update(
    num_layers=10**7))),
  "blocks": ("bundle=", fields("vqgan/config.json", lambda x: x["vqgan"].update(
    decoder_blocks=[10**7, 1]))),
  "about a pipe": ("hf", pipe("export.json")),
  "settings": ("hf", fields("export.json", lambda x: x.update(settings=[1]))),
  "endless file": ("orbax", link("params/d/zero", "/dev/zero")),
  "folder elsewhere": ("orbax", link("params/d/usr", "/usr")),
  "no tree": ("orbax=", text("params/_METADATA", "[]")),
  "endless parameters": ("orbax", fields("digests.json", lambda x: x.update(
    {"params//dev/zero": "0"}))),
  "parameters outside": ("orbax", fields("digests.json", lambda x: x.update(
    {"params/../../secret": "0"}))),
  "array chunk": ("orbax=", large_chunk),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _limit():
  """Ends the tests instead of waiting for a pipe."""
  signal.alarm(60)
  yield
  signal.alarm(0)


def read(folder):
  """Opens all parts of a model."""
  with one_device():
    run = Run.open(folder, exports=True)
    return run.params()[1], run.text, run.images


def update_digests(folder):
  if (folder / "params").exists():
    write_json(folder / "digests.json", sealing.digests(epath.Path(folder / "params")))
  else:
    stored = read_json(folder / "bundle.json")
    digests = {name: digest(folder / name) for name in stored["digests"]}
    write_json(folder / "bundle.json", {**stored, "digests": digests})


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_model_is_refused_in_one_sentence(models, tmp_path, attack):
  model, change = ATTACKS[attack]
  folder = shutil.copytree(models / model.rstrip("="), tmp_path / "model")
  change(folder)
  if model.endswith("="):
    update_digests(folder)
  with pytest.raises(UserError, match=f"^[^\n]*{folder}[^\n]*$"):
    read(folder)


def test_an_export_without_digests_is_named_as_that(models, tmp_path):
  folder = shutil.copytree(models / "orbax", tmp_path / "model")
  (folder / "digests.json").unlink()
  with refused(UserError, str(folder), "export without its digests.json"):
    read(folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_models_are_read(models, name):
  assert read(models / name)[0] == 7
