"""From jobs to files: every task leaves its pictures and texts, and every record says how they were made."""

import dataclasses

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding import draw, jobs
from cm3leon_jax.decoding.asks import TASKS, Ask
from cm3leon_jax.decoding.generator import Generator, Result, sample_seed
from cm3leon_jax.decoding.sampling import SamplingConfig
from cm3leon_jax.tokenizers import vqgan
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import random_params

SAMPLING = SETTINGS.sampling


def draw_all(form, workdir, folder, todo, clip, **options):
  with one_device():
    params = random_params(SETTINGS.model)
    return draw.draw_all(SETTINGS, form, workdir, epath.Path(folder), params, todo, clip, **options)


def ready(form, workdir, asks, clip):
  given = jobs.check_asks(form, asks, workdir)
  return jobs.make_jobs(SETTINGS, form, workdir, asks, given, clip, workdir)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
  path = tmp_path_factory.mktemp("given") / "a.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
  return str(path)


@pytest.fixture(scope="module")
def heldout(workdir, form, clip, tmp_path_factory):
  """(folder, jobs, records) of two captions with two settings of guidance and of retrieval."""
  folder = epath.Path(tmp_path_factory.mktemp("samples"))
  columns = [(n, dataclasses.replace(SAMPLING, guidance=g)) for n in (0, 2) for g in (1.0, 3.0)]
  todo = jobs.heldout_jobs(form, workdir, 2, 5, columns)
  return folder, todo, draw_all(form, workdir, folder, todo, clip)


@pytest.fixture(scope="module")
def every_task(workdir, form, clip, picture, tmp_path_factory):
  """(folder, records by task) of one ask of each task, 16 tokens of text at most, a document of 17."""
  folder = epath.Path(tmp_path_factory.mktemp("tasks"))
  fields = {
    "text_to_image": {"prompt": "red apple", "retrieve": 1, "keep_neighbors": True},
    "caption": {"image": picture, "length": 16},
    "question": {"image": picture, "prompt": "what is it?", "length": 16},
    "infill_text": {"prompt": "a <mask> house <mask>.", "length": 7},
    "infill_image": {"image": picture, "prompt": "red apple", "box": (2, 2, 6, 6)},
    "edit": {"image": picture, "prompt": "blue"},
    "interleaved": {"prompt": "red apple", "length": 17},
    "unconditional": {},
  }
  asks = [
    Ask(task, **fields[task], seed=i, row=i, sampling=SAMPLING) for i, task in enumerate(TASKS)
  ]
  # Without a head of their own for image codes the programs are compiled sooner.
  records = draw_all(
    form, workdir, folder, ready(form, workdir, asks, clip), clip, image_head=False
  )
  assert [record["task"] for record in records] == list(TASKS)
  return folder, {record["task"]: record for record in records}


def read(folder, name):
  return np.asarray(Image.open(folder / name))


def decode(workdir, codes):
  return dataclasses.replace(vqgan.ImageTokenizer.load(workdir / "vqgan"), batch_size=16).decode(
    np.array([codes])
  )[0]


def test_every_heldout_picture_has_a_file_and_a_record(workdir, heldout):
  folder, todo, records = heldout
  settings = [(r["prompt"], r["guidance"], r["retrieve"]) for r in records]
  assert settings == [
    (p, g, k) for k in (0, 2) for g in (1.0, 3.0) for p in ("red apple", "new house")
  ]
  for record, job in zip(records, todo):
    assert len(record["codes"]) == SETTINGS.vqgan.image_tokens
    np.testing.assert_array_equal(read(folder, record["file"]), decode(workdir, record["codes"]))
    assert len(record["neighbors"]) == record["retrieve"]
    assert all(
      n["license"] == "CC0-1.0" and n["attribution"] == "nobody" for n in record["neighbors"]
    )
    assert (record["key"], record["sample"], record["seed"], record["rank"]) == (
      job.key,
      0,
      job.ask.seed,
      None,
    )
    assert -1 <= record["clip_score"] <= 1
  assert len({r["file"] for r in records}) == 8
  assert (folder / "contact_sheet.png").exists()
  assert records[0]["codes"] != records[2]["codes"]  # Guidance changes the picture.
  assert records[0]["codes"] != records[4]["codes"]  # So do neighbors.


