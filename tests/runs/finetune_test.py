import json
import pathlib

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.runs import finetune
from tests.refusals import refused


@pytest.fixture
def started(monkeypatch):
  """Replaces the command of a run. Returns the flags of each call."""
  calls = []
  monkeypatch.setattr(finetune, "_start", lambda flags, shown: calls.append((flags, shown)))
  return calls


def image(value, side=6):
  return np.full((side, side, 3), value, np.uint8)


def test_a_folder_is_named_to_the_command(started, tmp_path, monkeypatch):
  finetune.run(tmp_path, "W", "scenes", minutes=2.5, max_forgetting=0.03, fields={"train.steps": 7})
  [(flags, shown)] = started
  assert flags == [
    "--config=own:2.5", "--workdir=W", "--init_from=scenes", f"--config.raw.source={tmp_path}",
    "--config.train.max_forgetting=0.03", "--config.train.steps=7",
  ]  # fmt: skip
  assert shown
  finetune.run(tmp_path, "W", "scenes", tokenizer="own", show_progress=False)
  assert (started[1][0][-1], started[1][1]) == ("--own_image_tokenizer", False)
  finetune.run(tmp_path, "W", "scenes", min_psnr=17.5, max_color_difference=12)
  assert started[2][0][-2:] == ["--min_psnr=17.5", "--max_color_difference=12"]
  monkeypatch.setenv("HOME", str(tmp_path))
  finetune.run("~/", "~/W", "scenes")
  assert {f"--workdir={tmp_path}/W", f"--config.raw.source={tmp_path}/"} <= {*started[3][0]}


def test_pairs_are_written_once_as_a_folder(started, tmp_path):
  Image.fromarray(image(9)).save(tmp_path / "a.png")
  pairs = [(str(tmp_path / "a.png"), "nine"), (image(3), "three"), (Image.new("L", (4, 4)), "none")]
  for _ in range(2):
    finetune.run(pairs, tmp_path / "W", "scenes")
  folder = tmp_path / "W" / finetune.GIVEN
  lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
  assert [line["caption"] for line in lines] == ["nine", "three", "none"]
  pixels = []
  for line in lines:
    with Image.open(folder / line["image"]) as opened:
      pixels.append(np.asarray(opened))
  np.testing.assert_array_equal(pixels[0], image(9))
  np.testing.assert_array_equal(pixels[1], image(3))
  assert pixels[2].shape == (4, 4, 3)
  assert f"--config.raw.source={folder}" in started[1][0]
  with refused(UserError):
    finetune.run(pairs[:2], tmp_path / "W", "scenes")


def test_records_become_a_task_and_images_stay_in_one_split(started, tmp_path):
  records = [
    {"image": image(i // 2), "question": f"what {i}?", "answer": str(i)} for i in range(60)
  ]
  finetune.run(records, tmp_path, "scenes")
  folder = tmp_path / finetune.GIVEN
  splits = {
    split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    for split in ("train", "heldout")
  }
  groups = [{line["group"] for line in lines} for lines in splits.values()]
  assert not groups[0] & groups[1]
  assert [len(g) for g in groups] == [28, 2]
  texts = {line["texts"]["answer"] for lines in splits.values() for line in lines}
  assert texts == {str(i) for i in range(60)}
  [task] = json.loads((folder / "tasks.yaml").read_text())
  assert (task["target"], task["heldout"]) == ("answer", "heldout")
  assert f"--config.instructions.tasks={folder / 'tasks.yaml'}" in started[0][0]


def test_a_pair_may_name_its_concept(started, tmp_path):
  data = [(image(3), "a cup", "cup"), (image(4), "a red cup", "cup"), (image(5), "a key")]
  finetune.run(data, tmp_path, "scenes")
  lines = (tmp_path / finetune.GIVEN / "pairs.jsonl").read_text().splitlines()
  assert [json.loads(line).get("concept") for line in lines] == ["cup", "cup", None]


def edit(number=0, after=99):
  return {"before": image(number), "after": image(after), "instruction": "make it bright"}


def test_records_that_share_an_image_directly_or_through_others_are_in_one_split(started, tmp_path):
  chains = [edit(3 * i + j, 3 * i + j + 1) for i in range(30) for j in range(2)]
  finetune.run(chains, tmp_path, "scenes")
  images = {}
  for split in ("train", "heldout"):
    lines = (tmp_path / finetune.GIVEN / f"{split}.jsonl").read_text().splitlines()
    images[split] = {name for line in lines for name in json.loads(line)["images"].values()}
  assert not images["train"] & images["heldout"]
  assert [len(images[split]) for split in images] == [84, 6]


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=20))
def test_groups_are_the_components_of_shared_images(records):
  names = [[f"{i}.png" for i in record] for record in records]
  groups = finetune._groups(names)
  graph = components(records)
  assert [[a == b for b in groups] for a in groups] == [[a == b for b in graph] for a in graph]
  assert set(groups) == set(range(len(set(groups))))


def components(records):
  """Returns the smallest image of each record's component, which spreads over shared images."""
  least = {image: image for record in records for image in record}
  for _ in records:
    for record in records:
      least |= dict.fromkeys(record, min(least[image] for image in record))
  return [least[record[0]] for record in records]


@pytest.mark.parametrize(
  "data",
  [
    "absent_folder", 7, [], [image(3)], [("a.png",)], [{"image": image(3)}],
    [(image(3), 5)], [("absent.png", "a caption")], [edit(), {"before": image(3)}],
    [edit(), {**edit(), "instruction": 3}], [edit(i) for i in range(9)], [(image(3), "a"), edit()],
    [edit(0, i) for i in range(1, 30)], [(image(3), "a cup", 7)],
    [(np.zeros((6, 6, 3)), "a caption")],
  ],
)  # fmt: skip
def test_other_data_is_refused_before_anything_starts(started, tmp_path, data, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with refused(UserError):
    finetune.run(data, tmp_path / "W", "scenes")
  assert started == []
  assert not (tmp_path / "W").exists()


@pytest.mark.parametrize(
  "options",
  [
    {"minutes": 0}, {"minutes": "ten"}, {"minutes": float("inf")}, {"minutes": float("nan")},
    {"tokenizer": "other"}, {"fields": ["train.steps=3"]},
  ],
)  # fmt: skip
def test_other_options_are_refused(started, tmp_path, options):
  with refused(UserError):
    finetune.run(tmp_path, tmp_path / "W", "scenes", **options)
  assert started == []


def test_a_file_is_no_workdir(started, tmp_path):
  (tmp_path / "W").write_text("mine")
  with refused(UserError):
    finetune.run([(image(3), "three")], tmp_path / "W", "scenes")
  assert started == []
  assert (tmp_path / "W").read_text() == "mine"


def test_the_error_of_a_command_is_raised(tmp_path):
  with refused(UserError):
    finetune.run(pathlib.Path(tmp_path), tmp_path / "W", "no_such_base", show_progress=False)


def test_a_command_that_ends_without_an_error_is_reported_with_its_code(tmp_path, monkeypatch):
  program = tmp_path / "python"
  program.write_text("#!/bin/sh\necho '[5/10] train: 34 s'\nexit 9\n")
  program.chmod(0o755)
  monkeypatch.setattr(finetune.sys, "executable", str(program))
  with refused(UserError):
    finetune.run(pathlib.Path(tmp_path), tmp_path / "W", "scenes", show_progress=False)
