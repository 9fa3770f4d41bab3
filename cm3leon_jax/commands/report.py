"""Gathers what every stage of a run left into summary.json and report.html; a stage that has not run is said so.

python -m launch.report --config=ml_configs/openmoji.py --workdir=workdir
"""

from absl import flags
from ml_collections import config_flags

from cm3leon_jax.commands import common
from cm3leon_jax.reports import report


def main(settings, workdir):
  del settings  # The stages' folders say what was run.
  summary = report.write(workdir, config_flags.get_config_filename(flags.FLAGS["config"]))
  for line in summary["headlines"]:
    verdict = {
      None: "not run" if line["value"] is None else "no target",
      True: "met",
      False: "not met",
    }[line["met"]]
    target = f" ({line['relation']}{report.show(line['target'])}: {verdict})"
    print(f"{line['title']}: {report.show(line['value'])}{target}")
  for row in summary.get("samples", {}).get("clip_score", []):
    print(
      f"CLIP score at guidance {row['guidance']:g}, {row['retrieve']} retrieved: {row['mean']:.3f} "
      f"(standard deviation {row['standard_deviation']:.3f}, {row['samples']} samples)"
    )
  print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
  common.run(main)
