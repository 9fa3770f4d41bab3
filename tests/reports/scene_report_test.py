import json
import re

import pytest

from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.reports import report
from cm3leon_jax.runs import stages
from tests.reports.run_files import NUMBERS, Page, headings, make_image, make_run


def share(value, half=0.1):
  groups = {"groups": 7, "effective_groups": 7.0}
  return {"share": value, "low": value - half, "high": value + half, **groups}


BEST = {
  "title": "guidance 1.5",
  "correct": share(0.3),
  "scene": share(0.87),
  "single_object": share(0.55),
  "color": share(0.95),
}


def make_scenes(workdir, **fields):
  row = {"images": 4, "correct": share(0.3)}
  table = {"all": row, "tag": {"colors": row}, "heldout": {"pair": row}, "geneval": 0.3}
  tables = {"reconstructions": table, "guidance 1.5": table}
  with stages.once(workdir / "evaluation", {}) as numbers:
    numbers.update(
      {**NUMBERS["evaluation"], "scenes": {"guidance 1.5": {"correct": 0.3}, **fields}}
    )
    make_image(workdir / "evaluation" / "scenes.png", 0)
    write_json(workdir / "evaluation" / "scenes.json", {"tables": tables})


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
  table = html[html.index("<h3>Comparison with the bundled model</h3>") :]
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


def test_headlines_of_scenes_are_met_with_their_whole_interval(tmp_path):
  make_run(tmp_path, ("raw", "vqgan"))
  make_scenes(tmp_path, best=BEST, gain={"title": "guidance 1.5", **share(0.1, 0.04)})
  found = report.write(tmp_path, "ml_configs/scenes.py")
  lines = {line["title"]: line for line in found["headlines"]}
  assert "Codebook perplexity, held-out concepts" not in lines
  met = {title: line["met"] for title, line in lines.items() if line["interval"] is not None}
  assert met == {
    "New combinations of known parts, wholly correct": True,
    "Single objects, wholly correct": False,
    "Color correct": True,
    "Best guidance minus guidance 1, wholly correct": True,
    "Bits per image code, true neighbors": True,
    "True minus shuffled neighbors (bits/code)": True,
    "True minus no neighbors (bits/code)": True,
  }
  color = lines["Color correct"]["interval"]
  assert color == {name: BEST["color"][name] for name in color}
  assert set(color) == {"low", "high", "groups", "effective_groups"}
  assert lines["Place correct"]["value"] is None
