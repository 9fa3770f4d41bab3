"""Opens instruction stores as sources of training rows."""

from etils import epath

from cm3leon_jax.config.instructions import InstructionsConfig, InstructionTask
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.instructions.samples import Drops, Instructions, read_targets
from cm3leon_jax.data.instructions.sources import store_name
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.data.instructions.tasks import mixture
from cm3leon_jax.data.rows.plan import RowSource
from cm3leon_jax.errors import UserError
from cm3leon_jax.vocab import VocabLayout


def instruction_sources(
  config: InstructionsConfig, folder: epath.Path, vocab: VocabLayout, split: str, share: float
) -> list[RowSource]:
  """Opens one source of rows per task for a split. Returns [] if there are no tasks.

  The numbers of training records decide the shares of the tasks in both splits. Held-out samples
  omit no segments, and only their targets have a loss weight. `split` is "train" or "heldout".
  `share` is the sum of the shares of all tasks.

  Raises:
    UserError: a task has no store or no records, or no task has a held-out split.
  """
  if not config.any:
    return []
  tasks = load_tasks(config)

  def store(split: str, task: InstructionTask) -> DocumentStore:
    return DocumentStore(folder / store_name(split, task), vocab)

  sizes = [len(store("train", task)) for task in tasks]
  of_tasks = mixture(tasks, sizes, config.least_ratio, config.most_ratio)
  shares = {task.name: value for task, value in zip(tasks, of_tasks)}
  chosen = [task for task in tasks if split == "train" or task.heldout]
  if not chosen:
    raise UserError(
      "no task of config.instructions has a held-out split, which the held-out loss needs: set the "
      "field `heldout` in at least one task."
    )
  total = sum(shares[task.name] for task in chosen)
  sources = []
  for task in chosen:
    documents = store(split, task)
    targets = read_targets(documents.folder, len(documents))
    instructions = Instructions(targets, Drops(), "target")
    if split == "train":
      drops = Drops(task.drop_instruction, task.drop_all)
      instructions = Instructions(targets, drops, config.loss_on, task.loss_weight)
    of_task = share * shares[task.name] / total
    sources.append(RowSource(documents, of_task, instructions=instructions, name=task.name))
  return sources
