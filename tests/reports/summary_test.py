from etils import epath
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.reports import summary
from tests.refusals import refused


def test_a_copied_stage_has_no_headlines():
  assert summary.headlines({"vqgan": {"psnr_db": 20.0}}) == list(summary.HEADLINES)
  copied = {"copied_from": "scenes"}
  kept = summary.headlines({"vqgan": copied, "clip": copied})
  assert kept == [x for x in summary.HEADLINES if x.path.split(".")[0] not in ("vqgan", "clip")]
  assert len(kept) < len(summary.HEADLINES)


@pytest.mark.parametrize(
  ("losses", "best", "parts"),
  [
    ({0: 1.0, 4: 2.5, 8: 2.0, 12: 2.2}, None, ["8, 2.000", "12, 2.200 (+10.0%)", "uses step 12"]),
    ({0: 1.0, 4: 2.5, 8: 2.0, 12: 2.2}, 8, ["8, 2.000", "uses step 8"]),
    ({4: 2.5, 8: 2.0}, 8, None),
    ({}, None, None),
  ],
)
def test_a_heldout_loss_that_has_risen_is_said_first(losses, best, parts):
  """The step 0 is that of the base. Falling losses of texts do not hide the rise of image codes."""
  lines = [
    {"step": step, "heldout_image_loss": loss, "heldout_loss": 9 - step / 9}
    for step, loss in losses.items()
  ]
  found = summary.findings({"train": {"used_step": best} if best else {}}, lines)
  assert len(found) == bool(parts)
  assert all(part in found[0] for part in parts or ())
  (texts,) = summary.findings({}, [{"step": s, "heldout_loss": x} for s, x in ((1, 2.0), (2, 3.0))])
  assert "held-out loss: lowest at step 1, 2.000" in texts


def test_figures_of_another_judge_are_the_first_headlines(tmp_path):
  figures = [
    {"title": "Colors shown", "value": 0.5, "target": 0.6},
    {"title": "Shapes shown", "value": 1, "target": 0.4},
    {"title": "Places shown", "value": 0.3, "target": None},
  ]
  write_json(tmp_path / "judged.json", {"figures": figures})
  lines = summary.collect(tmp_path)["headlines"]
  assert [(line["title"], line["value"], line["met"]) for line in lines[:3]] == [
    ("Colors shown", 0.5, False),
    ("Shapes shown", 1, True),
    ("Places shown", 0.3, None),
  ]
  assert [line["title"] for line in lines[3:]] == [line.title for line in summary.HEADLINES]


def test_a_damaged_figure_of_another_judge_is_named(tmp_path):
  write_json(tmp_path / "judged.json", {"figures": [{"title": "Colors shown", "value": "half"}]})
  with refused(UserError, "judged.json", "value"):
    summary.judged(epath.Path(tmp_path))


def test_forgetting_is_expected_if_the_training_reads_documents_of_a_base(tmp_path):
  folder = epath.Path(tmp_path)
  assert "forgetting" not in summary.expected_stages(folder)
  (folder / "train").mkdir()
  for number in (0, 9):  # The documents of a workdir are not in base/.
    settings = {"data": {"base_documents": number}}
    write_json(folder / "train" / "config.json", {"run": {}, "settings": settings})
    assert ("forgetting" in summary.expected_stages(folder)) == bool(number)
