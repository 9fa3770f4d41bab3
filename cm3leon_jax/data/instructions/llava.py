"""Reads the conversations of LLaVA (Liu et al. 2023) as records of instruction data."""

from collections.abc import Iterator
import posixpath

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.published.releases import field_of, load_json
from cm3leon_jax.data.sources.image_folder import ImageFolder


def read_llava(file: epath.PathLike, images: ImageFolder, split: str) -> Iterator[Record]:
  """Yields one record per answer in the conversations of LLaVA about images.

    human "<image>\\nWhat is it?", gpt "A bus.", human "Which color?", gpt "Red." in the third entry
    become two records. 3/0 has the instruction "What is it?" and the answer "A bus."; 3/1 has the
    instruction "Human: What is it?\\nAssistant: A bus.\\nHuman: Which color?", the answer "Red."

  Ignores the field `id`, which is not unique. Skips conversations without an image. Skips the last
  question of a conversation if it has no answer.

  Args:
    file: [{image: name, conversations: [{from: "human" or "gpt", value}]}].
    images: parent folder of train2017/, in which the images are. The images of the split
      "llava_v1_5_mix665k" are in `images` itself.

  Raises:
    UserError: the format is wrong, a conversation has no answer, or "human" and "gpt" do not
      alternate. The message names the file and the entry.
  """
  folder = "" if split == "llava_v1_5_mix665k" else "train2017"
  for number, entry in enumerate(load_json(file, list), 1):
    where = f"{file}, entry {number}"
    if isinstance(entry, dict) and "image" not in entry and "conversations" in entry:
      continue
    name = field_of(entry, "image", str, where)
    path = images.find(posixpath.join(folder, name), where)
    history = ""
    for place, (question, answer) in enumerate(_exchanges(entry, where)):
      instruction = f"{history}Human: {question}" if history else question
      if answer:
        texts = {"instruction": instruction, "answer": answer}
        yield Record(f"{number}/{place}", name, texts, {"image": path})
      history += f"Human: {question}\nAssistant: {answer}\n"


def _exchanges(entry: dict, where: str) -> list[tuple[str, str]]:
  """Returns the (question, answer) pairs of a conversation without "<image>"."""
  values = []
  for number, turn in enumerate(field_of(entry, "conversations", list, where)):
    place = f"{where}, turn {number + 1}"
    speaker, expected = field_of(turn, "from", str, place), ("human", "gpt")[number % 2]
    if speaker != expected:
      raise UserError(f"{place} is from '{speaker}'; it must be from '{expected}'.")
    values.append(field_of(turn, "value", str, place).replace("<image>", "").strip())
  if len(values) < 2:
    raise UserError(f"{where} has no answer; it must have at least one turn from 'gpt'.")
  return list(zip(values[::2], values[1::2]))
