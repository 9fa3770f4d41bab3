import pytest

from benchmarks import (
  copying,
  experiment,
  learning,
  learning_table,
  scene_retrieval,
  tokenizers,
)
from cm3leon_jax.files.json_files import write_json


def row(group, concept, half, right):
  facts = {"group": group, "concept": concept, "half": half, "right": right, "lookup": False}
  return {**facts, "seed": 1, "caption": ""}


def run_of(seed, rows):
  bits = {key: [1.0, 3.0] for key in learning_table.BITS}
  return {
    "condition": "one_codebook", "seed": seed, "rows": rows, "bits": bits, "concepts": ["a", "b"],
    "halves": ["choose", "report"],
  }  # fmt: skip


def every_group(half, right):
  groups = [group for group in learning_table.TITLES if group not in ("color named", "one object")]
  return [row(group, f"red {group} top left", half, right) for group in groups]


def test_halves_are_not_mixed_and_captions_of_one_object_are_counted_apart():
  rows = every_group("choose", True) + every_group("report", False)
  for half, first, second in (("choose", True, True), ("report", True, False)):
    rows.append(row("color named", "red bell top left", half, first))
    rows.append(row("color named", "blue key top left, red bell top right", half, second))
  table = learning_table.table([run_of(0, rows), run_of(1, rows)])
  means = {
    half: {n: v["mean"] for n, v in of["one_codebook"].items() if n != "seeds"}
    for half, of in table.items()
  }
  assert (means["choose"]["rare/right"], means["report"]["rare/right"]) == (1, 0)
  assert (means["choose"]["bits/own"], means["report"]["bits/own"]) == (1, 3)
  assert means["report"]["color named/right"] == pytest.approx(0.5)
  assert means["report"]["one object/right"] == 1
  assert table["report"]["one_codebook"]["one object/right"]["count"] == 2
  assert "one_codebook (2 seeds)" in learning_table.markdown(table)


def test_bars_are_means_of_the_reporting_half_and_dots_are_seeds():
  rows = [*every_group("choose", True), *every_group("report", False)]
  for half, concept in (("choose", "red bell top left"), ("report", "blue key top left")):
    rows.append(row("color named", concept, half, True))
  other = [{**one, "right": True} for one in rows]
  [axes] = learning_table.figure_of([run_of(0, rows), run_of(1, other)]).axes
  named = ("color named", "one object")  # The two rows of one object, correct with both seeds.
  expected = [100 if group in named else 50 for group in learning_table.SHOWN]
  assert [bar.get_height() for bar in axes.patches] == expected
  dots = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "."]
  assert dots == [[100 if group in named else 0 for group in learning_table.SHOWN], [100] * 5]


def test_the_table_has_all_finished_runs_of_a_folder(tmp_path):
  for name in ("shape_color_seed_1", "one_codebook_seed_0", "shape_color_seed_10"):
    write_json(tmp_path / "steps_20" / name / "measured" / "measured.json", {"step": name})
  (tmp_path / "steps_20" / "shape_color_seed_2" / "train").mkdir(parents=True)
  write_json(tmp_path / "steps_7" / "two_places_seed_0" / "measured" / "measured.json", {})
  found = [(run["condition"], run["seed"], run["step"]) for run in learning.finished(tmp_path, 20)]
  assert found == [
    ("one_codebook", 0, "one_codebook_seed_0"),
    ("shape_color", 1, "shape_color_seed_1"),
    ("shape_color", 10, "shape_color_seed_10"),
  ]


def test_a_concept_belongs_to_one_half():
  halves = [learning.half_of(f"object {i}") for i in range(400)]
  assert halves == [learning.half_of(f"object {i}") for i in range(400)]
  assert 150 < halves.count("choose") < 250


def test_a_decoder_copies_if_the_document_saves_a_quarter_of_the_bits():
  def run(seed, after, without):
    bits = {"own": after, "none": without, "own elsewhere": 9.0}
    return {"condition": "shape_color", "width": 56, "head_size": 64, "seed": seed, "bits": bits}

  narrow = {**run(0, 0.9, 1.0), "head_size": 28}
  runs = [run(0, 0.75, 1.0), run(1, 0.76, 1.0), run(2, 0.2, 2.0), narrow]
  assert copying.markdown(runs).splitlines()[2:] == [
    "| shape_color | 56 | 64 | 0.75, 0.76, 0.20 | 1.00, 1.00, 2.00 | 0.75, 0.76, 0.10 | 2 of 3 |",
    "| shape_color | 56 | 28 | 0.90 | 1.00 | 0.90 | 0 of 1 |",
  ]


def test_widths_change_the_decoder_and_nothing_of_its_data():
  plain = learning.fields("shape_color", 3, 1_500)
  narrow = copying.fields("shape_color", 56, 64, 3, 1_500)
  assert {f: v for f, v in narrow.items() if f not in plain} == {
    "model.width": 56, "model.head_size": 64, "model.mlp_width": 154,
  }  # fmt: skip
  assert plain.items() <= narrow.items()


def test_all_conditions_share_tokenizers_of_one_world(tmp_path, monkeypatch):
  ran, linked = [], []
  monkeypatch.setattr(
    experiment, "run_stage", lambda name, _, folder, data: ran.append((name, data))
  )
  monkeypatch.setattr(experiment, "link_stages", lambda *arguments: linked.append(arguments))
  for data, _ in learning.CONDITIONS.values():
    learning.prepare(tmp_path, data)
  names = [name for name, _ in ran]
  assert names.count("train_text_tokenizer") == names.count("train_clip") == 1
  assert names.count("train_vqgan") == 2  # With one codebook, and with pairs.
  for name, data in ran:
    if name.startswith("train_"):
      assert data["scenes.shares"] == learning.RARE["scenes.shares"]
  made = {tuple(data.items()) for name, data in ran if name == "encode_documents"}
  assert made == {tuple(data.items()) for data, _ in learning.CONDITIONS.values()}


def test_older_measurements_keep_their_codes_and_scenes(tmp_path):
  retrieval = scene_retrieval.Experiment(tmp_path, steps=10, heldout=70, judged=2)
  compared = tokenizers.Experiment(tmp_path, codes=0, minutes=1, decoder_minutes=1, given={})
  of = [
    retrieval.settings(retrieval.overrides()), compared.settings(compared.overrides("restarts")),
  ]  # fmt: skip
  for settings in of:
    assert (settings.vqgan.quantizer, settings.vqgan.code_dim) == ("", 8)
    assert settings.model.code_colors == 0
    assert settings.scenes.shares == learning.RARE["scenes.shares"]
  assert [settings.vqgan.learning_rate for settings in of] == [0.012, 0.005]
