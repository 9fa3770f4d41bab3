"""Summarizes the runs of `tokenizers` in a table of means, ranges and differences."""

import textwrap

import numpy as np

from benchmarks.evidence.experiment import student_interval

BASE = "restarts"
# Measure -> (title, format).
MEASURES = {
  "psnr_db": ("PSNR (dB)", "{:.2f}"),
  "reconstructed_scenes_right": ("reconstructions correct", "{:.1%}"),
  "codebook_perplexity": ("perplexity", "{:.0f}"),
  "used": ("codes used", "{:.1%}"),
  "bits_per_pixel": ("bits per pixel", "{:.4f}"),
}
COMPARED = ("psnr_db", "bits_per_pixel")


def summarize(about: dict, runs: list[dict], labels: dict[str, str]) -> dict:
  """Computes all numbers of the table.

  Args:
    about: `source`, `codes`, `image_tokens`, `minutes`, `decoder_minutes`; `steps` and
      `cpu_seconds` of each arm; `commonest_square` (the share of the most common square) if equal
      squares always have equal codes.
    runs: results of `tokenizers.run_one`.
    labels: arm -> name in the table.

  Returns:
    The fields of `about`, `runs`, `perplexity_bound` (if there is a `commonest_square`), and
    `arms`. Each arm has `mean`, `lowest` and `highest` of each measure over the seeds, and the mean
    `difference` from `BASE` over their common seeds, with a 95% Student's t interval. The measure
    `used` is the share of all codes that occur in 1,024 training images.
  """
  runs = [{**run, "used": run["train_codes_used"] / run["codes"]} for run in runs]
  of = {arm: {r["seed"]: r for r in runs if r["arm"] == arm} for arm in labels}
  arms = {}
  for arm, by_seed in of.items():
    if by_seed:
      names = [name for name in MEASURES if name in next(iter(by_seed.values()))]
      values = {name: [run[name] for run in by_seed.values()] for name in names}
      arms[arm] = {
        "label": labels[arm],
        "seeds": sorted(by_seed),
        "measures": {
          name: {"mean": float(np.mean(v)), "lowest": min(v), "highest": max(v)}
          for name, v in values.items()
        },
        "difference": {
          name: _difference(by_seed, of[BASE], name)
          for name in names
          if name in COMPARED and arm != BASE and by_seed.keys() & of[BASE].keys()
        },
      }
  result = {**about, "runs": runs, "arms": arms}
  if "commonest_square" in about:
    result["perplexity_bound"] = perplexity_bound(about["commonest_square"], about["codes"])
  return result


def perplexity_bound(share: float, codes: int) -> float:
  """Returns the largest possible perplexity of K codes if one code has the share p of positions.

  If all other codes are equally frequent, the entropy is H = -p log p - (1 - p) log((1 - p) / (K -
  1)), and the perplexity is exp(H).
  """
  rest = 1 - share
  entropy = -share * np.log(share) - (rest * np.log(rest / (codes - 1)) if rest else 0.0)
  return float(np.exp(entropy))


def _difference(own: dict, base: dict, name: str) -> dict:
  values = [own[seed][name] - base[seed][name] for seed in sorted(own.keys() & base.keys())]
  return {"mean": float(np.mean(values)), "interval": student_interval(values)}


def _level(level: dict, text: str) -> str:
  """Formats a mean; adds the range over the seeds if its rounded ends differ."""
  mean, low, high = (text.format(level[key]) for key in ("mean", "lowest", "highest"))
  return mean if low == high else f"{mean} ({low} to {high})"


def _gap(difference: dict | None, text: str) -> str:
  """Formats a difference, with its confidence interval if there are several seeds."""
  if difference is None:
    return "-"
  sign = text.replace(":", ":+")
  shown = sign.format(difference["mean"])
  if difference["interval"] is not None:
    shown += f" [{', '.join(sign.format(x) for x in difference['interval'])}]"
  return shown


def markdown(result: dict) -> str:
  """Formats the result of `summarize` as a Markdown table with a row for each arm."""
  arms = result["arms"]
  names = [name for name in MEASURES if any(name in arm["measures"] for arm in arms.values())]
  gaps = [name for name in COMPARED if name in names]
  titles = ["quantizer", "steps", *(MEASURES[name][0] for name in names)]
  titles += [f"{MEASURES[name][0]}, minus the first" for name in gaps]
  lines = [_row(titles), _row(["---"] * len(titles))]
  for key, arm in arms.items():
    cells = [arm["label"], f"{result['steps'][key]:,}"]
    cells += [_level(arm["measures"][name], MEASURES[name][1]) for name in names]
    cells += [_gap(arm["difference"].get(name), MEASURES[name][1]) for name in gaps]
    lines.append(_row(cells))
  seeds = max(len(arm["seeds"]) for arm in arms.values())
  decoder = result["steps"].get("decoder")
  trained = (
    f", decoder {result['decoder_minutes']:g} minutes ({decoder:,} steps)" if decoder else ""
  )
  spread = "one seed, so no intervals."
  if seeds > 1:
    spread = f"{seeds} seeds: mean (lowest to highest), differences with 95% intervals"
    spread += " by Student's t."
  about = (
    f"`{result['source']}`, a codebook of {result['codes']:,}, {result['image_tokens']} codes an "
    f"image; tokenizer {result['minutes']:g} minutes on {result['cores']} cores{trained}; " + spread
  )
  if "perplexity_bound" in result:
    about += (
      f" {result['commonest_square']:.1%} of the held-out squares are equal and have one code, so "
      f"perplexity is at most {result['perplexity_bound']:,.1f}."
    )
  return "\n".join([*lines, "", textwrap.fill(about, 128, break_on_hyphens=False), ""])


def _row(cells) -> str:
  return f"| {' | '.join(cells)} |"
