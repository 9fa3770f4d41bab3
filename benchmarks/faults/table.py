"""Formats the results of `benchmarks.faults` as a table, and lists the failures."""

NONE = "-"


def kill_failures(summary: dict) -> list[str]:
  """Returns a sentence for each failure in a summary of `faults.kill`."""
  failures = [f"{run} differs in {', '.join(parts)}" for run, parts in summary["differing"].items()]
  if not summary["control_differs"]:
    failures.append("the control, one row too late, equals the run that was never killed")
  if summary["replayed"] != summary["replayed_equal"]:
    failures.append("a repeated step had a different loss")
  return failures


def failures(summary: dict) -> list[str]:
  """Returns a sentence for each failure in a summary of `faults.damage`."""
  found = []
  for kind, numbers in summary["kinds"].items():
    if numbers["wrong"]:
      found.append(f"{kind}: {numbers['wrong']} of {numbers['faults']} had a wrong outcome")
    if numbers["named"] < numbers["of"]:
      found.append(f"{kind}: {numbers['of'] - numbers['named']} of {numbers['of']} had no message")
  if summary["control"] and not summary["control"]["wrong"]:
    found.append("the control, a restore without digests, was not noticed")
  return found


def _seconds(spread: dict) -> str:
  if not spread:
    return NONE
  return f"{spread['median']:.1f} ({spread['least']:.1f} to {spread['most']:.1f})"


def _of(found: int, asked: int) -> str:
  return f"{found:,}" if found >= asked else f"{found:,} of {asked:,}"


def _kill_rows(summary: dict) -> list[tuple]:
  equal = f"{summary['runs_equal']} of {summary['runs']} runs"
  lost = f"{summary['steps_lost']['most']} logged, computed again"
  count = _of(summary["kills"], summary["asked"])
  seconds = _seconds(summary["seconds_to_resume"])
  return [("SIGKILL", count, NONE, equal, lost, "0" if not summary["differing"] else "?", seconds)]


def _joined(rows: list[tuple]) -> list[tuple]:
  """Joins rows that differ only in the name of the fault."""
  names: dict[tuple, list[str]] = {}
  for name, *numbers in rows:
    names.setdefault(tuple(numbers), []).append(name)
  return [
    (", ".join(found), f"{count} each" if len(found) > 1 else count, *numbers)
    for (count, *numbers), found in names.items()
  ]


def _damage_rows(summary: dict) -> list[tuple]:
  rows = []
  for kind, numbers in summary["kinds"].items():
    parts = [f"{numbers[n]} {n}" for n in ("went back", "refused", "harmless", "wrong")]
    recovered = ", ".join(part for part in parts if not part.startswith("0 "))
    named = f"{numbers['named']} of {numbers['of']}" if numbers["of"] else NONE
    rows.append(
      (kind, f"{numbers['faults']}", named, recovered, f"{numbers['steps_lost']}",
       "0" if not numbers["wrong"] else "?", NONE)
    )  # fmt: skip
  return _joined(rows)


def markdown(numbers: dict) -> str:
  """Formats the content of results.json as a table of faults."""
  header = (
    "fault", "caused", "detected and named", "recovered", "steps lost, at most",
    "rows lost or repeated", "seconds to resume",
  )  # fmt: skip
  rows: list[tuple] = []
  if "kill" in numbers:
    rows += _kill_rows(numbers["kill"])
  if "damage" in numbers:
    rows += _damage_rows(numbers["damage"])
  lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
  lines += [f"| {' | '.join(row)} |" for row in rows]
  return "\n".join(lines) + "\n"
