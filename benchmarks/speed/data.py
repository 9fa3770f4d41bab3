"""Measures the speed of the data path per core, in processor seconds of all threads.

python -m benchmarks.speed.data --part=plan
python -m benchmarks.speed.data --part=pipeline
"""

# n documents, S segments.

import dataclasses
import functools
import pathlib
import tempfile
import time
import tracemalloc

from absl import app, flags
import numpy as np

from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.documents.store import Document, DocumentStore, Segment, write_documents
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.plan import RowPlan, RowSource
from cm3leon_jax.data.rows.plan_statistics import describe, plan_statistics
from cm3leon_jax.vocab import VocabLayout

_PART = flags.DEFINE_enum("part", None, ["plan", "pipeline"], "Part to measure.", required=True)
_DOCUMENTS = flags.DEFINE_integer(
  "num_documents", 1_000_000, "Number of pairs, and number of texts, in part `plan`.", lower_bound=8
)
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 5, "Repetitions of a measurement.", lower_bound=1
)

VOCAB = VocabLayout(num_special=256, text_size=56_320, image_size=8_192)
CODES = (256, 1_024)
CAPTION = (8, 40)  # Number of tokens per caption, a half-open range.
TEXT_MEAN, TEXT_SIGMA = 500, 1.1  # Log-normal lengths with median 273; 0.7% are above 4,095.


