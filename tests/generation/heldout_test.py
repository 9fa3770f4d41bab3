import numpy as np
from PIL import Image

from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.generation.heldout import heldout_tasks, sample_grids
from cm3leon_jax.retrieval.neighbors import load_neighbors
from cm3leon_jax.run.run import Run
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import random_params

COLUMNS = [(2, SETTINGS.sampling)]


def test_heldout_captions_are_evenly_spaced_and_have_their_neighbors(workdir, layout):
  found = heldout_tasks(layout, workdir, 3, 7, COLUMNS)
  assert [t.prompt for t in found] == ["red apple", "blue car", "new house"]
  assert [t.seed for t in found] == [7, 8, 9]
  assert [t.key for t in found] == ["h0", "h2", "h4"]
  assert [t.original for t in found] == [None] * 3
  ids = load_neighbors(workdir / "neighbors", "heldout_pairs", text_only=True)
  bank = DocumentStore(workdir / "documents" / "train_pairs", VOCAB)
  assert [[d.key for d in t.neighbors] for t in found] == [
    [bank[int(i)].key for i in ids[row][:2]] for row in (0, 2, 4)
  ]
  every = heldout_tasks(layout, workdir, 5, 7, COLUMNS)
  assert len(every[1].neighbors) == 1  # The document has only one neighbor.
  both = heldout_tasks(layout, workdir, 2, 7, [(0, SETTINGS.sampling), *COLUMNS])
  fields = [(t.row, t.retrieve, len(t.neighbors)) for t in both]
  assert fields == [(0, 0, 0), (1, 0, 0), (0, 2, 2), (1, 2, 2)]
  assert len(heldout_tasks(layout, workdir, 6, 7, COLUMNS)) == len(every)


def test_the_model_reads_the_ids_of_the_store(workdir, layout):
  """Given a truncated caption, the model reads the stored ids; its text may encode to other ids."""
  (task,) = heldout_tasks(layout, workdir, 1, 0, [(0, SETTINGS.sampling)])
  cut = task.document.segments[0].tokens[:-1]
  segments = (task.document.segments[0].__class__(False, cut), task.document.segments[1])
  document = task.document.__class__(**{**vars(task.document), "segments": segments})
  request = task.__class__(**{**vars(task), "document": document}).to_request(layout)
  assert request.streams[0].tolist() == [VOCAB.eos, *cut, VOCAB.brk]


def test_the_trainer_writes_a_grid(workdir, tmp_path):
  with one_device():
    generate_grid = sample_grids(Run(workdir, SETTINGS), tmp_path / "grid")
    grid = generate_grid(random_params(SETTINGS.model), 12)
  assert [p.name for p in (tmp_path / "grid").iterdir()] == ["step_000012.png"]
  written = np.asarray(Image.open(tmp_path / "grid" / "step_000012.png"))
  np.testing.assert_array_equal(written, np.asarray(grid))
  assert written.std() > 10
