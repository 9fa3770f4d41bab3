"""Reads public instruction data in its release formats as records.

TextVQA (Singh et al. 2019); ScienceQA (Lu et al. 2022); InstructPix2Pix (Brooks et al. 2023);
Flickr30k (Young et al. 2014) in the split of Karpathy and Fei-Fei (2015); Localized Narratives
(Pont-Tuset et al. 2020); LLaVA (Liu et al. 2023); the captions, questions and paragraphs of
`data.published.files`; and the formats of `grounding` and `lines`. The files are listed in
docs/data_formats.md. The readers strip white space at both ends of texts. They skip records with a
blank caption or answer. They raise UserError if a file has the wrong format, an id occurs twice, or
an entry is incomplete. The message names the file and the line or id.
"""

import collections
from collections.abc import Iterable, Iterator
import dataclasses
import functools
import os
import posixpath

from etils import epath

from cm3leon_jax.config.instructions import FORMATS, NARRATIVES
from cm3leon_jax.data.instructions.grounding import read_coco_objects
from cm3leon_jax.data.instructions.lines import read_lines
from cm3leon_jax.data.instructions.records import Record, caption_records
from cm3leon_jax.data.published import files as evaluation_files
from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.data.published.releases import (
  check_split,
  entries_by_id,
  field_of,
  find_file,
  load_json,
  read_json_lines,
  text_list,
)
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.errors import UserError

# Split of InstructPix2Pix -> its part of seeds.json, as a range in twentieths (released code).
PIX2PIX = {"train": (0, 18), "val": (18, 19), "test": (19, 20)}
CAPTIONS = ("coco_2014", "coco_2017", "coco_karpathy", "vg_paragraphs")
QUESTIONS = ("vqa_v2", "ok_vqa", "vizwiz")


def open_records(
  name: str,
  root: epath.PathLike,
  split: str,
  images: ImageFolder | None = None,
) -> Iterator[Record]:
  """Yields the records of a split, in the order of its file.

    next(open_records("textvqa", "data", "train")) = Record(
      key="0", group="0054c91397f2fe05", texts={"question": "what brand is it?", "answer": "nokia"},
      images={"image": "data/train_images/0054c91397f2fe05.jpg"}, facts={"answers": [...]})

  Args:
    name: name of the format, a key of `FORMATS`.
    root: folder with the files of the release.
    split: one of `FORMATS[name].splits`.
    images: parent folder of the release's image folders, e.g. `train_images/`. None means `root`.

  Raises:
    UserError: the name or split is unknown, or a file does not exist. During iteration: a file is
      wrong (see the module), or an image is outside the image folder.
  """
  check_split(name, split, {key: value.splits for key, value in FORMATS.items()})
  images = images or ImageFolder(os.fspath(root))
  file = functools.partial(find_file, root, name, split)
  if name in CAPTIONS:
    return caption_records(evaluation_files.open_examples(name, root, split, images))
  if name in QUESTIONS:
    return question_records(evaluation_files.open_examples(name, root, split, images))
  match name:
    case "flickr30k":
      captions = file("dataset_flickr30k.json")
      return caption_records(
        evaluation_files.read_karpathy(captions, images, split, "flickr30k-images")
      )
    case "localized_narratives":
      start, count, image = NARRATIVES[split]
      shards = [f"-{i:05d}-of-{count:05d}" for i in range(count)] if count > 1 else [""]
      shards = [f"{start}_localized_narratives{shard}.jsonl" for shard in shards]
      # The small file with captions, if it exists, replaces the files of all shards.
      files = dict.fromkeys(file(f"{start}_captions.jsonl", shard) for shard in shards)
      return read_narratives(files, images, image)
    case "textvqa":
      return question_records(read_textvqa(file(f"TextVQA_0.5.1_{split}.json"), images))
    case "scienceqa":
      return read_scienceqa(file("problems.json"), file("pid_splits.json"), images, split)
    case "instruct_pix2pix":
      return read_instruct_pix2pix(file("seeds.json"), images, split)
    case "coco_objects":
      instances, captions = f"instances_{split}.json", f"captions_{split}.json"
      instances = file(f"annotations/{instances}", instances)
      captions = file(f"annotations/{captions}", captions)
      return read_coco_objects(instances, captions, images, split)
    case "jsonl":
      return read_lines(file(f"{split}.jsonl"), images)
    case _:
      return read_llava(file(f"{split}.json"), images, split)


