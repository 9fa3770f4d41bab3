import re

from cm3leon_jax.reports import report
from cm3leon_jax.stages import stages
from tests.reports.run_files import NUMBERS, Page, headings, make_image, make_run


def share(value, half=0.1):
  groups = {"groups": 7, "effective_groups": 7.0}
  return {"share": value, "low": value - half, "high": value + half, **groups}


def test_judged_images_come_first_with_their_sheet_and_table(tmp_path):
  make_run(tmp_path, ("raw", "vqgan"))
  row = {"images": 4, "correct": share(0.3)}
  table = {"all": row, "colors": row, "held-out: pair": row}
  found = {"tables": {"reconstructions": table, "guidance 1.5": table}, "best": "guidance 1.5"}
  with stages.once(tmp_path / "evaluation", {}) as numbers:
    numbers.update({**NUMBERS["evaluation"], "judged": found})
    make_image(tmp_path / "evaluation" / "judged.png", 0)
  report.write(tmp_path, "own.py")
  html = (tmp_path / "report.html").read_text()
  page = Page(html)
  assert page.open == []
  assert "a green frame if correct" in page.images[0]["alt"]
  assert headings(html)[:2] == ["Do images show what their captions say?", "Results"]
  text = " ".join(re.sub("<.*?>", "", html).split())
  assert (
    "At guidance 1.5, 30.0% [20.0, 40.0] of 4 images show exactly what their held-out captions "
    "say, by the judge of the config. The ceiling, reconstructions from the true codes: 30.0% "
    "[20.0, 40.0]." in text
  )
  for label in ("all", "colors", "held-out: pair"):
    assert html.count(f'<tr><th>{label}</th><td class="num">4</td>') == 1
  assert html.count('<td class="num">30.0% [20.0, 40.0]</td>') == 2 * 3
