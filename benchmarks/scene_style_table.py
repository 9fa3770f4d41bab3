"""Computes shares with confidence intervals from the samples of `scene_style`, and formats them."""

# n captions.

import numpy as np

from cm3leon_jax.evaluation.intervals import mean_interval

TITLES = {
  "outlined": "outlined",
  "neither": "nearly blank",
  "recognized": "best fit is the object",
  "color": "place and color correct",
  "neighbor": "neighbor shows it",
}


def _level(by_run: list[np.ndarray], objects: np.ndarray) -> dict:
  """Computes the mean over all runs, with a confidence interval, and the mean of each run."""
  mean = np.mean(by_run, axis=0)
  interval = mean_interval(mean, np.ones(len(mean)), list(objects))
  by_seed = [float(values.mean()) for values in by_run]
  return {**{key: interval[key] for key in ("mean", "low", "high")}, "by_run": by_seed}


def summarize(about: dict, runs: list[dict], labels: dict[str, str]) -> dict:
  """Computes all numbers of the table.

  Args:
    about: `groups` and `objects`, [n] names for each caption; `known`; `classifier`, style ->
      measure -> [n] values.
    runs: for each run, `run`, `seed` and `banks`: style of the bank -> measure -> [n] values.
    labels: group -> name in the table.
  """
  groups, objects = np.array(about["groups"]), np.array(about["objects"])
  result: dict = {
    "runs": [{key: run[key] for key in ("run", "seed")} for run in runs],
    "known": about["known"],
    "classifier": {
      style: {name: float(np.mean(values)) for name, values in measured.items()}
      for style, measured in about["classifier"].items()
    },
    "captions": len(groups),
    "groups": {},
  }
  for name in dict.fromkeys(about["groups"]):
    mask = groups == name
    result["groups"][name] = {
      "label": labels[name],
      "captions": int(mask.sum()),
      "objects": len(set(objects[mask])),
      "banks": {
        style: {
          measure: _level(
            [np.asarray(run["banks"][style][measure], np.float64)[mask] for run in runs],
            objects[mask],
          )
          for measure in measured
        }
        for style, measured in runs[0]["banks"].items()
      },
    }
  return result


def _row(cells) -> str:
  return f"| {' | '.join(cells)} |"


def _cell(level: dict) -> str:
  """Formats a mean share, its confidence interval if it has one, and the share of each run."""
  text = f"{level['mean']:.1%}"
  if level["low"] is not None:
    text += f" [{level['low']:.1%}, {level['high']:.1%}]"
  if len(level["by_run"]) > 1:
    text += f"; {', '.join(f'{share:.1%}' for share in level['by_run'])}"
  return text


def markdown(result: dict) -> str:
  """Formats the result of `summarize` as Markdown."""
  right = ", ".join(
    f"{measured['right']:.1%} of the {style} images (best fit is the object "
    f"{measured['recognized']:.1%}, place and color correct {measured['color']:.1%})"
    for style, measured in result["classifier"].items()
  )
  lines = [
    f"Reconstructions of {result['captions']} held-out scenes: the classifier is correct on "
    f"{right}.",
    f"Of the codes of outlined icons, training has {result['known']['codes']:.1%}, of whole icons "
    f"{result['known']['drawings']:.1%}.",
    f"Seeds of the runs: {', '.join(str(run['seed']) for run in result['runs'])}.",
    "",
    _row(("captions of", "bank", *TITLES.values())),
    _row(["---"] * (len(TITLES) + 2)),
  ]
  for group in result["groups"].values():
    about = f"{group['label']} ({group['captions']} of {group['objects']} objects)"
    for style, measured in group["banks"].items():
      lines.append(_row((about, style, *(_cell(measured[name]) for name in TITLES))))
  return "\n".join(lines) + "\n"