def question_records(examples: Iterable[Example]) -> Iterator[Record]:
  """Yields one record per question. Its answer is the most frequent answer of the annotators.

    references ("a cat", "cat", "cat ", "", "", "") become the answer "cat"

  If several answers are equally frequent, the first in the file is used. Blank answers do not
  count. An unanswerable question has the answer "unanswerable". The fact `answers` has all answers.
  """
  for example in examples:
    given = [text.strip() for text in example.references if text.strip()]
    if not given:
      continue
    answer = collections.Counter(given).most_common(1)[0][0]
    if example.answerable is False:
      answer = "unanswerable"
    assert example.prompt is not None
    assert example.image is not None
    yield Record(
      key=example.key,
      group=example.group,
      texts={"question": example.prompt.strip(), "answer": answer},
      images={"image": example.image},
      facts={"answers": list(example.references)},
    )


def read_narratives(
  files: Iterable[epath.PathLike], images: ImageFolder, image: str
) -> Iterator[Record]:
  """Yields one record per caption of Localized Narratives.

    {"image_id": "137576", "caption": "In this image ..."} becomes a record with the image
    val2017/000000137576.jpg, the group 137576 and the key 137576/0. The next caption of the image
    has the key 137576/1.

  Args:
    files: JSONL files with {image_id, caption} per line. Other fields, such as traces, are ignored.
    image: format string that makes a path in `images` from an id, e.g. "val2017/{:0>12}.jpg".
  """
  seen: collections.Counter[str] = collections.Counter()
  for file in files:
    for where, entry in read_json_lines(file):
      image_id = field_of(entry, "image_id", str, where)
      caption = field_of(entry, "caption", str, where).strip()
      key = f"{image_id}/{seen[image_id]}"
      seen[image_id] += 1
      if caption:
        path = images.find(image.format(image_id), where)
        yield Record(key, image_id, {"caption": caption}, {"image": path})


def read_textvqa(file: epath.PathLike, images: ImageFolder) -> Iterator[Example]:
  """Yields each question of TextVQA with its annotators' answers.

  `file` has {"data": [{question_id, image_id, question, answers: [text]}]}. The folder
  train_images/ contains the images of both splits.
  """
  entries = field_of(load_json(file), "data", list, file)
  for key, entry in entries_by_id(entries, "question_id", int, f"{file}, data").items():
    where = f"{file}, question {key}"
    image_id = field_of(entry, "image_id", str, where)
    yield Example(
      key=str(key),
      group=image_id,
      image=images.find(f"train_images/{image_id}.jpg", where),
      prompt=field_of(entry, "question", str, where),
      references=text_list(entry, "answers", where),
    )


