"""Writes the demo's headline figures to judged.json, which the report shows first."""

from typing import Any

from etils import epath

from cm3leon_jax.evaluation.intervals import describe_share
from cm3leon_jax.files.json_files import write_json


def figure(title: str, share: dict[str, Any], target: float | None = None) -> dict[str, Any]:
  """Returns a figure that should be at least `target`. `share` may have a confidence interval."""
  names = ("low", "high", "groups", "effective_groups")
  interval = {name: share[name] for name in names if name in share}
  return {"title": title, "value": float(share["share"]), "target": target, **interval}


def write(workdir: epath.PathLike, figures: list[dict[str, Any]]) -> None:
  """Writes and prints figures."""
  write_json(epath.Path(workdir) / "judged.json", {"figures": figures})
  for one in figures:
    share = describe_share({"share": one["value"], "low": one.get("low"), "high": one.get("high")})
    target = "" if one["target"] is None else f" (target >= {one['target']:.1%})"
    print(f"{one['title']}: {share}{target}")