@dataclasses.dataclass
class LengthStore:
  """Replacement for a `DocumentStore`; contains only the lengths of documents, no tokens.

  Attributes:
    offsets: int64 [n + 1], first segment of each of n documents.
    lengths: int32 [S], number of tokens of each segment.
    is_image: bool [S], whether each segment is an image.
  """

  offsets: np.ndarray
  lengths: np.ndarray
  is_image: np.ndarray
  folder: str = "synthetic"

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def parts(self) -> tuple["LengthStore", ...]:
    return (self,)

  def segment_lengths(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    part = slice(self.offsets[i], self.offsets[i + 1])
    return self.lengths[part], self.is_image[part]


def text_lengths(documents: int, rng: np.random.Generator) -> np.ndarray:
  """Samples the lengths of texts from a log-normal distribution."""
  mu = np.log(TEXT_MEAN) - TEXT_SIGMA**2 / 2
  return np.ceil(rng.lognormal(mu, TEXT_SIGMA, documents)).astype(np.int32)


def random_candidates(documents: int, rng: np.random.Generator) -> np.ndarray:
  """Samples candidates for neighbors, int32 [n, 4]. Every twentieth document has only one."""
  neighbors = rng.integers(0, documents, (documents, 4), dtype=np.int32)
  neighbors[::20, 1:] = -1
  return neighbors


def synthetic_sources(
  documents: int, codes: int, text_share: float = DataConfig.text_share, seed: int = 0
) -> list[RowSource]:
  """Creates pairs (a caption and `codes` image codes) and texts: realistic lengths, no tokens."""
  rng = np.random.default_rng(seed)
  offsets, lengths = (
    np.arange(documents + 1, dtype=np.int64),
    np.full(2 * documents, codes, np.int32),
  )
  lengths[::2] = rng.integers(*CAPTION, documents)
  pairs = LengthStore(2 * offsets, lengths, np.arange(2 * documents) % 2 == 1)
  texts = LengthStore(offsets, text_lengths(documents, rng), np.zeros(documents, bool))
  return [
    RowSource(pairs, 1 - text_share, random_candidates(documents, rng), pairs),
    RowSource(texts, text_share),
  ]


def written_sources(
  folder: pathlib.Path, documents: int, codes: int, seed: int = 0
) -> list[RowSource]:
  """Writes documents as in `synthetic_sources`, but with random tokens, to stores in `folder`."""
  rng = np.random.default_rng(seed)
  origin = {"source": "synthetic", "license": "CC0-1.0", "attribution": "nobody"}

  def text(tokens: int) -> Segment:
    ids = rng.integers(VOCAB.num_special, VOCAB.text_size, tokens)
    return Segment(False, ids.astype(np.int32))

  def image() -> Segment:
    return Segment(True, VOCAB.image_ids(rng.integers(0, VOCAB.image_size, codes)))

  pairs = (
    Document(f"p{i}", (text(rng.integers(*CAPTION)), image()), **origin) for i in range(documents)
  )
  texts = (
    Document(f"t{i}", (text(n),), **origin) for i, n in enumerate(text_lengths(documents, rng))
  )
  write_documents(folder / "pairs", pairs, VOCAB)
  write_documents(folder / "texts", texts, VOCAB)
  pairs, texts = (DocumentStore(folder / name, VOCAB) for name in ("pairs", "texts"))
  share = DataConfig.text_share
  candidates = random_candidates(documents, rng)
  return [RowSource(pairs, 1 - share, candidates, pairs), RowSource(texts, share)]


def measure(name: str, unit: str, action, repetitions: int) -> float:
  """Measures how many units per second `action(i)` processes. `action` returns its number of units.

  Prints the median and the range over the repetitions; returns the median.
  """
  rates = []
  for i in range(repetitions):
    start = time.process_time()
    amount = action(i)
    rates.append(amount / (time.process_time() - start))
  median = float(np.median(rates))
  print(
    f"{name}: {median:,.0f} {unit}/s per core "
    f"({min(rates):,.0f} to {max(rates):,.0f}, {repetitions} times)",
    flush=True,
  )
  return median


def peak_mib(action) -> float:
  """Returns the peak of the memory that `action()` allocates, in MiB."""
  tracemalloc.start()
  action()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return peak / 2**20


def measure_plan(documents: int, repetitions: int) -> None:
  """Measures the speed of planning whole windows with the default config, and its peak memory."""
  config = DataConfig()
  for codes in CODES:
    sources = synthetic_sources(documents, codes)
    open_plan = functools.partial(RowPlan, sources, config, VOCAB.num_masks, seed=0)

    def opened_documents(_: int, open_plan=open_plan) -> int:
      open_plan()
      return 2 * documents

    measure(f"open, {codes} codes", "documents", opened_documents, repetitions)
    plan = open_plan()

    def planned_samples(window: int, plan=plan) -> int:
      return sum(len(row) for row in plan.window(window))

    rate = measure(f"plan, {codes} codes", "samples", planned_samples, repetitions)
    statistics = plan_statistics(plan)
    print(
      f"  {rate / statistics['samples_per_row']:,.0f} rows/s, "
      f"{1e9 / rate / 3_600:.1f} core-hours for a billion documents"
    )
    print(f"  {describe(statistics)}")
    print(f"  {statistics}", flush=True)
  stored = sum(
    x.nbytes for s in sources for x in (s.store.offsets, s.store.lengths, s.store.is_image)
  )
  peak = peak_mib(lambda: open_plan().window(5))
  print(
    f"memory: {peak:.0f} MiB for opening a plan and planning six windows, "
    f"besides {stored / 2**20:,.0f} MiB of lengths"
  )


def measure_pipeline(repetitions: int, documents: int = 4_000, rows: int = 400) -> None:
  """Measures how fast one thread reads (from the page cache), joins, masks and packs documents."""
  for codes in CODES:
    with tempfile.TemporaryDirectory() as folder:
      sources = written_sources(pathlib.Path(folder), documents, codes)
      loader = RowLoader(RowPlan(sources, DataConfig(), VOCAB, seed=0), VOCAB)
      read_rows(loader, 0, rows)

      def read_tokens(i: int, loader=loader) -> int:
        return read_rows(loader, i * rows, rows)

      def planned_tokens(window: int, plan=loader.plan) -> int:
        return sum(sample.num_positions for row in plan.window(window + 1) for sample in row)

      rate = measure(f"pipeline, {codes} codes", "tokens", read_tokens, repetitions)
      planning = measure("  its plan", "tokens", planned_tokens, repetitions)
      print(f"  together {1 / (1 / rate + 1 / planning):,.0f} tokens/s per core", flush=True)


def read_rows(loader: RowLoader, first: int, rows: int) -> int:
  """Reads `rows` rows of the first window; returns their number of tokens, including padding."""
  count = len(loader.plan.window(0))
  return sum(int((loader[i % count]["segment_ids"] > 0).sum()) for i in range(first, first + rows))


def main(argv: list[str]) -> None:
  del argv
  if _PART.value == "plan":
    measure_plan(_DOCUMENTS.value, _REPETITIONS.value)
  elif _PART.value == "pipeline":
    measure_pipeline(_REPETITIONS.value)


if __name__ == "__main__":
  app.run(main)
