import json

import numpy as np
import pytest

from cm3leon_jax.reports import report
from tests.data.raw_folder import write_raw
from tests.reports import hostile
from tests.reports.hostile import CONTROLS, HOSTILE
from tests.reports.run_files import make_image, make_run


def page_of(workdir, text: str) -> str:
  """Returns the report of a run in which all external texts are `text`."""
  make_run(workdir, ("raw", "samples", "train", "vqgan"))
  (workdir / "raw" / "index.json").unlink()
  about = {"source": text, "license": text, "attribution": text}
  pairs = [
    {"key": f"{text} {i}", "caption": text, "split": split, **about}
    for i, split in enumerate(("train", "heldout"))
  ]
  with_shards = workdir / "new"
  write_raw(with_shards, pairs, [make_image(None, i) for i in range(2)])
  (workdir / "raw").rename(workdir / "old")
  with_shards.rename(workdir / "raw")
  (workdir / "old" / "done.json").rename(workdir / "raw" / "done.json")
  results = workdir / "samples" / "results.jsonl"
  lines = [json.loads(line) for line in results.read_text().splitlines()]
  lines = [
    {**line, "prompt": text, "key": f"{text} 1", "neighbors": [{"key": f"{text} 0"}, {"key": text}]}
    for line in lines
  ]
  results.write_text("".join(json.dumps(line) + "\n" for line in lines))
  report.write(workdir, text)
  return (workdir / "report.html").read_text(encoding="utf-8")


def test_the_report(tmp_path):
  html = page_of(tmp_path / "hostile", HOSTILE)
  hostile.check(html, page_of(tmp_path / "harmless", "a red cat"))
  assert html.count("⟨U+001B⟩[2J") >= 10  # Control characters are shown.


@pytest.mark.parametrize("text", [*CONTROLS, "\ud800", "a\x85b"])
def test_a_control_character_is_shown_by_its_number(text):
  template = report.page_environment().from_string("{{ text }}|{{ text | upper }}")
  html = template.render(text=text)
  html.encode("utf-8")
  kept = "[2J]0;title31m"
  for c in text:
    assert (f"⟨U+{ord(c):04X}⟩" in html) == (c not in kept and c not in "ab")


def test_plain_texts_and_marked_pages_stay():
  environment = report.page_environment()
  # The emoji contains a zero-width joiner.
  for text in ("a cat", "naïve 猫", "👩\u200d🚀", "a\nb\tc"):
    assert environment.from_string("{{ text }}").render(text=text) == text
  assert environment.from_string("{{ '<b>' | safe }}{{ 1 }}{{ none }}").render() == "<b>1None"
  assert np.isnan(float(environment.from_string("{{ x }}").render(x=float("nan"))))
