"""Measures whether retrieval helps a small decoder: 0, 1, 2 and 2 shuffled neighbors.

  python -m benchmarks.retrieval_ablation --workdir=workdir/ablation

Trains the tokenizers, a CLIP and then a decoder for every condition and seed. All decoders train
for equal steps on drawings of each concept in several styles. Writes results.json, table.md and
plot.png to the workdir. Finished parts are skipped, so the command can be stopped at any time.
Method: docs/retrieval_ablation.md.
"""

import dataclasses
import pathlib
import sys
import time

from absl import app, flags, logging
import jax
import numpy as np

from benchmarks import ablation_table, drawing_styles
from benchmarks import experiment as experiment_lib
from benchmarks.ablation_table import Run
from cm3leon_jax.checkpoints import reading
from cm3leon_jax.config import UserError
from cm3leon_jax.configs import openmoji
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.rows import loader
from cm3leon_jax.data.rows.plan import RowPlan, RowSource
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.retrieval import neighbors
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.runs import stages, table
from cm3leon_jax.settings import Settings, settings_from_config

# n documents, C candidates per document, K of which stand before the document as neighbors.

SHARED = ("raw", "text_tokenizer", "vqgan", "documents", "clip", "neighbors")
# A pair takes about 266 slots. A row of 1,664 slots holds 6 pairs without neighbors, 3 with one
# neighbor or 2 with two, so all rows are equally full. Very similar neighbors are allowed, because
# groups exclude variants.
SLOTS = 1_664
OVERRIDES = {
  "data.sequence_length": SLOTS,
  "data.text_share": 0.0,
  "model.max_positions": SLOTS,
  "retrieval.max_similarity": 1.0,
  "train.global_batch_size": 1,
  "train.eval_batches": 8,
  "train.num_samples": 1,
}


@dataclasses.dataclass(frozen=True)
class Condition:
  """Neighbors before a document: its own or, if `shuffled`, those of another document."""

  label: str
  num_neighbors: int
  shuffled: bool = False


CONDITIONS = {
  "0": Condition("K = 0", 0),
  "1": Condition("K = 1", 1),
  "2": Condition("K = 2", 2),
  "shuffled": Condition("K = 2, shuffled", 2, shuffled=True),
}


@dataclasses.dataclass(frozen=True)
class Ablation:
  """Location and size of the ablation.

  Attributes:
    workdir: folder of all runs.
    steps: training steps of every run.
    minutes: variant of ml_configs/openmoji.py; it scales the training steps of tokenizers and CLIP.
  """

  workdir: pathlib.Path
  steps: int
  minutes: float

  def overrides(self, **fields) -> dict:
    """Returns the config fields that differ from `openmoji`."""
    steps = dict.fromkeys(("train.steps", "train.eval_every", "train.sample_every"), self.steps)
    steps["train.checkpoint_every"] = min(100, self.steps)
    return {**OVERRIDES, "raw.source": str(self.workdir / "drawings"), **steps, **fields}

  def settings(self, overrides: dict) -> Settings:
    """Returns the validated settings."""
    config = openmoji.get_config(f"{self.minutes:g}")
    config.update_from_flattened_dict(overrides)
    return settings_from_config(config)

  def command(self, name: str, workdir: pathlib.Path, overrides: dict) -> None:
    """Runs a stage, see `experiment.run_stage`."""
    experiment_lib.run_stage(name, f"ml_configs/openmoji.py:{self.minutes:g}", workdir, overrides)


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of both splits, and [n] concept numbers of each document."""

  train: DocumentStore
  heldout: DocumentStore
  train_concepts: np.ndarray
  heldout_concepts: np.ndarray

  @property
  def subsets(self) -> dict[str, np.ndarray]:
    """Masks [n] of `ablation_table.SUBSETS`: whether the training documents contain the concept."""
    in_train = np.isin(self.heldout_concepts, self.train_concepts)
    return {"drawn_by_others": in_train, "new": ~in_train}


def open_corpus(workdir: pathlib.Path, vocab) -> Corpus:
  """Opens both stores and numbers the concepts of their documents."""
  train, heldout = (
    DocumentStore(workdir / "documents" / f"{split}_pairs", vocab) for split in ("train", "heldout")
  )
  _, numbers = np.unique(np.concatenate([train.concepts, heldout.concepts]), return_inverse=True)
  return Corpus(train, heldout, *np.split(numbers, [len(train)]))


def concepts_of(ids: np.ndarray, bank_concepts: np.ndarray) -> np.ndarray:
  """Returns the concepts of candidates; -1 for the id -1, which means no candidate."""
  return np.append(bank_concepts, -1)[ids]


def shuffled_order(own: np.ndarray, candidates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Assigns each document the candidates of another document, without its own concept.

    own = [7 8 9], candidates = [[7] [8] [9]]: result = [1 2 0] or [2 0 1]

  Each document's candidates are used once.

  Args:
    own: [n] concepts of the documents.
    candidates: [n, C] concepts of their candidates, -1 for no candidate.
    rng: random generator for the order.

  Raises:
    UserError: no such order was found.
  """
  n = len(own)
  order = rng.permutation(n)
  for _ in range(1_000):
    wrong = np.flatnonzero((order == np.arange(n)) | (candidates[order] == own[:, None]).any(1))
    if not len(wrong):
      return order
    for i, j in zip(wrong, rng.integers(n, size=len(wrong))):
      order[[i, j]] = order[[j, i]]
  raise UserError(
    f"the candidates of {n} documents cannot be shuffled so that none shows its document's "
    "concept: use documents of more concepts."
  )


