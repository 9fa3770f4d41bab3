"""Writes summary.json and report.html with the numbers and figures of every finished stage.

cm3leon report --workdir=workdir/scenes
"""

from __future__ import annotations

import shlex

from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  from cm3leon_jax.reports import report
  from cm3leon_jax.reports import summary as summary_lib


def main(settings: Settings, workdir: epath.Path) -> None:
  if not workdir.exists() or not any(workdir.glob(f"*/{stages.DONE}")):
    raise UserError(
      f"--workdir {workdir} has no finished stage: run `cm3leon prepare_data` with the "
      "same --config and --workdir first."
    )

  del settings  # The report uses what the stages recorded in their folders.
  given = shlex.join(common.config_arguments()).removeprefix("--config=")
  summary = report.write(workdir, given)
  for finding in summary["findings"]:
    print(finding)
  for line in summary["headlines"]:
    verdict = {None: "not run", True: "met", False: "not met"}[line["met"]]
    note = f", {line['note']}" if line["note"] else ""
    target = f" ({line['relation']}{report.show(line['target'])}{note}: {verdict})"
    if line["target"] is None:
      target = " (no target)" if line["value"] is not None else " (not run)"
    interval = ""
    if result := line["interval"]:
      interval = f" [{report.show(result['low'])}, {report.show(result['high'])}]"
    print(f"{line['title']}: {report.show(line['value'])}{interval}{target}")
  for row in summary.get("samples", {}).get("clip_score", []):
    print(summary_lib.describe_clip_score(row))
  print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
  common.run(main, config=None)
