"""Measures how much a retrieved neighbor improves bits and samples of a small decoder of `scenes`.

  python -m benchmarks.scene_retrieval --workdir=workdir/scene_retrieval

Trains the tokenizers and a CLIP model once, then decoders with and without neighbors, each with
several seeds. Computes every decoder's bits for held-out scenes after true neighbors, after
shuffled neighbors and without neighbors, and judges its samples. Writes results.json and table.md
to the workdir. Finished parts are skipped, so the command can be stopped at any time and started
again. docs/retrieval_ablation.md describes the method.
"""

import dataclasses
import pathlib
import sys
import time

from absl import app, flags, logging
import jax
import numpy as np

from benchmarks import experiment as experiment_lib
from benchmarks import scene_retrieval_table as table
from cm3leon_jax.checkpoints import reading
from cm3leon_jax.config import UserError
from cm3leon_jax.configs import scenes as config_scenes
from cm3leon_jax.data.documents.store import Bank, DocumentStore
from cm3leon_jax.data.rows import loader
from cm3leon_jax.data.rows.plan import RowPlan, RowSource
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.generation.heldout import tasks_of_rows
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.retrieval.neighbors import load_neighbors
from cm3leon_jax.runs import table as stage_table
from cm3leon_jax.scenes.judge import judge as scenes
from cm3leon_jax.settings import Settings, settings_from_config
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.trained.run import Run

# n held-out documents, I codes per image.

SHARED = ("raw", "text_tokenizer", "vqgan", "documents", "clip", "neighbors")
CONDITIONS = {
  "neighbors": "trained with a neighbor",
  "tokens": "trained without, on as many tokens",
  "documents": "trained without, on as many documents",
}
SUBSETS = {"rare": ("rare",), "common": ("scene",)}  # Subset -> reasons for holding out.


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Location and size of the experiment.

  Attributes:
    workdir: folder that contains all runs.
    steps: number of training steps of a run with neighbors, and of a run without neighbors on the
      same number of tokens.
    heldout: number of scenes that are held out.
    judged: maximum number of scenes per subset whose samples are judged.
  """

  workdir: pathlib.Path
  steps: int
  heldout: int
  judged: int

  def overrides(self, **fields) -> dict:
    """Returns the config fields that differ from the config `scenes`."""
    never = 1_000_000
    return {
      **experiment_lib.OLDER,
      "scenes.heldout": self.heldout,
      "train.steps": self.steps,
      "train.eval_every": never,
      "train.sample_every": never,
      "train.checkpoint_every": 250,
      **fields,
    }

  def settings(self, overrides: dict) -> Settings:
    """Returns the validated settings."""
    config = config_scenes.get_config()
    config.update_from_flattened_dict(overrides)
    return settings_from_config(config)

  def command(self, name: str, workdir: pathlib.Path, overrides: dict) -> None:
    """Runs a stage with `experiment.run_stage`."""
    experiment_lib.run_stage(name, "ml_configs/scenes.py", workdir, overrides)


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Held-out documents, and the neighbors that their captions retrieve.

  Attributes:
    bank: documents among which neighbors are retrieved.
    heldout: store of the held-out documents.
    rows: [n] index of each document in `heldout`.
    subsets: [n] name of each document's subset.
    concepts: [n] the object of a rare scene, or the facts of a common scene.
    neighbors: [n] index in `bank` of the best neighbor; -1 if the caption retrieves none.
    shuffled: [n] index in `bank` of the best neighbor of another scene, from the same subset but
      with other objects; -1 where `neighbors` is -1.
  """

  bank: Bank
  heldout: DocumentStore
  rows: np.ndarray
  subsets: np.ndarray
  concepts: np.ndarray
  neighbors: np.ndarray
  shuffled: np.ndarray


def open_corpus(workdir: pathlib.Path, settings: Settings, subsets_of=SUBSETS) -> Corpus:
  """Opens the documents of a run and selects those that belong to `subsets_of`."""
  bank = Bank(workdir / "documents", settings.vocab)
  heldout = DocumentStore(workdir / "documents" / "heldout_pairs", settings.vocab)
  ids = load_neighbors(workdir / "neighbors", "heldout_pairs", text_only=True)[:, 0]
  facts = [heldout[i].facts for i in range(len(heldout))]
  subset_of = {kind: name for name, kinds in subsets_of.items() for kind in kinds}
  rows = np.array([i for i, f in enumerate(facts) if f["heldout"] in subset_of])
  subsets = np.array([subset_of[facts[i]["heldout"]] for i in rows])
  names = [frozenset(o["class"] for o in facts[i]["objects"]) for i in rows]
  concepts = np.array(
    [min(n) if s == "rare" else heldout[int(i)].concept for i, s, n in zip(rows, subsets, names)]
  )
  neighbors, shuffled = ids[rows], np.full(len(rows), -1)
  rng = np.random.default_rng(0)
  for name in subsets_of:
    members = np.flatnonzero((subsets == name) & (neighbors >= 0))
    if len(members):
      partner = bits.partners(["/".join(sorted(names[i])) for i in members], rng)
      shuffled[members] = neighbors[members[partner]]
  return Corpus(bank, heldout, rows, subsets, concepts, neighbors, shuffled)


