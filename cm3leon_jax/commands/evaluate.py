"""Measures bits per image code and text token of held-out pairs, with and without neighbors.

  python -m launch.evaluate --config=ml_configs/openmoji.py --workdir=workdir

The caption alone retrieves neighbors, as at inference. Writes evaluation/metrics.json.
"""

from cm3leon_jax import stages
from cm3leon_jax.commands import common
from cm3leon_jax.io import write_json


def main(settings, workdir):
  from cm3leon_jax.data.documents import DocumentStore
  from cm3leon_jax.evaluation import bits
  from cm3leon_jax.retrieval import neighbors
  from cm3leon_jax.training import checkpoint

  with stages.stage(workdir, "evaluation", settings) as summary, common.use_mesh(settings):
    if summary is None:
      return
    bits.check_batch(settings.evaluation)
    params, step = checkpoint.load_params(workdir / "train", settings.model)
    train, heldout = (
      DocumentStore(workdir / "documents" / f"{split}_pairs", settings.vocab)
      for split in ("train", "heldout")
    )
    ids = neighbors.load_neighbors(workdir / "neighbors", "heldout_pairs", text_only=True)
    sections = (settings.vocab, settings.data, settings.evaluation, settings.seed)
    metrics = bits.evaluate(params, settings.model, train, heldout, ids, *sections)
    summary.update(step=step, **metrics)
    write_json(workdir / "evaluation" / "metrics.json", summary)
    print(f"evaluate: {bits.describe(metrics)}")


if __name__ == "__main__":
  common.run(main)
