from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents import unseen_tokens
from cm3leon_jax.data.documents.store import Document, Segment, write_documents
from cm3leon_jax.files.json_files import write_json
from tests.data.stores import VOCAB
from tests.refusals import refused

FIRST = VOCAB.num_special
TEXTS = set(range(FIRST, VOCAB.text_size))


def make_run(folder, start=None, **stores):
  folder = epath.Path(folder)
  for name, ids in stores.items():
    part = "instructions" if name == "train_edit" else "documents"
    segment = Segment(False, np.array(ids, np.int32))
    document = Document(name, (segment,), "s", "l", "a")
    write_documents(folder / part / name, [document], VOCAB)
  run = {"run": {"init_from": {"source": str(start)} if start else None}}
  write_json(folder / "train" / "config.json", run)
  return folder


def test_what_training_met_is_in_its_own_stores_and_those_of_the_run_before(tmp_path):
  base = make_run(tmp_path / "base", train_pairs=[FIRST, FIRST + 1], heldout_pairs=[FIRST + 5])
  assert unseen_tokens.find(base, VOCAB) == TEXTS - {FIRST, FIRST + 1}
  stores = {"bank_pairs": [FIRST + 2], "train_texts": [FIRST + 3], "train_edit": [FIRST + 4]}
  tuned = make_run(tmp_path / "tuned", base, **stores)
  assert unseen_tokens.find(tuned, VOCAB) == TEXTS - {FIRST + i for i in range(5)}


def test_it_is_not_known_of_what_began_from_an_unknown_model_or_has_no_stores(tmp_path):
  (tmp_path / "init").mkdir()
  run = make_run(tmp_path / "run", tmp_path / "init", train_pairs=[FIRST])
  assert unseen_tokens.find(run, VOCAB) is None
  assert unseen_tokens.find(make_run(tmp_path / "empty"), VOCAB) is None


def test_a_bundle_has_it_in_a_file(tmp_path):
  write_json(tmp_path / unseen_tokens.FILE, {"ids": [FIRST, FIRST + 7]})
  assert unseen_tokens.find(tmp_path, VOCAB) == {FIRST, FIRST + 7}


def test_a_damaged_count_is_one_sentence(tmp_path):
  run = make_run(tmp_path / "run", train_pairs=[FIRST])
  (run / "documents" / "train_pairs" / "token_counts.npy").write_bytes(b"\x93NUMPY")
  with refused(UserError, "token_counts.npy"):
    unseen_tokens.find(run, VOCAB)
