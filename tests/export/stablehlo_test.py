"""Tests that a StableHLO export, run with jax alone, generates the same results as `Generator`."""

import importlib.util
import json
import os
import pathlib
import runpy
import shlex
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.export import stablehlo
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device
from tests.launched import python
from tests.models.tiny import random_params
from tests.reports.snippets import snippets

CAPTIONS = [[100, 101, 102], [200], [300, 301, 302, 303, 304, 305]]
SEEDS = [3, 4, 5]
PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers")
PACKAGES += ("tokenizers",)
ALONE = """
import json, runpy, sys

sys.path[:0] = [".", sys.argv[1]]
import numpy as np
import serve_example
from artifacts import load, load_weights

weights, captions, seeds = load_weights(), json.loads(sys.argv[2]), json.loads(sys.argv[3])
images, tokens = serve_example.draw(weights, captions, seeds)
alone = serve_example.draw(weights, captions[1:2], seeds[1:2])
unlike = serve_example.draw(weights, captions, seeds, guidance=[0.0, 1.0, 3.0])[1]
drawn, _ = serve_example.draw(weights, [json.loads(sys.argv[4])], [0])
codes = load("encode_image")(weights, images=images)
decoded = load("decode_image")(weights, tokens=codes)
np.savez("served.npz", images=images, tokens=tokens, image=alone[0], token=alone[1], unlike=unlike,
         codes=codes, decoded=decoded, drawn=drawn)
sys.argv, ids = sys.argv[5:], sys.argv[4]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.argv[1:] = ["--ids", " ".join(map(str, json.loads(ids)))]
sys.modules["tokenizers"] = None
runpy.run_path(sys.argv[0], run_name="__main__")
try:
  import cm3leon_jax
except ModuleNotFoundError as error:
  print(error)
"""


@pytest.fixture(scope="module")
def served(run, folder, tmp_path_factory):
  """Runs an export in a process that has only jax; returns its results and printed lines."""
  site = tmp_path_factory.mktemp("site")
  for name in PACKAGES:
    package = pathlib.Path(importlib.util.find_spec(name).origin).parent
    (site / name).symlink_to(package)
  [(_, command)] = snippets((folder / "README.md").read_text())  # Command in the model card.
  python, *command = shlex.split(command)
  ids = TextTokenizer(run / "text_tokenizer", VOCAB).encode(command[-1]).tolist()
  arguments = [str(site), *map(json.dumps, (CAPTIONS, SEEDS, ids)), *command]
  assert python == "python"
  one_device = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
  process = subprocess.run(
    [sys.executable, "-I", "-S", "-c", ALONE, *arguments],
    cwd=folder, capture_output=True, text=True, check=False,
    env={**os.environ, "XLA_FLAGS": one_device},
  )  # fmt: skip
  assert process.returncode == 0, process.stderr[-3000:]
  with np.load(pathlib.Path(folder) / "served.npz") as results:
    return dict(results), process.stdout.splitlines()


@pytest.fixture(scope="module")
def generated(run):
  """Returns the results of `Generator` for the requests that `served` runs."""
  image = [request.text_to_image(VOCAB, 16, caption) for caption in CAPTIONS]
  with one_device():
    generator = Generator(random_params(SETTINGS.model), GeneratorConfig.of(SETTINGS))
    tokens = np.stack([r.tokens[:16] for r in generator.generate(image, SEEDS)])
  images = ImageTokenizer.load(run / "vqgan").decode(VOCAB.image_codes(tokens))
  return images, tokens


def test_images_served_by_jax_alone_are_those_of_the_generator(served, generated):
  results, printed = served
  images, tokens = generated
  np.testing.assert_array_equal(results["tokens"], tokens)
  np.testing.assert_array_equal(results["images"], images)
  assert printed[-1] == "No module named 'cm3leon_jax'"


def test_one_artifact_serves_any_batch(served, generated):
  results, _ = served
  np.testing.assert_array_equal(results["token"], generated[1][1:2])
  np.testing.assert_array_equal(results["image"], generated[0][1:2])


def test_settings_are_those_of_each_sample(served):
  """Only the third sample has the default guidance of 3, so only its tokens stay the same."""
  results, _ = served
  same = (results["unlike"] == results["tokens"]).all(axis=1)
  assert same.tolist() == [False, False, True]


def test_images_become_tokens_and_images_again(served, run):
  results, _ = served
  tokenizer = ImageTokenizer.load(run / "vqgan")
  codes = tokenizer.encode(results["images"])
  np.testing.assert_array_equal(results["codes"], VOCAB.image_ids(codes))
  np.testing.assert_array_equal(results["decoded"], tokenizer.decode(codes))


def test_the_command_of_the_card_writes_the_image(served, folder):
  results, printed = served
  np.testing.assert_array_equal(Image.open(folder / "image.png"), results["drawn"][0])
  assert printed[:2] == ["image.png", "image.png"]  # The second time by ids.