def test_records_say_how_a_sample_was_drawn(every_task):
  _, records = every_task
  for i, record in enumerate(records.values()):
    assert (
      SamplingConfig(**{f.name: record[f.name] for f in dataclasses.fields(SamplingConfig)})
      == SAMPLING
    )
    assert record["seed"] == i
    assert len(record["ids"]) == len(record["log_probs"])
    assert record["log_prob"] == pytest.approx(sum(record["log_probs"]), abs=1e-3)
    assert max(record["log_probs"]) <= 0
    assert record["log_prob"] < 0
  assert records["text_to_image"]["keep_neighbors"] is True
  assert {t for t, r in records.items() if r["clip_score"] is not None} == {
    "text_to_image",
    "caption",
    "infill_image",
  }


@pytest.mark.parametrize("task", ["text_to_image", "infill_image", "edit", "unconditional"])
def test_tasks_that_make_a_picture(workdir, every_task, task):
  folder, records = every_task
  record = records[task]
  np.testing.assert_array_equal(read(folder, record["file"]), decode(workdir, record["codes"]))
  if task != "infill_image":
    assert VOCAB.image_codes(record["ids"][:-1]).tolist() == record["codes"]
    assert record["ids"][-1] in (VOCAB.eos, VOCAB.brk)


def test_infill_keeps_the_codes_around_the_box(workdir, every_task, picture):
  given = (
    vqgan.ImageTokenizer.load(workdir / "vqgan")
    .encode(np.asarray(Image.open(picture))[None])[0]
    .reshape(4, 4)
  )
  made = np.array(every_task[1]["infill_image"]["codes"]).reshape(4, 4)
  outside = np.ones((4, 4), bool)
  outside[1:3, 1:3] = False
  np.testing.assert_array_equal(made[outside], given[outside])
  assert (made != given).any()


def test_tasks_that_write_a_text(form, every_task):
  _, records = every_task
  for task in ("caption", "question"):
    ids = np.array(records[task]["ids"])
    assert ids[-1] == VOCAB.eoss
    assert records[task]["text"].strip() == form.decode(ids[:-1]).strip()
    assert "file" not in records[task]
  infilled = records["infill_text"]
  assert len(infilled["filled"]) == 2
  first, second = infilled["filled"]
  assert first in infilled["text"]
  assert second in infilled["text"]
  assert infilled["text"].startswith("a")
  assert infilled["text"].endswith(".")


def test_a_document_continues_its_prompt(every_task):
  record = every_task[1]["interleaved"]
  assert record["text"].startswith("red apple")
  assert record["files"] == []
  assert len(record["ids"]) <= 17


def test_a_document_has_its_pictures_in_order(workdir, form, tmp_path):
  (job,) = ready(form, workdir, [Ask("interleaved", "red apple", length=60)], None)
  pictures = [VOCAB.image_ids(np.full(16, code)) for code in (3, 4)]
  ids = np.concatenate(
    [
      [VOCAB.brk],
      pictures[0],
      [VOCAB.brk],
      form.encode("blue car"),
      [VOCAB.brk],
      pictures[1],
      [VOCAB.eos],
    ]
  )
  result = Result(0, 0, 0, ids, np.zeros(len(ids), np.float32), False)
  (drawn,) = draw._Scribe(form, workdir, epath.Path(tmp_path), None, 1, batch_size=16).write(
    [job], [result]
  )
  assert drawn.record["text"] == "red apple\n<image>\nblue car\n<image>"
  assert drawn.record["files"] == ["000_red-apple_image0.png", "000_red-apple_image1.png"]
  for file, code in zip(drawn.record["files"], (3, 4)):
    np.testing.assert_array_equal(read(tmp_path, file), decode(workdir, [code] * 16))
  assert [isinstance(cell, str) for cell in drawn.cells] == [True, False, True, False]


