"""metrics.jsonl: one JSON object a line; a resumed run replaces the lines it computes again, and says if they differ."""

import json

from etils import epath


class MetricsLog:
  """Appends to `folder/metrics.jsonl`.

  A run that is killed has logged steps after its last checkpoint. The resumed run computes them again; the log keeps
  the first values aside and compares the losses bit for bit.
  """

  def __init__(self, folder: epath.PathLike, resumed_at: int | None = None):
    """resumed_at: step of the restored checkpoint; lines of later steps are set aside. None: a new run."""
    self.path = epath.Path(folder) / "metrics.jsonl"
    self.path.parent.mkdir(parents=True, exist_ok=True)
    old = read_metrics(self.path)
    kept = [] if resumed_at is None else [line for line in old if line["step"] <= resumed_at]
    later = [line for line in old if line["step"] > (resumed_at or 0) and "loss" in line] if resumed_at is not None else []
    # Nothing to compare is an outcome too: the killed run had logged no step after its checkpoint.
    self._before = {line["step"]: line["loss"] for line in later}
    self.replayed, self.identical, self._resumed_at = 0, 0, resumed_at
    partial = self.path.parent / (self.path.name + ".partial")
    event = "" if resumed_at is None or self._before else self._resume_event(resumed_at)
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept) + event)
    partial.replace(self.path)

  def write(self, step: int, values: dict) -> None:
    """Appends one line, `step` first. Values: floats, ints, strings."""
    expected = self._before.pop(step, None) if "loss" in values else None
    with self.path.open("a") as f:
      f.write(json.dumps({"step": step, **values}) + "\n")
      if expected is not None:
        self.replayed += 1
        self.identical += expected == values["loss"]
        if not self._before:
          f.write(self._resume_event(step))

  def _resume_event(self, step: int) -> str:
    counts = {"from_step": self._resumed_at, "replayed": self.replayed, "identical": self.identical}
    return json.dumps({"step": step, "event": "resumed", **counts}) + "\n"


def read_metrics(path: epath.PathLike) -> list[dict]:
  """All lines of a metrics.jsonl, in order; a last line that a kill cut short is left out."""
  path = epath.Path(path)
  lines = path.read_text().splitlines() if path.exists() else []
  found = []
  for i, line in enumerate(lines):
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      if i + 1 < len(lines):
        raise
  return found
