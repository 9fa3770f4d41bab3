"""Opens the stores of instructions as sources of rows."""

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.instructions.config import InstructionTask
from cm3leon_jax.data.instructions.samples import Drops, Instructions, read_targets
from cm3leon_jax.data.instructions.sources import store_name
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.data.instructions.tasks import mixture
from cm3leon_jax.data.rows.plan import RowSource
from cm3leon_jax.settings import Settings


def instruction_sources(
  settings: Settings, workdir: epath.PathLike, split: str, share: float
) -> list[RowSource]:
  """Opens the instructions of a split; without tasks there are none.

  The shares of the tasks are those of training in both splits. Held-out samples lack nothing, and
  only their answers have a weight.

  Args:
    settings: settings of the config.
    workdir: folder of the run.
    split: "train" or "heldout".
    share: of all tasks together.

  Raises:
    UserError: a task has no store, or no record, or no task has a held-out split.
  """
  config = settings.instructions
  if not config.any:
    return []
  folder, tasks = epath.Path(workdir) / "instructions", load_tasks(config)

  def store(split: str, task: InstructionTask) -> DocumentStore:
    return DocumentStore(folder / store_name(split, task), settings.vocab)

  sizes = [len(store("train", task)) for task in tasks]
  of_tasks = mixture(tasks, sizes, config.least_ratio, config.most_ratio)
  shares = {task.name: value for task, value in zip(tasks, of_tasks)}
  chosen = [task for task in tasks if split == "train" or task.heldout]
  if not chosen:
    raise UserError(
      "no task of config.instructions has a held-out split: give one of them the field `heldout`, "
      "for the held-out loss."
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