def shuffle_neighbors(
  folder: pathlib.Path, target: pathlib.Path, corpus: Corpus, seed: int
) -> None:
  """Writes the neighbors in `folder` to `target`, reassigned within each split, unless done."""
  done = read_json(folder / stages.DONE)
  done["id"] += f"-shuffled-{seed}"
  if (target / stages.DONE).exists() and read_json(target / stages.DONE)["id"] == done["id"]:
    return
  rng = np.random.default_rng(seed)
  for name, own, sides in (
    ("train_pairs", corpus.train_concepts, {"": False}),
    ("heldout_pairs", corpus.heldout_concepts, {"": False, "text_": True}),
  ):
    arrays = {
      f"{prefix}{array}": neighbors.load_neighbors(folder, name, by_caption, array)
      for prefix, by_caption in sides.items()
      for array in ("ids", "scores")
    }
    ids = [values for array, values in arrays.items() if array.endswith("ids")]
    candidates = np.concatenate(ids, axis=1)
    order = shuffled_order(own, concepts_of(candidates, corpus.train_concepts), rng)
    for array, values in arrays.items():
      ArrayStore.create(target / name / array, values.shape[1:], values.dtype).append(values[order])
  write_json(target / stages.DONE, done)


def own_concept_share(folder: pathlib.Path, corpus: Corpus) -> dict[str, float]:
  """Measures how often a neighbor shows the document's own concept, in another style.

  Returns:
    train_candidates: share of all candidates of training documents. heldout_first, heldout_second:
    share of the best two by caption, for held-out documents whose concept is in the bank.
  """
  ids = neighbors.load_neighbors(folder, "train_pairs")
  train = (concepts_of(ids, corpus.train_concepts) == corpus.train_concepts[:, None])[ids >= 0]
  ids = neighbors.load_neighbors(folder, "heldout_pairs", text_only=True)
  heldout = (concepts_of(ids, corpus.train_concepts) == corpus.heldout_concepts[:, None])[
    corpus.subsets["drawn_by_others"]
  ]
  return {
    "train_candidates": train.mean(),
    "heldout_first": heldout[:, 0].mean(),
    "heldout_second": heldout[:, 1].mean(),
  }


def score(settings: Settings, run: pathlib.Path, corpus: Corpus) -> dict[str, list[float]]:
  """Scores every held-out document after its K best neighbors by caption in `run`.

  Returns:
    image_bits, image_codes, text_bits, text_tokens: [n] sums over the image codes and the caption.
  """
  ids = neighbors.load_neighbors(run / "neighbors", "heldout_pairs", text_only=True)
  samples, masks = [], []
  for i in range(len(corpus.heldout)):
    document = corpus.heldout[i]
    best = [corpus.train[int(j)] for j in ids[i][ids[i] >= 0][: settings.data.num_neighbors]]
    fitting = bits.fit_neighbors(document, best, settings.data.sequence_length)
    samples.append(loader.join([*fitting, document], settings.vocab))
    masks.append(bits.own_targets(samples[-1], document, settings.vocab))
  with jax.set_mesh(create_mesh(settings.mesh)):
    params, _ = reading.load_params(run / "train", settings.model)
    rows = settings.evaluation.batch_size
    scored = bits.score_samples(params, settings.model, samples, settings.vocab, rows)
  result = {}
  for modality, unit in (("image", "codes"), ("text", "tokens")):
    result[f"{modality}_bits"] = [float(b[m[modality]].sum()) for b, m in zip(scored, masks)]
    result[f"{modality}_{unit}"] = [int(m[modality].sum()) for m in masks]
  return result