def test_a_sheet_shows_pictures_and_texts(every_task, heldout):
  for folder in (every_task[0], heldout[0]):
    assert np.asarray(Image.open(folder / "contact_sheet.png")).std() > 10


class Brightness:
  """A CLIP that likes some pictures better than others."""

  resolution = 8

  def encode(self, text):
    return np.array([1], np.int32)

  def embed_images(self, images):
    return images.mean(axis=(1, 2, 3))[:, None] / 255

  def embed_texts(self, texts):
    return np.ones((len(texts), 1))


def test_samples_are_ranked_by_their_scores(workdir, form, tmp_path):
  asks = [
    Ask(prompt=prompt, seed=3 + i, sampling=SAMPLING, row=i)
    for i, prompt in enumerate(("red apple", "blue car"))
  ]
  todo = ready(form, workdir, asks, None)
  options = {"samples": 3, "batch_size": 2}
  plain = draw_all(form, workdir, tmp_path / "plain", todo, Brightness(), **options)
  ranked = draw_all(form, workdir, tmp_path / "ranked", todo, Brightness(), rank=True, **options)
  assert [(r["prompt"], r["sample"], r["rank"]) for r in plain[:4]] == [
    *(("red apple", n, None) for n in range(3)),
    ("blue car", 0, None),
  ]
  assert [r["seed"] for r in plain] == [sample_seed(3 + i, n) for i in range(2) for n in range(3)]
  for start in (0, 3):
    part = ranked[start : start + 3]
    assert [r["rank"] for r in part] == [1, 2, 3]
    assert [r["clip_score"] for r in part] == sorted((r["clip_score"] for r in part), reverse=True)
    by_sample = [{**r, "rank": None} for r in sorted(part, key=lambda r: r["sample"])]
    assert by_sample == plain[start : start + 3]
  assert [r["sample"] for r in ranked] != [r["sample"] for r in plain]
  assert len({tuple(r["codes"]) for r in plain}) == 6
  # A sample is the same by itself as in the company of others.
  (alone,) = draw_all(form, workdir, tmp_path / "alone", todo[1:], Brightness(), batch_size=1)
  assert alone["codes"] == plain[3]["codes"]


def test_pictures_are_written_before_the_last_batch_is_drawn(workdir, form, tmp_path, monkeypatch):
  todo = ready(form, workdir, [Ask(prompt="red apple", sampling=SAMPLING)], None)
  seen, original = [], Generator._batch

  def batch(*args):
    seen.append(sorted(p.name for p in tmp_path.iterdir()))
    return original(*args)

  monkeypatch.setattr(Generator, "_batch", batch)
  draw_all(form, workdir, tmp_path, todo, None, samples=2, batch_size=1)
  assert seen == [[], ["000_red-apple_guidance3_retrieve0_sample0.png"]]


def test_a_bar_counts_every_token():
  bar = []
  progress = draw._Progress(
    type("Bar", (), {"update": lambda self, n: bar.append(n)})(), batch_size=4
  )
  progress.begin(6)
  progress.tell(10)
  progress.end(4, 64)
  progress.tell(16)
  progress.end(2, 32)
  assert bar == [40, 24, 32, 0]


def test_a_caption_without_words_comes_last():
  one = lambda score: draw.Drawn({"clip_score": score}, ())
  assert [d.record["clip_score"] for d in draw.ranked([one(None), one(-0.5), one(0.5)])] == [
    0.5,
    -0.5,
    None,
  ]


def test_the_trainers_grid(workdir, tmp_path):
  with one_device():
    draw.sample_drawer(SETTINGS, workdir, tmp_path / "grid")(random_params(SETTINGS.model), 12)
  assert [p.name for p in (tmp_path / "grid").iterdir()] == ["step_000012.png"]


def test_a_request_without_a_prompt_is_refused(workdir, form):
  with pytest.raises(UserError, match="task text_to_image needs a prompt"):
    jobs.check_asks(form, [Ask()], workdir)


@pytest.mark.parametrize(
  ("name", "expected"), [("Red  apple!", "red-apple"), ("...", "prompt"), ("x" * 99, "x" * 40)]
)
def test_slug(name, expected):
  assert draw.slug(name) == expected
