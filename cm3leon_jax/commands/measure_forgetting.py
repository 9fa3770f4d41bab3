"""Measures what a tuned model has forgotten of its base; writes forgetting/.

  cm3leon measure_forgetting --config=own --workdir=W

The base is the run that `cm3leon train --init_from=BASE` started from. The command computes the
bits of held-out documents of the base with both models. If the config has a judge, and these
documents have facts, it also judges images that both models generate for held-out captions. The
results have paired 95% intervals. `config.data.base_documents`
must be greater than 0.
"""

from __future__ import annotations

from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  from cm3leon_jax.evaluation import judged
  from cm3leon_jax.evaluation.likelihood import bits, forgetting
  from cm3leon_jax.run import base_documents, initial
  from cm3leon_jax.run import run as run_lib


def main(settings: Settings, workdir: epath.Path) -> None:
  if not settings.data.base_documents:
    raise UserError(
      "config.data.base_documents is 0, so this run has no documents of its base: set it in all "
      "commands of the run, from `cm3leon copy_tokenizers --init_from=RUN` on."
    )
  base = base_documents.open_parent(settings, workdir)
  inputs = base_documents.ids(settings, workdir)
  config = stages.run_config(settings, workdir, "forgetting", inputs)
  with stages.once(workdir / "forgetting", config) as summary, common.use_mesh(settings):
    if summary is None:  # Forgetting is already measured.
      return
    bits.check_batch(settings.evaluation)
    if (start := initial.recorded(workdir)) is None:
      raise UserError(
        f"the run in {workdir} has documents of a base, but began from random parameters, so there "
        "is no base to compare it with: use another --workdir, and give --init_from also to "
        "`cm3leon train`."
      )
    run, judge = run_lib.Run(workdir, settings), judged.judge_of(settings)
    before = forgetting.measure(run, run_lib.load_initial(start, settings), base, judge)
    params, step = run.params(dtype=settings.model.dtype)
    after = forgetting.measure(run, params, base, judge)
    result = forgetting.compare(before, after)
    summary.update(base=start.source, step=step, **result)
    print("\n".join(forgetting.describe(result, start.source)), flush=True)


if __name__ == "__main__":
  common.run(main)