def count_queries(settings: Settings, run: pathlib.Path, corpus: Corpus) -> int:
  """Counts the samples of the training in `run`; each has one document that is not a neighbor."""
  ids = neighbors.load_neighbors(run / "neighbors", "train_pairs")
  plan = RowPlan(
    [RowSource(corpus.train, 1.0, ids, corpus.train)],
    settings.data,
    settings.vocab.num_masks,
    settings.seed,
  )
  return sum(
    len(plan.row(i)) for i in range(settings.train.steps * settings.train.global_batch_size)
  )


def run_one(ablation: Ablation, name: str, seed: int, corpus: Corpus) -> Run:
  """Trains and scores one condition with one seed, or reads its results."""
  condition, shared = CONDITIONS[name], ablation.workdir / "shared"
  overrides = ablation.overrides(**{"data.num_neighbors": condition.num_neighbors, "seed": seed})
  settings, run = (
    ablation.settings(overrides),
    ablation.workdir / f"steps_{ablation.steps}" / f"{name}_seed_{seed}",
  )
  own = {"neighbors"} if condition.shuffled else set()
  experiment_lib.link_stages(shared, run, [name for name in SHARED if name not in own])
  if condition.shuffled:
    shuffle_neighbors(shared / "neighbors", run / "neighbors", corpus, seed)
  ablation.command("train", run, overrides)
  trained = stages.require(run, "train")
  with stages.once(run / "bits", {"inputs": {"train": trained["id"]}}) as summary:
    if summary is not None:
      about = {
        "query_documents": count_queries(settings, run, corpus),
        "train_seconds": trained["seconds"],
      }
      write_json(run / "bits" / "bits.json", {**about, **score(settings, run, corpus)})
  values = read_json(run / "bits" / "bits.json")
  return Run(
    name, seed, **{k: np.array(v) if isinstance(v, list) else v for k, v in values.items()}
  )


def ablate(ablation: Ablation, names: list[str], num_seeds: int) -> dict:
  """Prepares the data, runs all conditions and seeds, and writes results after each run."""
  workdir, shared = ablation.workdir, ablation.workdir / "shared"
  overrides = ablation.overrides()
  settings = ablation.settings(overrides)
  drawing_styles.make_folder(workdir / "drawings", settings.raw.resolution)
  for name in SHARED:
    ablation.command(table.STAGES[name].command, shared, overrides)
  corpus = open_corpus(shared, settings.vocab)
  about = {
    "steps": ablation.steps,
    "rows_per_step": OVERRIDES["train.global_batch_size"],
    "row_slots": SLOTS,
  }
  about |= {
    "train_documents": len(corpus.train),
    "own_concept_share": own_concept_share(shared / "neighbors", corpus),
  }
  labels, runs, result = {name: CONDITIONS[name].label for name in names}, [], {}
  planned = [(seed, name) for seed in range(num_seeds) for name in names]
  for number, (seed, name) in enumerate(planned, 1):
    print(f"\n[{number}/{len(planned)}] {labels[name]}, seed {seed}", flush=True)
    start = time.time()
    runs.append(run_one(ablation, name, seed, corpus))
    level = runs[-1].image_bits.sum() / runs[-1].image_codes.sum()
    print(
      f"[{number}/{len(planned)}] {level:.3f} bits per held-out image code; "
      f"{time.time() - start:.0f} s.",
      flush=True,
    )
    result = about | ablation_table.summarize(runs, labels, corpus.subsets, corpus.heldout_concepts)
    experiment_lib.write_results(workdir, result, ablation_table.markdown(result))
    ablation_table.plot(result, workdir / "plot.png")
  return result


def main(argv) -> None:
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  try:
    names = experiment_lib.chosen_conditions(argv, args.conditions, CONDITIONS)
    ablation = Ablation(pathlib.Path(args.workdir).resolve(), args.steps, args.minutes)
    result = ablate(ablation, names, args.seeds)
  except drawing_styles.Skipped as missing:
    print(f"retrieval_ablation: skipped, {missing}", flush=True)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  else:
    print(
      f"\n{ablation_table.markdown(result)}\n"
      f"retrieval_ablation: results.json, table.md and plot.png are in {ablation.workdir}."
    )


if __name__ == "__main__":  # Importing this module, as tests do, defines no flags.
  flags.DEFINE_string(
    "workdir", "workdir/retrieval_ablation", "Folder of all runs; an existing one continues."
  )
  flags.DEFINE_integer("steps", 800, "Training steps of every run.", lower_bound=1)
  flags.DEFINE_integer("seeds", 3, "Number of seeds of every condition.", lower_bound=1)
  flags.DEFINE_list("conditions", list(CONDITIONS), "Conditions to run.")
  flags.DEFINE_float(
    "minutes",
    20,
    "Train tokenizers and CLIP as a run of openmoji of so many minutes does.",
    lower_bound=1e-3,
  )
  app.run(main)