def score(settings: Settings, params: dict, corpus: Corpus, condition: str) -> list[float]:
  """Returns the bits of each held-out image after the document that `condition` chooses.

  "true": the best neighbor of its caption; "shuffled": the best neighbor of another scene; "none":
  no document.
  """
  before = {"true": corpus.neighbors, "shuffled": corpus.shuffled}.get(condition)
  samples, masks = [], []
  for n, row in enumerate(corpus.rows):
    document = corpus.heldout[int(row)]
    found = [] if before is None or before[n] < 0 else [corpus.bank[int(before[n])]]
    samples.append(loader.join([*found, document], settings.vocab))
    masks.append(bits.own_targets(samples[-1], document, settings.vocab)["image"])
  size = settings.evaluation.batch_size
  scored = bits.score_samples(params, settings.model, samples, settings.vocab, size)
  return [float(b[mask].sum()) for b, mask in zip(scored, masks)]


def chosen(corpus: Corpus, most: int) -> np.ndarray:
  """Returns indices into `corpus.rows` of up to `most` evenly spaced documents per subset."""
  of = [np.flatnonzero(corpus.subsets == name) for name in SUBSETS]
  return np.concatenate([m[np.unique(np.linspace(0, len(m) - 1, most).astype(int))] for m in of])


def judge(settings: Settings, params: dict, workdir: pathlib.Path, corpus, places, count: int):
  """Generates an image for each chosen caption, and judges it.

  Args:
    settings: settings of the run.
    params: parameters of the decoder.
    workdir: folder of the run.
    corpus: a Corpus.
    places: indices of the chosen documents, from `chosen`.
    count: number of neighbors before a caption, 0 or 1.

  Returns:
    For each caption, whether its image is correct in all facts, and the [I] codes of the image.
  """
  made = Pipeline.load(Run(workdir, settings), params, batch_size=settings.evaluation.batch_size)
  columns = [(count, settings.sampling)]
  tasks = tasks_of_rows(made.layout, workdir, corpus.rows[places], settings.seed, columns)
  samples = [of_task[0] for of_task in made.generate(tasks, show_progress=True)]
  facts = [task.document.facts for task in tasks]
  verdicts = scenes.judge_all(np.stack([s.segments[0] for s in samples]), facts)
  return [v.correct for v in verdicts], [s.codes[0] for s in samples]


def copied(settings: Settings, corpus: Corpus, places, codes) -> list[float | None]:
  """Returns, for each image, the share of its neighbor's ink that it repeats at the same positions.

  Ink means all codes of the neighbor's image except the most frequent one, which is the background.
  The result is None for an image without a neighbor.
  """
  shares: list[float | None] = []
  for place, image in zip(places, codes):
    if corpus.neighbors[place] < 0:
      shares.append(None)
      continue
    neighbor = corpus.bank[int(corpus.neighbors[place])].segments[-1].tokens
    neighbor = settings.vocab.image_codes(neighbor)
    ink = neighbor != np.bincount(neighbor).argmax()
    shares.append(float(np.mean(np.asarray(image)[ink] == neighbor[ink])))
  return shares


def copier(settings: Settings, workdir: pathlib.Path, corpus: Corpus, places) -> dict:
  """Judges neighbors as if they were samples, and computes `copied` for the original images.

  Uses only captions that have a neighbor.
  """
  places = places[corpus.neighbors[places] >= 0]
  found = [corpus.bank[int(corpus.neighbors[p])] for p in places]
  originals = [corpus.heldout[int(corpus.rows[p])] for p in places]
  codes, real = (
    np.stack([settings.vocab.image_codes(d.segments[-1].tokens) for d in documents])
    for documents in (found, originals)
  )
  images = ImageTokenizer.load(workdir / "vqgan").decode(codes)
  verdicts = scenes.judge_all(images, [document.facts for document in originals])
  names = [{o["class"] for o in d.facts["objects"]} for d in (*found, *originals)]
  shown = [a >= b for a, b in zip(names, names[len(found) :])]
  return {
    "neighbor_shows_the_objects": shown,
    "right": [verdict.correct for verdict in verdicts],
    "original_copied": copied(settings, corpus, places, real),
  }


def rows_of_documents(settings: Settings, workdir: pathlib.Path, documents: int = 0) -> int:
  """Counts the documents in all training rows, or the rows needed for `documents` documents.

  Neighbors are not counted.
  """
  bank = Bank(workdir / "documents", settings.vocab)
  ids = load_neighbors(workdir / "neighbors", "train_pairs")
  source = RowSource(bank.parts[0], 1.0, ids, bank)
  plan = RowPlan([source], settings.data, settings.vocab.num_masks, settings.seed)
  if not documents:
    total = settings.train.steps * settings.train.global_batch_size
    return sum(len(plan.row(i)) for i in range(total))
  rows = 0
  while documents > 0:
    documents -= len(plan.row(rows))
    rows += 1
  return rows


