"""Writes the newest checkpoint in the Hugging Face layout to export/.

  python -m launch.export --config=ml_configs/openmoji.py --workdir=workdir

Then: transformers.AutoModelForCausalLM.from_pretrained("workdir/export"). With torch installed, its logits on held-out
documents are compared with ours.
"""

from cm3leon_jax import stages
from cm3leon_jax.commands import common
from cm3leon_jax.io import write_json

SAMPLES = 4


def main(settings, workdir) -> None:
  from cm3leon_jax.data import raw_pairs
  from cm3leon_jax.data.documents import DocumentStore
  from cm3leon_jax.data.pipeline import join
  from cm3leon_jax.export import huggingface
  from cm3leon_jax.training import checkpoint

  folder = workdir / "export"
  with stages.stage(workdir, "export", settings) as summary, common.use_mesh(settings):
    if summary is None:
      return
    origins = (
      raw_pairs.read_index(workdir / "raw")["origins"]
      if (workdir / "raw" / raw_pairs.INDEX).exists()
      else []
    )
    write_json(folder / "training_data.json", origins)  # Whose works the weights were made from.
    params, step = checkpoint.load_params(workdir / "train", settings.model)
    summary.update(
      huggingface.export(
        folder, params, settings.model, settings.vocab, workdir / "text_tokenizer"
      ),
      step=step,
    )
    told = "torch and transformers are not installed, so its logits were not compared"
    if huggingface.can_compare():
      heldout = DocumentStore(workdir / "documents" / "heldout_pairs", settings.vocab)
      samples = [join([heldout[i]], settings.vocab) for i in range(min(SAMPLES, len(heldout)))]
      compared = huggingface.compare_logits(folder, params, settings.model, samples)
      summary.update(logits=compared)
      told = (
        f"logits differ by at most {compared['max_difference']:.1e} (largest: {compared['max_logit']:.1f}) "
        f"on {compared['tokens']} held-out tokens"
      )
    summary.update(compared="logits" in summary)
    print(
      f"export: {summary['architecture']}, {summary['parameters']:,} parameters, in {folder}; {told}.",
      flush=True,
    )


if __name__ == "__main__":
  common.run(main)
