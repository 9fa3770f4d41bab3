from html.parser import HTMLParser
import json
import re

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import config, stages
from cm3leon_jax.io import write_json
from cm3leon_jax.reports import report, summary
from cm3leon_jax.training.metrics import MetricsLog
from tests.data.raw import write_raw


def interval(bits, half):
  groups = {"groups": 7, "effective_groups": 3.2}
  return {"bits": bits, "low": bits - half, "high": bits + half, **groups}


MODALITY = {
  "tokens": 1000,
  "unigram": 8.43,
  "true": interval(3.39, 0.2),
  "shuffled": interval(3.56, 0.2),
  "none": interval(3.7, 0.2),
  "true_over_unigram": 0.402,
  "true_minus_shuffled": interval(-0.17, 0.05),
  "true_minus_none": interval(-0.31, 0.06),
}
NUMBERS = {
  "raw": {"train_pairs": 6, "heldout_pairs": 3},
  "text_tokenizer": {"characters_per_token": 3.1},
  "vqgan": {"psnr_db": 23.5, "codebook_perplexity": 240.0},
  "documents": {"train": {"pairs": 6}},
  "clip": {"recall@1": 0.12, "recall@5": 0.3, "chance@1": 0.01, "chance@5": 0.05},
  "neighbors": {"recall@2": 0.97, "backend": "exact"},
  "train": {"steps": 60},
  "samples": {},
  "evaluation": {"documents": 3, "image": MODALITY, "text": MODALITY},
  "export": {"parameters": 123},
}


def make_image(path, hue, side=32):
  y, x = np.mgrid[:side, :side]
  disc = (x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 3) ** 2
  pixels = np.full((side, side, 3), 255, np.uint8)
  pixels[disc] = [int(127 + 127 * np.sin(hue + k)) for k in (0, 2, 4)]
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
  return pixels


def make_raw(workdir):
  about = {"source": "drawings", "license": "CC-BY-SA-4.0", "attribution": "A. Painter"}
  splits = ["train"] * 6 + ["heldout"] * 3
  pairs = [
    {"key": f"k{i}", "caption": f"disc <{i}> & more", "split": split, **about}
    for i, split in enumerate(splits)
  ]
  write_raw(workdir / "raw", pairs, [make_image(None, i) for i in range(9)])


def make_log(folder):
  log = MetricsLog(folder)
  for step in range(1, 61):
    if step == 31:
      log = MetricsLog(folder, 30)
    losses = {"loss": 3.0, "image_loss": 3.2, "text_loss": 2.0}
    losses = {name: value + 3 / step for name, value in losses.items()}
    rate = {} if step in (1, 31) else {"tokens_per_second": 500.0}
    log.write(step, {**losses, "weight": 1000.0, **rate})
    if step % 20 == 0:
      log.write(step, {f"heldout_{name}": value + 0.1 for name, value in losses.items()})


