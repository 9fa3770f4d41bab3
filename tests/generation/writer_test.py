import dataclasses

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.prompt_file import make_task
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.text_tasks import Interleaved
from cm3leon_jax.generation.writer import Writer
from cm3leon_jax.run.run import Run
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import random_params

SAMPLING = SETTINGS.sampling


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("given") / "a.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
  return str(path)


def generate(folder, workdir, tasks, clip, **options):
  with one_device():
    params = random_params(SETTINGS.model)
    pipeline = Pipeline.load(Run(workdir, SETTINGS), params, clip, **options)
    writer = Writer(folder)
    return writer.finish(pipeline.generate(tasks, on_batch=writer.save_images))


@pytest.fixture(scope="module")
def every_task(workdir, clip, image_file, tmp_path_factory):
  """Returns (folder, task -> record); texts have at most 16 tokens, documents at most 17."""
  folder = epath.Path(tmp_path_factory.mktemp("tasks"))
  fields = {
    "text_to_image": {"prompt": "red apple", "retrieve": 1, "keep_neighbors": True},
    "infill_text": {"prompt": "a <mask> house <mask>.", "length": 7},
    "infill_image": {"image": image_file, "prompt": "red apple", "box": (2, 2, 6, 6)},
    "instruct": {"image": image_file, "prompt": "blue <break> <image>"},
    "interleaved": {"prompt": "red apple", "length": 17},
    "unconditional": {},
  }
  tasks = [
    make_task(name, fields[name], seed=i, row=i, sampling=SAMPLING) for i, name in enumerate(fields)
  ]
  # Without a separate head for image codes, programs compile faster.
  records = generate(folder, workdir, tasks, clip, image_head=False)
  return folder, {line["task"]: line for line in records}


def read(folder, name):
  return np.asarray(Image.open(folder / name))


def decode(workdir, codes):
  return dataclasses.replace(ImageTokenizer.load(workdir / "vqgan"), batch_size=16).decode(
    np.array([codes])
  )[0]


def test_records_say_how_a_sample_was_made(every_task):
  _, records = every_task
  for i, line in enumerate(records.values()):
    sampling = {field.name: line[field.name] for field in dataclasses.fields(SamplingConfig)}
    assert SamplingConfig(**sampling) == SAMPLING
    assert line["seed"] == i
    assert len(line["tokens"]) == len(line["log_probs"])
    assert line["log_prob"] == pytest.approx(sum(line["log_probs"]), abs=1e-3)
    assert max(line["log_probs"]) <= 0
    assert line["log_prob"] < 0
  assert records["text_to_image"]["keep_neighbors"] is True
  scored = {task for task, line in records.items() if line["clip_score"] is not None}
  assert scored == {"text_to_image", "infill_image"}


@pytest.mark.parametrize("task", ["text_to_image", "infill_image", "instruct", "unconditional"])
def test_tasks_that_make_an_image(workdir, every_task, task):
  folder, records = every_task
  record = records[task]
  np.testing.assert_array_equal(read(folder, record["file"]), decode(workdir, record["codes"]))
  if task != "infill_image":
    assert VOCAB.image_codes(record["tokens"][:-1]).tolist() == record["codes"]
    assert record["tokens"][-1] in (VOCAB.eos, VOCAB.brk)


def test_infill_keeps_the_codes_around_the_box(workdir, every_task, image_file):
  tokenizer = ImageTokenizer.load(workdir / "vqgan")
  given = tokenizer.encode(np.asarray(Image.open(image_file))[None])[0].reshape(4, 4)
  made = np.array(every_task[1]["infill_image"]["codes"]).reshape(4, 4)
  outside = np.ones((4, 4), bool)
  outside[1:3, 1:3] = False
  np.testing.assert_array_equal(made[outside], given[outside])
  assert (made != given).any()


def test_tasks_that_write_a_text(every_task):
  _, records = every_task
  infilled = records["infill_text"]
  assert len(infilled["filled"]) == 2
  first, second = infilled["filled"]
  assert first in infilled["text"]
  assert second in infilled["text"]
  assert infilled["text"].startswith("a")
  assert infilled["text"].endswith(".")


def sample_of(task, codes=(), segments=(), index=0):
  image = np.zeros((8, 8, 3), np.uint8)
  segments = segments or (image,) * len(codes)
  zero = np.zeros(1, np.float32)
  return Sample(task, index, 0, segments, codes, (), np.zeros(1, np.int32), zero, False, ())


def test_names_of_files(tmp_path):
  codes = (np.zeros(16, np.int32),)
  task = TextToImage("Red apple", row=2)
  name = "002_red-apple_guidance3_retrieve2"
  assert Writer(tmp_path).file_names(sample_of(task, codes)) == [f"{name}.png"]
  assert Writer(tmp_path, 2).file_names(sample_of(task, codes, index=1)) == [f"{name}_sample1.png"]
  document = Writer(tmp_path).file_names(sample_of(Interleaved("red apple"), codes * 2))
  assert document == [f"000_red-apple_image{i}.png" for i in range(2)]
