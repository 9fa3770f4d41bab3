import dataclasses
from html import unescape
import json

import numpy as np
import pytest

from cm3leon_jax.config.instructions import InstructionsConfig, InstructionTask
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.reports import report, summary
from cm3leon_jax.stages import stages
from cm3leon_jax.training.watch.metrics import MetricsLog
from cm3leon_jax.weights.checkpoint import Checkpoints
from tests import launched
from tests.generation.run import SETTINGS
from tests.reports.run_files import NUMBERS, Page, headings, make_image, make_log, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  make_run(workdir)
  found = report.write(workdir, "examples/scenes/config.py:2")
  return workdir, found, (workdir / "report.html").read_text()


def test_page_is_one_file_with_its_images_inside(run):
  workdir, _, html = run
  page = Page(html)
  page.check_whole()
  assert str(workdir) not in html
  # 2 prompts with 6 samples, an original and 2 neighbors; 4 originals with reconstructions; 3
  # grids.
  assert len(page.images) == 2 * (6 + 1 + 2) + 2 * 4 + 3
  assert all(image.get("alt") for image in page.images)


def test_page_shows_every_number_of_the_summary(run):
  workdir, found, html = run
  assert found == json.loads((workdir / "summary.json").read_text())
  text = unescape(html)
  for folder in NUMBERS:
    assert json.dumps(found[folder], indent=2, sort_keys=True) in text


def test_the_first_line_names_the_targets_that_are_not_met(run):
  first = run[2].partition("<h1>Run report</h1>")[2].partition("Run of")[0]
  assert "Targets that are not met: PSNR of reconstructions, held-out images (dB): 19.5 " in first
  assert "Recall@2" not in first


def test_page_escapes_captions_and_reports_the_restart(run):
  assert "“disc &lt;6&gt; &amp; more”" in run[2]
  assert "The trainer stopped after step 30 and continued with step 31" in run[2]
  assert "CC-BY-SA-4.0" in run[2]
  assert "CC-BY-SA-4.0:\n  A. Painter. Recon" in run[2]  # Authors are listed once.


@pytest.mark.parametrize("only", [(), ("raw",), ("raw", "vqgan", "train")])
def test_page_lists_stages_that_have_not_run(tmp_path, only):
  make_run(tmp_path, only)
  found = report.write(tmp_path, "examples/scenes/config.py")
  assert found["unfinished"] == [folder for folder in NUMBERS if folder not in only]
  html = (tmp_path / "report.html").read_text()
  assert "<code>cm3leon evaluate</code> has not finished in this workdir" in html
  assert ("cm3leon train_vqgan</code> has not finished" in html) == ("vqgan" not in only)
  assert "not run" in html
  assert "<pre><code>cm3leon run --config=examples/scenes/config.py --workdir=DIR</code>" in html


def test_a_run_that_tunes_on_instructions_has_only_its_stages(tmp_path):
  task = InstructionTask(
    "count",
    templates=("{answer} <break> {image}",),
    target="answer",
    format="jsonl",
    heldout="heldout",
    records=9,
    heldout_records=9,
  )
  settings = dataclasses.replace(SETTINGS, instructions=InstructionsConfig(own_tasks=(task,)))
  write_json(tmp_path / "train" / "config.json", {"settings": dataclasses.asdict(settings)})
  copied = {"config": {"command": "copy_tokenizers"}, "summary": {"copied_from": "scenes"}}
  of_stages = dict.fromkeys(("text_tokenizer", "vqgan", "clip"), copied)
  finished = {"config": {}, "summary": {}}
  of_stages |= dict.fromkeys(("instructions", "train"), finished)
  for name, done in of_stages.items():
    write_json(tmp_path / name / stages.DONE, {**done, "id": name, "seconds": 1.0})
  sheet = tmp_path / "instructions" / "reconstructions.png"
  make_image(sheet, 1)
  found = report.write(tmp_path, "own:1 --config.instructions.tasks=t.yaml")
  assert (found["unfinished"], found["headlines"]) == ([], [])
  html = (tmp_path / "report.html").read_text()
  assert headings(html) == ["Training", "Image tokenizer", "Stages", "All numbers"]
  assert "not run" not in html
  assert report.file_uri(sheet) == report.reconstruction_sheet(tmp_path)
  command = "cm3leon run --config=own:1 --config.instructions.tasks=t.yaml --workdir=DIR"
  assert f"<pre><code>{command} --init_from=RUN</code></pre>" in html