def overrides_of(experiment: Experiment, condition: str, seed: int) -> dict:
  """Returns the config fields of a run that differ from the config `scenes`."""
  overrides = experiment.overrides(seed=seed)
  if condition == "neighbors":
    return overrides
  overrides["data.num_neighbors"] = 0
  if condition == "documents":
    with_neighbors = experiment.settings(experiment.overrides(seed=seed))
    shared = experiment.workdir / "shared"
    documents = rows_of_documents(with_neighbors, shared)
    rows = rows_of_documents(experiment.settings(overrides), shared, documents)
    overrides["train.steps"] = -(-rows // with_neighbors.train.global_batch_size)
  return overrides


def measure(settings: Settings, run: pathlib.Path, corpus: Corpus, condition: str, judged: int):
  """Measures a trained decoder; returns measure -> kind of neighbor -> a value per document."""
  kinds = ("true", "shuffled", "none") if condition == "neighbors" else ("none",)
  counts = (1, 0) if condition == "neighbors" else (0,)
  places = chosen(corpus, judged)
  result: dict = {"documents": rows_of_documents(settings, run), "steps": settings.train.steps}
  with jax.set_mesh(create_mesh(settings.mesh)):
    params, _ = reading.load_params(run / "train", settings.model)
    result["bits"] = {kind: score(settings, params, corpus, kind) for kind in kinds}
    for count in counts:
      right, codes = judge(settings, params, run, corpus, places, count)
      name = "true" if count else "none"
      result.setdefault("right", {})[name] = right
      result.setdefault("copied", {})[name] = copied(settings, corpus, places, codes)
  return result


def run_one(experiment: Experiment, condition: str, seed: int, corpus: Corpus) -> dict:
  """Trains and measures one condition with one seed, or reads the results if they exist."""
  run = experiment.workdir / f"steps_{experiment.steps}" / f"{condition}_seed_{seed}"
  experiment_lib.link_stages(experiment.workdir / "shared", run, SHARED)
  overrides = overrides_of(experiment, condition, seed)
  settings = experiment.settings(overrides)
  experiment.command("train", run, overrides)

  def measured() -> dict:
    values = measure(settings, run, corpus, condition, experiment.judged)
    return {**values, "condition": condition, "seed": seed}

  return experiment_lib.measured_once(run, {"judged": experiment.judged}, measured)


def run_all(experiment: Experiment, conditions: list[str], seeds: list[int]) -> dict:
  """Prepares the data, runs all conditions and seeds, and writes the results after each run."""
  workdir, shared = experiment.workdir, experiment.workdir / "shared"
  overrides = experiment.overrides()
  settings = experiment.settings(overrides)
  for name in SHARED:
    experiment.command(stage_table.STAGES[name].command, shared, overrides)
  corpus = open_corpus(shared, settings)
  places = chosen(corpus, experiment.judged)
  about = {
    "subsets": corpus.subsets.tolist(),
    "concepts": corpus.concepts.tolist(),
    "judged": places.tolist(),
    "found": (corpus.neighbors >= 0).tolist(),
    "image_codes": settings.vqgan.image_tokens,
    "copier": copier(settings, shared, corpus, places),
  }
  runs, result = [], {}
  planned = [(seed, name) for seed in seeds for name in conditions]
  for number, (seed, name) in enumerate(planned, 1):
    print(f"\n[{number}/{len(planned)}] {CONDITIONS[name]}, seed {seed}", flush=True)
    start = time.time()
    runs.append(run_one(experiment, name, seed, corpus))
    print(f"[{number}/{len(planned)}] {time.time() - start:.0f} s.", flush=True)
    result = table.summarize(about, runs, CONDITIONS)
    experiment_lib.write_results(workdir, result, table.markdown(result))
  return result


def main(argv) -> None:
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  try:
    names = experiment_lib.chosen_conditions(argv, args.conditions, CONDITIONS)
    experiment = Experiment(
      pathlib.Path(args.workdir).resolve(), args.steps, args.heldout, args.judged
    )
    result = run_all(experiment, names, list(map(int, args.seeds)))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(
    f"\n{table.markdown(result)}\n"
    f"scene_retrieval: results.json and table.md are in {experiment.workdir}."
  )


if __name__ == "__main__":  # Tests import this module without flags.
  flags.DEFINE_string(
    "workdir", "workdir/scene_retrieval", "Folder of all runs; finished parts are skipped."
  )
  flags.DEFINE_integer("steps", 3_200, "Training steps with neighbors.", lower_bound=1)
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every condition.")
  flags.DEFINE_list("conditions", list(CONDITIONS), "Conditions to run.")
  flags.DEFINE_integer("heldout", 2_100, "Held-out scenes.", lower_bound=7)
  flags.DEFINE_integer("judged", 200, "Maximum number of judged scenes per subset.", 2)
  app.run(main)
