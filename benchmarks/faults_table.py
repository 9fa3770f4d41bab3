"""Formats the results of `benchmarks.faults` as a table, and lists the failures."""

NONE = "-"
TOLERANCE = 1e-5  # Maximum difference between losses of a step on different meshes.


def kill_failures(summary: dict) -> list[str]:
  """Returns a sentence for each failure in a summary of `faults_kill`."""
  failures = [f"{run} differs in {', '.join(parts)}" for run, parts in summary["differing"].items()]
  if not summary["control_differs"]:
    failures.append("the control, one row too late, equals the run that was never killed")
  if summary["replayed"] != summary["replayed_equal"]:
    failures.append("a repeated step had a different loss")
  return failures


def failures(summary: dict) -> list[str]:
  """Returns a sentence for each failure in a summary of `faults_damage` or `faults_command`."""
  found = []
  for kind, numbers in summary["kinds"].items():
    if numbers["wrong"]:
      found.append(f"{kind}: {numbers['wrong']} of {numbers['faults']} had a wrong outcome")
    if numbers["named"] < numbers["of"]:
      found.append(f"{kind}: {numbers['of'] - numbers['named']} of {numbers['of']} had no message")
  if summary["control"] and not summary["control"]["wrong"]:
    found.append("the control, a restore without digests, was not noticed")
  if not summary.get("unchanged", True):
    found.append("a run that refused to start changed its folder")
  return found


def elastic_failures(summary: dict) -> list[str]:
  """Returns a sentence for each failure in a summary of `faults_elastic`."""
  found = [f"{name} rows: {summary[name]}" for name in ("lost", "surplus", "different")]
  found = [sentence for sentence in found if not sentence.endswith(" 0")]
  if summary["control"] and not summary["control"]["different"]:
    found.append("rows of the control, one row too late, equal the expected ones")
  if not summary["same_steps"]:
    found.append("a training lacks a step")
  if (
    summary["trained"] and not summary["largest_difference"] < TOLERANCE < summary["train_control"]
  ):
    found.append(
      f"losses of a step differ by {summary['largest_difference']}, and of different steps by "
      f"{summary['train_control']}; {TOLERANCE:g} must be between these numbers"
    )
  return found


def replay_failures(summary: dict) -> list[str]:
  """Returns a sentence for each failure in a summary of `faults_replay`."""
  found = []
  for kind, numbers in summary["kinds"].items():
    flips = numbers["flips"] - numbers["vanished"]
    for name in ("found", "named"):
      if numbers[name] < flips:
        found.append(f"{kind}: {flips - numbers[name]} flips not {name}")
    if numbers["wrong"]:
      found.append(f"{kind}: {numbers['wrong']} runs continued with a wrong state")
  if summary["alarms"]:
    found.append(
      f"{summary['alarms']} of {summary['clean']} steps without a flip had a false alarm"
    )
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


def _joined(rows: list[tuple], where: str) -> list[tuple]:
  """Joins rows that differ only in the name of the fault; puts `where` before the names."""
  names: dict[tuple, list[str]] = {}
  for name, *numbers in rows:
    names.setdefault(tuple(numbers), []).append(name)
  return [
    (where + ", ".join(found), f"{count} each" if len(found) > 1 else count, *numbers)
    for (count, *numbers), found in names.items()
  ]


def _damage_rows(summary: dict, where: str) -> list[tuple]:
  rows, seconds = [], _seconds(summary.get("seconds_to_resume", {}))
  for kind, numbers in summary["kinds"].items():
    parts = [f"{numbers[n]} {n}" for n in ("went back", "refused", "harmless", "wrong")]
    recovered = ", ".join(part for part in parts if not part.startswith("0 "))
    named = f"{numbers['named']} of {numbers['of']}" if numbers["of"] else NONE
    rows.append(
      (kind, f"{numbers['faults']}", named, recovered, f"{numbers['steps_lost']}",
       "0" if not numbers["wrong"] else "?", seconds if numbers["went back"] else NONE)
    )  # fmt: skip
  return _joined(rows, where)


def _elastic_rows(summary: dict) -> list[tuple]:
  rows = f"{summary['lost'] + summary['surplus'] + summary['different']} of {summary['rows']:,}"
  count = _of(summary["schedules"], summary["asked"])
  name = f"processes and mesh change, {summary['changes']} times in all, loader alone"
  result = [(name, count, NONE, "all" if rows.startswith("0 ") else "?", "0", rows, NONE)]
  if summary["trained"]:
    name = f"the same in training: losses differ by at most {summary['largest_difference']:.1e}"
    result.append((name, f"{summary['trained']}", NONE, "all", "0", "0", NONE))
  return result


def _replay_rows(summary: dict) -> list[tuple]:
  rows = []
  for kind, numbers in summary["kinds"].items():
    flips, found = numbers["flips"], f"{numbers['found']} found, {numbers['named']} named"
    parts = [f"{numbers[name]} {name}" for name in ("recovered", "vanished", "stopped", "wrong")]
    ended = ", ".join(part for part in parts if not part.startswith("0 "))
    lost = "those since the checkpoint" if numbers["stopped"] else "0"
    rows.append((kind, f"{flips}", found, ended, lost, "0", NONE))
  clean = f"checked steps without a flip: {summary['alarms']} false alarms"
  return [
    *_joined(rows, "`replay_every`: bit flip in "),
    (clean, f"{summary['clean']}", NONE, NONE, "0", "0", NONE),
  ]


def _stages_rows(summary: dict) -> list[tuple]:
  """Returns a row per stage; `summary["asked"]` is the number of requested kills per stage."""
  return [
    (f"`{name}`", _of(stage["kills"], summary["asked"]), NONE,
     f"{stage['equal']} of {stage['runs']} runs", NONE,
     "0" if stage["equal"] == stage["runs"] else "?", NONE)
    for name, stage in summary["stages"].items()
  ]  # fmt: skip


def markdown(numbers: dict) -> str:
  """Formats the content of results.json as a table of faults and a table of interrupted phases."""
  header = (
    "fault", "caused", "detected and named", "recovered", "steps lost, at most",
    "rows lost or repeated", "seconds to resume",
  )  # fmt: skip
  rows: list[tuple] = []
  if "kill" in numbers:
    rows += _kill_rows(numbers["kill"])
  if "damage" in numbers:
    rows += _damage_rows(numbers["damage"], "")
  if "command" in numbers:
    rows += _damage_rows(numbers["command"], "`cm3leon train`: ")
  if "elastic" in numbers:
    rows += _elastic_rows(numbers["elastic"])
  if "replay" in numbers:
    rows += _replay_rows(numbers["replay"])
  if "stages" in numbers:
    rows += _joined(_stages_rows(numbers["stages"]), "SIGKILL in ")
  lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
  lines += [f"| {' | '.join(row)} |" for row in rows]
  if "kill" in numbers:
    lines += ["", "| killed in | times |", "|---|---|"]
    lines += [f"| {phase} | {times} |" for phase, times in numbers["kill"]["phases"].items()]
  return "\n".join(lines) + "\n"