def test_a_stopped_run_is_reported_with_the_step_that_it_uses_without_its_config(tmp_path):
  make_run(tmp_path, ("raw",))
  config = dataclasses.replace(SETTINGS.train, steps=90)
  settings = dataclasses.replace(SETTINGS, train=config)
  write_json(tmp_path / "train" / "config.json", {"settings": dataclasses.asdict(settings)})
  make_log(tmp_path / "train" / "metrics")  # 60 steps; their held-out losses fall.
  log = MetricsLog(tmp_path / "train" / "metrics", 60)
  names = ("loss", "image_loss", "text_loss")
  log.write(60, {f"heldout_{name}": 4.0 for name in names})
  with Checkpoints(tmp_path / "train", keep=2) as checkpoints:
    for step in (40, 60):
      checkpoints.save({"step": np.int32(step)}, step, 0, best=(40, 3.0))
  printed = launched.cm3leon("report", f"--workdir={tmp_path}", imported=launched.SLOW)
  assert "lowest at step 40" in printed.stdout, printed.stderr
  assert "the run uses step 40." in printed.stdout
  page = " ".join((tmp_path / "report.html").read_text().split())
  assert "The trainer stopped after step 30 and continued with step 31." in page
  assert "The trainer stopped at step 60 of 90, or is still running." in page
  assert f"Run of <code>{tmp_path.name}</code>" in page


def test_clip_scores_are_averaged_by_guidance_and_retrieval():
  lines = [
    {"guidance": g, "retrieve": r, "neighbors": n, "clip_score": s, "key": "", "prompt": p}
    for g, r, n, s, p in ((3, 2, [], 0.2, "a"), (1, 0, [], 0.1, "a"), (3, 2, [{}], 0.4, "b"))
  ]
  low, high = summary.clip_scores(lines)
  assert low | {"mean": 0.1, "standard_deviation": 0.0, "low": None, "high": None} == low
  described = summary.describe_clip_score(low, "prompt")
  assert described == "guidance 1, 0 retrieved: CLIP score 0.100, 1 sample of 1 prompt."
  assert "guidance 3, 0 to 1 of 2 retrieved: " in summary.describe_clip_score(high, "prompt")
  assert (low["guidance"], low["samples"], low["groups"]) == (1, 1, 1)
  assert (high["guidance"], high["samples"], high["groups"]) == (3, 2, 2)
  assert high["standard_deviation"] == pytest.approx(0.2 / 2**0.5)
  assert (high["mean"], high["low"], high["high"]) == pytest.approx((0.3, 0.2, 0.4))


def test_page_gives_the_number_of_concepts_of_its_intervals(run):
  html = run[2]
  assert "bootstrap over 7 concepts (effectively 3)" in html
  assert "95% interval over concepts" in html
  assert "to 3.59 over 7 concepts (effectively 3)" in " ".join(html.split())
  for row in run[1]["samples"]["clip_score"]:
    assert (row["samples"], row["groups"]) == (2, 2)


def test_a_killed_run_reports_the_steps_that_were_computed_again(tmp_path):
  log = MetricsLog(tmp_path)
  for step in range(1, 9):
    rate = {} if step == 1 else {"tokens_per_second": 2.0}
    log.write(step, {"loss": 1 / step, "weight": 1.0, **rate})
  log = MetricsLog(tmp_path, 5)
  for step in range(6, 10):
    rate = {} if step == 6 else {"tokens_per_second": 2.0}
    log.write(step, {"loss": 1 / step if step != 7 else 0.5, "weight": 1.0, **rate})
  numbers = summary.training(summary.read_json_lines(tmp_path / "metrics.jsonl"))
  assert numbers["restarts"] == [{"after_step": 5, "next_step": 6, "replayed": 3, "identical": 2}]
  assert numbers["every_step_logged_once"]
  assert numbers["step_seconds"] == pytest.approx(7 * 0.5)
  assert "goodput" not in numbers
  log.write(9, {"goodput": 0.4, "step_seconds": 4.0, "compile_seconds": 6.0})
  log.write(9, {"goodput": 0.5, "step_seconds": 6.0, "compile_seconds": 6.0})
  numbers = summary.training(summary.read_json_lines(tmp_path / "metrics.jsonl"))
  assert (numbers["goodput"], numbers["wall_seconds"]) == (0.5, 12.0)
  assert summary.training([]) == {}


def test_a_difference_is_met_only_with_its_whole_interval():
  headline = summary.Headline("d", "a.bits", "<", 0.0)
  for high, met in ((-0.1, True), (0.1, False)):
    found = {"a": {"bits": -1.0, "low": -2.0, "high": high}}
    assert summary.compare(found, headline)["met"] is met
  absent = dict.fromkeys(("value", "interval", "met"))
  expected = {"title": "d", "relation": "< ", "target": 0.0, "note": "", **absent}
  assert summary.compare({}, headline) == expected


def test_the_cost_of_a_decoder_is_that_of_its_stages():
  sections = {"raw": {"seconds": 2.0}, "clip": {"seconds": 3.04}, "evaluation": {"seconds": 50.0}}
  assert summary.cost(sections) is None
  assert summary.cost({**sections, "train": {"log": {}}}) is None  # The training is unfinished.
  sections["train"] = {"seconds": 7.0, "machine": "2 CPU cores"}
  expected = {"train_seconds": 7.0, "other_seconds": 5.0, "machine": "2 CPU cores"}
  assert summary.cost(sections) == expected
