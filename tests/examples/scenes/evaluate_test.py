import pytest

from examples.scenes import evaluate


def table(correct):
  row = {"images": 4, "correct": {"share": correct}, "place": {"share": 0.5, "low": 0.4}}
  new = {**row, "lookup": {"share": 0.25}}
  kinds = {"tag": {"single_object": row}, "heldout": {"pair": row}}
  return {"all": row, **kinds, "parts": {"scene, new claims": new}, "geneval": correct}


@pytest.mark.parametrize(("shares", "best"), [((0.1, 0.3, 0.2), 2), ((0.3, 0.3, 0.0), 1)])
def test_the_headlines_are_those_of_the_best_guidance_weight(shares, best):
  weights = {f"guidance {i}": table(share) for i, share in enumerate(shares, 1)}
  tables = {"real images": table(1.0), "reconstructions": table(0.9), **weights}
  assert evaluate.best_guidance(tables) == f"guidance {best}"
  found = evaluate.figures_of({"tables": tables})
  values = {one["title"].partition(",")[0]: (one["value"], one["target"]) for one in found}
  assert values == {
    "Reconstructions judged correct": (0.9, 0.9),
    "New combinations whose claims no training caption makes": (max(shares), 0.25),
    "Single objects": (max(shares), None),
    "Place correct": (0.5, None),
  }
  assert found[-1]["low"] == 0.4