def read_scienceqa(
  problems: epath.PathLike, splits: epath.PathLike, images: ImageFolder, split: str
) -> Iterator[Record]:
  """Yields the problems of a split of ScienceQA. Skips problems without an image.

    {"choices": ["Ohio", "Iowa"], "answer": 1, "hint": "", "solution": "Iowa is ...", ...} becomes
    the options "(A) Ohio (B) Iowa", the answer "(B)", the context "", the explanation
    "Iowa is ...", the reasoning "Iowa is ... So the answer is (B)", and the facts
    {"choices": ["Ohio", "Iowa"], "answer_index": 1}

  The reasoning is empty if a problem has no explanation.

  Args:
    problems: file with {id: {question, choices: [text], answer: index into choices, hint, solution,
      image: name or null}}.
    splits: file with {split: [id]}.
    images: folder that contains images/SPLIT/ID/.
    split: "train", "val" or "test".
  """
  content = load_json(problems)
  for key in text_list(load_json(splits), split, str(splits)):
    entry, where = field_of(content, key, dict, problems), f"{problems}, problem {key}"
    if entry.get("image", "") is None:
      continue
    name = field_of(entry, "image", str, where)
    choices = text_list(entry, "choices", where)
    index = field_of(entry, "answer", int, where)
    if not 0 <= index < len(choices):
      raise UserError(f"{where} has answer {index}; it must be from 0 to {len(choices) - 1}.")
    labels = [f"({chr(ord('A') + i)})" for i in range(len(choices))]
    explanation = field_of(entry, "solution", str, where).strip()
    texts = {
      "question": field_of(entry, "question", str, where).strip(),
      "context": field_of(entry, "hint", str, where).strip(),
      "options": " ".join(f"{label} {choice.strip()}" for label, choice in zip(labels, choices)),
      "answer": labels[index],
      "explanation": explanation,
      "reasoning": f"{explanation} So the answer is {labels[index]}" if explanation else "",
    }
    path = images.find(posixpath.join("images", split, key, name), where)
    facts = {"choices": list(choices), "answer_index": index}
    yield Record(key, key, texts, {"image": path}, facts)


def read_instruct_pix2pix(
  seeds: epath.PathLike, images: ImageFolder, split: str
) -> Iterator[Record]:
  """Yields the image pairs (before and after an edit) in a split of InstructPix2Pix.

    ["0000042", ["7", "9"]] in seeds.json becomes the records 0000042/7 and 0000042/9. The first
    has the images 0000042/7_0.jpg and 0000042/7_1.jpg. Both use the texts in 0000042/prompt.json.

  Args:
    seeds: file with [[folder, [seed]]]. Next to this file, each folder has a prompt.json with
      {input, edit, output}.
    images: folder that contains FOLDER/SEED_0.jpg and FOLDER/SEED_1.jpg.
    split: "train" (the first 90% of seeds.json), "val" (the next 5%) or "test" (the last 5%).
  """
  folders = {}
  for entry in load_json(seeds, list):
    match entry:
      case [str(folder), list(listed)]:
        folders[folder] = [str(seed) for seed in listed]
      case _:
        raise UserError(f"{seeds} must list each folder with the list of its seeds.")
  start, stop = (len(folders) * twentieths // 20 for twentieths in PIX2PIX[split])
  names = {"instruction": "edit", "input_caption": "input", "output_caption": "output"}
  beside = dataclasses.replace(images, path=os.fspath(epath.Path(seeds).parent))
  for folder in list(folders)[start:stop]:
    where = f"{seeds}, folder {folder}"
    file = epath.Path(beside.find(posixpath.join(folder, "prompt.json"), where, "file"))
    prompt = load_json(file)
    texts = {name: field_of(prompt, field, str, file).strip() for name, field in names.items()}
    for seed in folders[folder]:
      path = posixpath.join(folder, seed)
      pair = {
        name: images.find(f"{path}_{number}.jpg", where)
        for number, name in enumerate(("before", "after"))
      }
      yield Record(f"{folder}/{seed}", folder, texts, pair)


def read_llava(file: epath.PathLike, images: ImageFolder, split: str) -> Iterator[Record]:
  """Yields one record per answer in the conversations of LLaVA about images.

    human "<image>\\nWhat is it?", gpt "A bus.", human "Which color?", gpt "Red." in the third entry
    become two records. 3/0 has the instruction "What is it?" and the answer "A bus."; 3/1 has the
    instruction "Human: What is it?\\nAssistant: A bus.\\nHuman: Which color?", the answer "Red."

  Ignores the field `id`, which is not unique. Skips conversations without an image. Skips the last
  question of a conversation if it has no answer.

  Args:
    file: [{image: name, conversations: [{from: "human" or "gpt", value}]}].
    images: parent folder of train2017/, which contains the images. In the split
      "llava_v1_5_mix665k", image names are relative to `images` itself.

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