def test_a_caption_is_encoded_as_in_training(folder, run):
  tokenizer = runpy.run_path(str(folder / "artifacts.py"))["load_tokenizer"]()
  found = tokenizer.encode("</s> red apple", add_special_tokens=False).ids
  expected = TextTokenizer(run / "text_tokenizer", VOCAB).encode("</s> red apple")
  np.testing.assert_array_equal(found, expected)
  assert VOCAB.eos not in found


def test_the_manifest_names_what_a_server_needs_and_no_folder_of_this_machine(folder):
  manifest = json.loads((folder / stablehlo.MANIFEST).read_text())
  assert manifest["jax"] == jax.__version__
  for artifact in manifest["artifacts"].values():
    assert artifact["platforms"] == ["cpu", "cuda", "tpu"]
  arguments = manifest["artifacts"]["generate_image"]["arguments"]
  assert arguments["prompts"] == {"dtype": "int32", "shape": ["b", "p"]}
  assert arguments["guidance"] == {"dtype": "float32", "shape": ["b"]}
  results = manifest["artifacts"]["generate_image"]["results"]
  assert results["images"] == {"dtype": "uint8", "shape": ["b", 8, 8, 3]}
  assert manifest["vocab"]["image_size"] == 64
  unconditional = [VOCAB.eos, VOCAB.mask(0), VOCAB.brk]
  ends = {"start": [VOCAB.eos], "end": [VOCAB.brk]}
  assert manifest["prompt"] == {**ends, "unconditional": unconditional}
  assert manifest["sampling"]["guidance"] == SETTINGS.sampling.guidance
  for artifact in folder.glob("*.stablehlo"):
    for part in (b".py", str(pathlib.Path(stablehlo.__file__).parent).encode()):
      assert part not in artifact.read_bytes()


def test_several_devices_split_the_batch_of_one_artifact(folder, monkeypatch):
  loader = runpy.run_path(str(folder / "artifacts.py"))
  mesh = jax.make_mesh((8,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
  decode, weights = loader["load"]("decode_image"), loader["load_weights"]()
  tokens = VOCAB.image_ids(np.random.default_rng(0).integers(0, 64, (16, 16)))

  def decoded(weights, tokens):
    return decode(weights, tokens=tokens)

  specs = {"in_specs": (jax.P(), jax.P("b")), "out_specs": jax.P("b")}
  split = jax.shard_map(decoded, mesh=mesh, check_vma=False, **specs)
  found = jax.jit(split)(weights, tokens)
  assert len(found.sharding.device_set) == 8
  np.testing.assert_array_equal(found, decode(weights, tokens=tokens))


# Compiles for TPU in a new process, because libtpu cannot be unloaded: generate_image for one
# device of v5e-8, and for all eight with shard_map and with automatic partitioning; the other
# functions for one device.
FOR_TPU = """
import collections, json, re, sys
from cm3leon_jax.planning import topology
topology.prepare()
import jax, numpy as np

sys.path.insert(0, sys.argv[1])
from artifacts import ABOUT, load

def count(compiled):
  text = compiled.as_text()
  return len(re.findall(r" (?:all-\\w+|collective-\\w+|reduce-scatter)(?:-start)?\\(", text))

devices = topology.load("v5e-8").devices
sizes = {"b": 8, "p": 32, "u": 32}
found = {}
for chips in (1, 8):
  types = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.Mesh(np.array(devices[:chips]), ("b",), axis_types=types)

  def typed(about, split):
    spec = [("b" if split and n == "b" else None) for n in about["shape"]]
    shape = [sizes.get(n, n) for n in about["shape"]]
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, np.dtype(about["dtype"]), sharding=sharding)

  def is_array(x):
    return "dtype" in x

  weights = {k: typed(x, False) for k, x in ABOUT["weights"].items()}
  for name in ABOUT["artifacts"] if chips == 1 else ["generate_image"]:
    about = ABOUT["artifacts"][name]["arguments"]
    arguments = jax.tree.map(lambda x: typed(x, True), about, is_leaf=is_array)
    call = load(name)
    found[f"{name} {chips}"] = count(call.lower(weights, **arguments).compile())
    if chips == 8:
      split = jax.shard_map(lambda weights, arguments: call(weights, **arguments), mesh=mesh,
                            in_specs=(jax.P(), jax.P("b")), out_specs=jax.P("b"), check_vma=False)
      found["shard_map"] = count(jax.jit(split).lower(weights, arguments).compile())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.tpu_backend
def test_the_artifacts_compile_for_a_tpu_and_split_over_eight(folder):
  pytest.importorskip("libtpu")
  process = python(FOR_TPU, folder)
  assert process.returncode == 0, process.stderr[-3000:]
  collectives = json.loads(process.stdout.splitlines()[-1])
  assert set(collectives) == {
    *(f"{name} 1" for name in json.loads((folder / stablehlo.MANIFEST).read_text())["artifacts"]),
    "generate_image 8",
    "shard_map",
  }
  assert collectives.pop("generate_image 8") > 0
  assert set(collectives.values()) == {0}
