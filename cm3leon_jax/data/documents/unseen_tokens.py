"""Finds the text tokens that never occurred in training, which the model did not learn.

The document stores of a run contain the token counts. A bundle has a file of the unseen tokens.
"""

from collections.abc import Callable

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.runs import stages
from cm3leon_jax.vocab import VocabLayout

FILE = "unseen_tokens.json"  # Name of the file in a bundle.
READ = ("train_", "bank_")  # Name prefixes of the stores that training reads.


def find(
  workdir: epath.PathLike,
  vocab: VocabLayout,
  locate: Callable[[str], epath.PathLike] = epath.Path,
) -> frozenset[int] | None:
  """Returns the text ids that occur in no data of a run or of the runs that initialized it.

  `workdir` can also be a bundle. `locate` maps a value of `--init_from` to a folder. Returns ids in
  [vocab.num_special, vocab.text_size), or None if the token counts are unknown.

  Raises:
    UserError: a file is damaged.
  """
  folder = epath.Path(workdir)
  if (folder / FILE).exists():
    return frozenset(read_json(folder / FILE, {"ids": list})["ids"])
  path = folder / "train" / "config.json"
  names = [folder / part for part in ("documents", "instructions")]
  stores = [x for name in names if name.exists() for x in name.iterdir() if x.name.startswith(READ)]
  if not stores or not path.exists():
    return None
  counts = np.zeros(vocab.size, np.int64)
  for store in stores:
    file = store / "token_counts.npy"
    stages.check_files(file)
    try:
      with file.open("rb") as stream:
        counts += np.load(stream)
    except (ValueError, OSError, EOFError) as error:
      where = stages.again(store.parent, file)
      raise UserError(f"{file} cannot be read ({error}): {where}.") from error
  texts = counts[vocab.num_special : vocab.text_size]
  found = frozenset(int(i) + vocab.num_special for i in np.flatnonzero(texts == 0))
  start = read_json(path, {"run": dict})["run"].get("init_from")
  before = find(locate(start["source"]), vocab, locate) if start else found
  return None if before is None else found & before