def make_samples(folder):
  rng, lines = np.random.default_rng(0), []
  for key in ("k6", "k7"):
    for guidance in (1.0, 3.0, 5.0):
      for retrieve in (0, 2):
        name = f"{key}_{guidance}_{retrieve}.png"
        make_image(folder / name, float(rng.uniform(0, 6)))
        line = {"key": key, "prompt": f"disc <{key[1]}> & more", "file": name}
        line |= {"guidance": guidance, "retrieve": retrieve}
        line["neighbors"] = [{"key": "k0"}, {"key": "k1"}] if retrieve else []
        line["clip_score"] = float(rng.normal(0.2 + guidance / 50, 0.05))
        lines.append(line)
  (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(workdir, only=tuple(NUMBERS)):
  """Writes a workdir with the results of the stages `only`."""
  for folder in only:
    with stages.once(workdir / folder, {}) as numbers:
      numbers.update(NUMBERS[folder])
      if folder == "raw":
        make_raw(workdir)
      if folder == "vqgan":
        pixels = np.stack([make_image(None, i) for i in range(4)])
        arrays = {"originals": pixels, "reconstructions": pixels // 2 + 60}
        np.savez(workdir / "vqgan" / "reconstructions.npz", **arrays)
      if folder == "train":
        make_log(workdir / "train" / "metrics")
        for step in (20, 40, 60):
          make_image(workdir / "train" / "samples" / f"{step:06d}.png", step, side=96)
      if folder == "samples":
        make_samples(workdir / "samples")


class Page(HTMLParser):
  """Collects references and images of a page; fails if its tags are not balanced."""

  VOID = ("meta", "img", "br", "path", "use", "rect")

  def __init__(self, html):
    super().__init__()
    self.references, self.images, self.open = [], [], []
    self.feed(html)

  def handle_starttag(self, tag, attributes):
    values = dict(attributes)
    self.references += [values[name] for name in ("src", "href", "xlink:href") if name in values]
    self.images += [values] if tag == "img" else []
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.references += [v for name, v in attributes if name in ("src", "href", "xlink:href")]

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  make_run(workdir)
  found = report.write(workdir, "ml_configs/openmoji.py:2")
  return workdir, found, (workdir / "report.html").read_text()


def test_page_is_one_file_with_its_images_inside(run):
  workdir, _, html = run
  page = Page(html)
  assert page.open == []
  assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
  assert "url(http" not in html
  assert "@import" not in html
  assert str(workdir) not in html
  # 2 prompts with 6 samples, original and 2 neighbors; 4 originals and reconstructions; 3 grids.
  assert len(page.images) == 2 * (6 + 1 + 2) + 2 * 4 + 3
  assert all(image.get("alt") for image in page.images)


def test_page_shows_every_number_of_the_summary(run):
  workdir, found, html = run
  assert found == json.loads((workdir / "summary.json").read_text())
  for folder in NUMBERS:
    for name, value in summary.flatten(found[folder]):
      assert f'<code>{name}</code></th><td class="num">{report.show(value)}</td>' in html


def test_headlines_show_which_targets_are_met(run):
  verdicts = {line["title"].split()[0]: line["met"] for line in run[1]["headlines"]}
  assert verdicts["PSNR"] is True
  assert verdicts["Codebook"] is False
  assert "○ not met" in run[2]
  assert "● met" in run[2]


def test_page_escapes_captions_and_reports_the_restart(run):
  assert "“disc &lt;6&gt; &amp; more”" in run[2]
  assert "The trainer stopped after step 30 and continued with step 31" in run[2]
  assert "CC-BY-SA-4.0" in run[2]
  assert "CC-BY-SA-4.0:\n  A. Painter. Recon" in run[2]  # Once, not once a source file.


def test_figures_take_the_colors_of_the_page(run):
  svg = report.bits_figure(run[1]["evaluation"])
  assert svg.startswith("<svg")
  assert "var(--image)" in svg
  assert "currentColor" in svg
  assert not any(color in run[2] for color in report.CSS_COLORS)


@pytest.mark.parametrize("only", [(), ("raw",), ("raw", "vqgan", "train")])
def test_page_lists_stages_that_have_not_run(tmp_path, only):
  make_run(tmp_path, only)
  found = report.write(tmp_path, "ml_configs/openmoji.py")
  assert found["unfinished"] == [folder for folder in NUMBERS if folder not in only]
  html = (tmp_path / "report.html").read_text()
  assert "<code>launch.evaluate</code> has not finished in this workdir" in html
  assert ("launch.train_vqgan</code> has not finished" in html) == ("vqgan" not in only)
  assert "not run" in html


def test_a_workdir_that_does_not_exist_is_refused(tmp_path):
  with pytest.raises(config.UserError, match="does not exist: name the folder of a run"):
    report.write(tmp_path / "none", "c.py")


@given(
  st.recursive(
    st.integers(),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner) | st.lists(inner, max_size=3),
  )
)
def test_flatten_keeps_every_leaf(value):
  def leaves(value):
    if isinstance(value, dict | list):
      return sum(leaves(item) for item in (value.values() if isinstance(value, dict) else value))
    return 1

  flat = summary.flatten({"x": value})
  assert len(flat) == leaves(value) == len({name for name, _ in flat})
  assert all(summary.lookup({name: leaf}, name) == leaf for name, leaf in flat if "." not in name)


def test_clip_scores_are_averaged_by_guidance_and_retrieval():
  lines = [
    {"guidance": g, "retrieve": r, "clip_score": s, "key": "", "prompt": p}
    for g, r, s, p in ((3, 2, 0.2, "a"), (1, 0, 0.1, "a"), (3, 2, 0.4, "b"))
  ]
  low, high = summary.clip_scores(lines)
  assert low | {"mean": 0.1, "standard_deviation": 0.0, "low": None, "high": None} == low
  assert (low["guidance"], low["samples"], low["groups"]) == (1, 1, 1)
  assert (high["guidance"], high["samples"], high["groups"]) == (3, 2, 2)
  assert high["standard_deviation"] == pytest.approx(0.2 / 2**0.5)
  assert (high["mean"], high["low"], high["high"]) == pytest.approx((0.3, 0.2, 0.4))


def test_clip_scores_of_a_concept_or_a_prompt_are_one_group():
  def groups(*samples):
    shared = {"guidance": 1, "retrieve": 0, "clip_score": 0.1}
    return summary.clip_scores([shared | sample for sample in samples])[0]["groups"]

  red, blue = ({"key": name, "prompt": name, "concept": "fox"} for name in ("red", "blue"))
  assert groups(red, blue) == 1
  assert groups(red, {**blue, "concept": "cat"}) == 2
  assert groups(*[{"key": "", "prompt": "a"}] * 3, {"key": "", "prompt": "b"}) == 2


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
    assert summary.judge(found, headline)["met"] is met
  absent = dict.fromkeys(("value", "interval", "met"))
  expected = {"title": "d", "relation": "< ", "target": 0.0, "note": "", **absent}
  assert summary.judge({}, headline) == expected


@given(st.floats(-1e6, 1e6))
def test_show_keeps_four_digits(value):
  shown = float(report.show(value).replace("−", "-").replace(",", ""))
  assert shown == pytest.approx(value, rel=6e-3 if abs(value) < 1e-3 else 6e-4, abs=1e-12)


def test_smooth_averages_shorter_windows_at_the_ends():
  np.testing.assert_allclose(report.smooth(np.array([1.0, 2.0, 6.0]), 3), [1.5, 3.0, 4.0])
  np.testing.assert_allclose(report.smooth(np.array([1.0, 2.0]), 1), [1.0, 2.0])


def share(value, half=0.1):
  groups = {"groups": 7, "effective_groups": 7.0}
  return {"share": value, "low": value - half, "high": value + half, **groups}


BEST = {
  "title": "guidance 1.5",
  "correct": share(0.3),
  "scene": share(0.4),
  "single_object": share(0.55),
  "color": share(0.95),
}


def make_scenes(workdir, **fields):
  """Adds an evaluation with judged scenes whose summary has `fields`."""
  row = {"images": 4, "correct": share(0.3)}
  table = {"all": row, "tag": {"colors": row}, "heldout": {"pair": row}, "geneval": 0.3}
  tables = {"reconstructions": table, "guidance 1.5": table}
  with stages.once(workdir / "evaluation", {}) as numbers:
    numbers.update(
      {**NUMBERS["evaluation"], "scenes": {"guidance 1.5": {"correct": 0.3}, **fields}}
    )
    make_image(workdir / "evaluation" / "scenes.png", 0)
    write_json(workdir / "evaluation" / "scenes.json", {"tables": tables})


def test_the_cost_of_a_decoder_is_that_of_its_stages():
  sections = {"raw": {"seconds": 2.0}, "clip": {"seconds": 3.04}, "evaluation": {"seconds": 50.0}}
  assert summary.cost(sections) is None
  assert summary.cost({**sections, "train": {"log": {}}}) is None  # It has not finished.
  sections["train"] = {"seconds": 7.0, "machine": "2 CPU cores"}
  expected = {"train_seconds": 7.0, "other_seconds": 5.0, "machine": "2 CPU cores"}
  assert summary.cost(sections) == expected


def headings(html):
  return re.findall("<h2>(.*?)</h2>", html)


def test_judged_scenes_come_first_with_their_sheet_and_tables(tmp_path):
  make_run(tmp_path, ("raw", "vqgan"))
  make_scenes(tmp_path, best=BEST)
  report.write(tmp_path, "ml_configs/scenes.py")
  html = (tmp_path / "report.html").read_text()
  page = Page(html)
  assert page.open == []
  assert "a check if correct" in page.images[0]["alt"]
  assert "bundled model" not in html
  assert headings(html)[:2] == ["Do images show what their captions say?", "Results"]
  text = " ".join(re.sub("<.*?>", "", html).split())
  assert (
    "At guidance 1.5, 30.0% [20.0, 40.0] of 4 images show exactly what their held-out captions "
    "say, and nothing more; of captions of a single object, 55.0% [45.0, 65.0]. The ceiling, "
    "reconstructions from the true codes: 30.0% [20.0, 40.0]." in text
  )
  assert "<details><summary>guidance 1.5: 30.0% [20.0, 40.0] correct</summary>" in html
  for label in ("all", "colors", "held-out: pair"):
    assert html.count(f'<tr><th>{label}</th><td class="num">4</td>') == 2
  assert html.count('<td class="num">30.0% [20.0, 40.0]</td>') == 2 * 3


BUNDLED = {
  "images": 12,
  "right": {"guidance 1": 5, "guidance 1.5": 6, "bundled model": 10},
  "guidance": 1.5,
  "neighbors": 0,
  "step": 4000,
  "parameters": 2_400_000,
  "training_scenes": 100_000,
  "bytes": 7_500_000,
  "cost": {"train_seconds": 2340.0, "other_seconds": 720.0, "machine": "1 CPU core"},
}


@pytest.mark.parametrize("cost", [BUNDLED["cost"], None])
def test_the_bundled_model_stands_beside_the_run_with_its_cost(tmp_path, cost):
  make_run(tmp_path, ("raw", "vqgan", "train"))
  make_scenes(tmp_path, best=BEST, bundled={**BUNDLED, "cost": cost})
  for folder, seconds in (("raw", 4.0), ("vqgan", 60.0), ("train", 175.2)):
    done = json.loads((tmp_path / folder / "done.json").read_text())
    done["summary"] |= {"machine": "2 CPU cores", "parameters": 900} if folder == "train" else {}
    write_json(tmp_path / folder / "done.json", {**done, "seconds": seconds})
  report.write(tmp_path, "ml_configs/scenes.py")
  html = (tmp_path / "report.html").read_text()
  assert Page(html).open == []
  table = html[html.index("<h3>Beside the bundled model</h3>") :]
  rows = [
    re.findall("<t[hd].*?>(.*?)</t[hd]>", row)
    for row in re.findall("<tr>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)
  ]
  theirs = ("39 min 0 s", "12 min 0 s", "1 CPU core") if cost else ("—",) * 3
  assert rows == [
    ["", "This run", "Bundled model"],
    ["Correct of the 12 images above", "5 at guidance 1, 6 at guidance 1.5", "10"],
    ["Training of the decoder", "2 min 55 s", theirs[0]],
    ["All stages before it", "1 min 4 s", theirs[1]],
    ["Trained on", "2 CPU cores", theirs[2]],
    ["Training scenes", "6", "100,000"],
    ["Parameters of the decoder", "900", "2,400,000"],
    ["Size with its tokenizers and CLIP", "—", "7.5 MB"],
  ]


def test_a_run_without_judged_scenes_begins_with_its_results(run):
  assert headings(run[2])[:2] == ["Results", "Images for held-out captions"]
  assert "Do images show" not in run[2]
  assert "bundled model" not in run[2]


def test_scenes_judged_by_an_earlier_version_have_no_sentence(tmp_path):
  make_run(tmp_path, ("raw", "vqgan"))
  make_scenes(tmp_path)
  report.write(tmp_path, "ml_configs/scenes.py")
  html = (tmp_path / "report.html").read_text()
  assert "The ceiling" not in html
  assert "guidance 1.5: 30.0%" in html


def test_headlines_of_scenes_are_met_with_their_whole_interval(tmp_path):
  make_run(tmp_path, ("raw", "vqgan"))
  make_scenes(tmp_path, best=BEST, gain={"title": "guidance 1.5", **share(0.1, 0.04)})
  found = report.write(tmp_path, "ml_configs/scenes.py")
  lines = {line["title"]: line for line in found["headlines"]}
  assert "Codebook perplexity, held-out concepts" not in lines
  met = {title: line["met"] for title, line in lines.items() if line["interval"] is not None}
  assert met == {
    "New combinations of known parts, wholly right": True,
    "Single objects, wholly right": False,
    "Color right": True,
    "Best guidance minus guidance 1, wholly right": True,
    "Bits per image code, true neighbors": True,
    "True minus shuffled neighbors (bits/code)": True,
    "True minus no neighbors (bits/code)": True,
  }
  color = lines["Color right"]["interval"]
  assert color == {name: BEST["color"][name] for name in color}
  assert set(color) == {"low", "high", "groups", "effective_groups"}
  assert lines["Place right"]["value"] is None
