"""Reads public evaluation files in their release formats as examples.

COCO captions (Chen et al. 2015) and their split by Karpathy and Fei-Fei (2015); VQA v2 (Goyal et
al. 2017); OK-VQA (Marino et al. 2019); VizWiz (Gurari et al. 2018); image paragraphs of Visual
Genome (Krause et al. 2017); VisDial v1.0 (Das et al. 2017). The files are listed in
docs/data_formats.md. The readers do not change the texts. Metrics normalize them.

In all readers, `images` is the parent folder of the release's image folders, and `folder` is the
image folder of a file. The readers raise UserError if a file has the wrong format, an id occurs
twice, or an entry lacks its image, captions or answers. The message names the file and the id.
"""

from collections.abc import Iterator
import dataclasses
import functools
import os
import posixpath
from typing import Any

from etils import epath

from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.data.published.releases import (
  check_split,
  entries_by_id,
  field_of,
  find_file,
  load_json,
  texts_of,
)
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.errors import UserError

# Format name -> splits with published references.
SPLITS = {
  "coco_2014": ("train", "val"),
  "coco_2017": ("train", "val"),
  "coco_karpathy": ("train", "restval", "val", "test"),
  "vqa_v2": ("train", "val"),
  "ok_vqa": ("train", "val"),
  "vizwiz": ("train", "val"),
  "vg_paragraphs": ("train", "val", "test"),
  "visdial": ("val",),
}
# Visual Genome distributes its images in two folders.
VG_FOLDERS = ("VG_100K", "VG_100K_2")
VISDIAL_FOLDER = "VisualDialog_val2018"


def open_examples(
  name: str,
  root: epath.PathLike,
  split: str,
  images: ImageFolder | None = None,
) -> Iterator[Example]:
  """Yields the examples of a split, in the order of its file.

    next(open_examples("vqa_v2", "data", "val")) = Example(
      key="42000", group="42", image="data/val2014/COCO_val2014_000000000042.jpg",
      prompt="What is on the mat?", references=("cat", "cat", "a cat", ...), ...)

  Args:
    name: name of the format, a key of `SPLITS`.
    root: folder with the files of the release.
    split: one of `SPLITS[name]`.
    images: parent folder of the release's image folders, e.g. `val2014/`. None means `root`.

  Raises:
    UserError: the name or split is unknown, or a file does not exist. During iteration: a file is
      wrong (see the module's docstring), or an image is outside the image folder.
  """
  check_split(name, split, SPLITS)
  images = images or ImageFolder(os.fspath(root))
  file = functools.partial(find_file, root, name, split)
  match name:
    case "coco_2014" | "coco_2017":
      year = name.removeprefix("coco_")
      captions = f"captions_{split}{year}.json"
      return read_coco(file(f"annotations/{captions}", captions), images, f"{split}{year}")
    case "coco_karpathy":
      return read_karpathy(file("dataset_coco.json"), images, split)
    case "vqa_v2" | "ok_vqa":
      version = "v2_" if name == "vqa_v2" else ""
      questions = file(f"{version}OpenEnded_mscoco_{split}2014_questions.json")
      return read_vqa(questions, file(f"{version}mscoco_{split}2014_annotations.json"), images)
    case "vizwiz":
      annotations = f"{split}.json"
      return read_vizwiz(file(f"Annotations/{annotations}", annotations), images, split)
    case "vg_paragraphs":
      return read_paragraphs(file("paragraphs_v1.json"), file(f"{split}_split.json"), images)
    case _:
      dense = file(f"visdial_1.0_{split}_dense_annotations.json")
      return read_visdial(file(f"visdial_1.0_{split}.json"), dense, images)


def read_coco(file: epath.PathLike, images: ImageFolder, folder: str) -> Iterator[Example]:
  """Yields each image with all its captions, from a file of COCO, e.g. captions_val2014.json.

  `file` has {"images": [{id, file_name}], "annotations": [{image_id, caption}]}.
  """
  content = load_json(file)
  listed = entries_by_id(field_of(content, "images", list, file), "id", int, f"{file}, images")
  captions: dict[int, list[str]] = {image_id: [] for image_id in listed}
  for number, entry in enumerate(field_of(content, "annotations", list, file), 1):
    where = f"{file}, annotation {number}"
    image_id = field_of(entry, "image_id", int, where)
    if image_id not in captions:
      raise UserError(f"{where} has image_id {image_id}, which is not in 'images' of the file.")
    captions[image_id].append(entry)
  for image_id, entry in listed.items():
    where = f"{file}, image {image_id}"
    name = field_of(entry, "file_name", str, where)
    texts = texts_of(captions[image_id], "caption", where)
    path = images.find(posixpath.join(folder, name), where)
    yield Example(str(image_id), str(image_id), path, references=texts)


def read_karpathy(
  file: epath.PathLike, images: ImageFolder, split: str, folder: str = ""
) -> Iterator[Example]:
  """Yields each image of a split with all its captions, from a file of Karpathy and Fei-Fei.

  Args:
    file: {"images": [{cocoid, filepath, filename, split, sentences: [{raw}]}]}. The file of
      Flickr30k has neither `cocoid` nor `filepath`; the ids of its images are their file names.
    split: "train", "restval" (only COCO), "val" or "test". Models usually train on "train" and
      "restval".
    folder: image folder of Flickr30k. "" means COCO, whose entries name the folder in `filepath`.
  """
  listed = field_of(load_json(file), "images", list, file)
  id_field, kind = ("filename", str) if folder else ("cocoid", int)
  entries = entries_by_id(listed, id_field, kind, f"{file}, images")
  chosen = {
    image_id: entry
    for image_id, entry in entries.items()
    if field_of(entry, "split", str, f"{file}, image {image_id}") == split
  }
  if not chosen:
    result = sorted({entry["split"] for entry in entries.values()})
    raise UserError(
      f"{file} has no image in split '{split}'; its splits are {', '.join(result) or 'none'}."
    )
  for image_id, entry in chosen.items():
    where = f"{file}, image {image_id}"
    inner = folder or field_of(entry, "filepath", str, where)
    name = field_of(entry, "filename", str, where)
    texts = texts_of(field_of(entry, "sentences", list, where), "raw", where)
    path = images.find(posixpath.join(inner, name), where)
    key = posixpath.splitext(str(image_id))[0]  # The image id of Localized Narratives.
    yield Example(key, key, path, references=texts)


def read_vqa(
  questions: epath.PathLike, annotations: epath.PathLike, images: ImageFolder
) -> Iterator[Example]:
  """Yields each question of VQA v2 or OK-VQA with the answers of its annotators.

  Args:
    questions: file with {"data_subtype": "val2014", "questions": [{question_id, image_id,
      question}]}.
    annotations: file with {"annotations": [{question_id, question_type, answer_type, answers:
      [{answer}]}]}. The field `raw_answer` of OK-VQA is ignored, because the metric of OK-VQA
      compares `answer`.
  """
  content = load_json(questions)
  subset = field_of(content, "data_subtype", str, questions)
  listed = field_of(content, "questions", list, questions)
  listed = entries_by_id(listed, "question_id", int, f"{questions}, questions")
  answered = field_of(load_json(annotations), "annotations", list, annotations)
  answered = entries_by_id(answered, "question_id", int, f"{annotations}, annotations")
  for key, entry in listed.items():
    where = f"{questions}, question {key}"
    if key not in answered:
      raise UserError(
        f"{where} has no annotation in {annotations}; give two files of the same split."
      )
    image_id = field_of(entry, "image_id", int, where)
    image = images.find(posixpath.join(subset, f"COCO_{subset}_{image_id:012d}.jpg"), where)
    prompt = field_of(entry, "question", str, where)
    where = f"{annotations}, question {key}"
    yield Example(
      key=str(key),
      group=str(image_id),
      image=image,
      prompt=prompt,
      references=texts_of(field_of(answered[key], "answers", list, where), "answer", where),
      question_type=field_of(answered[key], "question_type", str, where),
      answer_type=field_of(answered[key], "answer_type", str, where),
    )


def read_vizwiz(file: epath.PathLike, images: ImageFolder, folder: str) -> Iterator[Example]:
  """Yields each question of VizWiz with the answers of its annotators.

  `file` has [{image, question, answers: [{answer}], answer_type, answerable: 0 or 1}].
  """
  for image, entry in entries_by_id(load_json(file, list), "image", str, str(file)).items():
    where = f"{file}, image {image}"
    yield Example(
      key=image,
      group=image,
      image=images.find(posixpath.join(folder, image), where),
      prompt=field_of(entry, "question", str, where),
      references=texts_of(field_of(entry, "answers", list, where), "answer", where),
      answer_type=field_of(entry, "answer_type", str, where),
      answerable=bool(field_of(entry, "answerable", int, where)),
    )


def read_paragraphs(
  file: epath.PathLike, split: epath.PathLike, images: ImageFolder
) -> Iterator[Example]:
  """Yields each image of a split with its paragraph.

  Some images occur twice in the released file. The reader uses only the first paragraph of an
  image, as in the usual preprocessing for caption metrics. `file` has [{image_id, paragraph, url}].
  A `url` ends with the folder and the name of the image. The file `split` has a list of image ids.
  """
  entries: dict[int, dict[str, Any]] = {}
  for number, entry in enumerate(load_json(file, list), 1):
    entries.setdefault(field_of(entry, "image_id", int, f"{file}, entry {number}"), entry)
  for image_id in load_json(split, list):
    if not isinstance(image_id, int) or image_id not in entries:
      raise UserError(f"{split} has image {image_id!r}, which has no paragraph in {file}.")
    where = f"{file}, image {image_id}"
    url = field_of(entries[image_id], "url", str, where)
    folder, name = posixpath.split(url)
    folder = posixpath.basename(folder)
    if folder not in VG_FOLDERS:
      raise UserError(
        f"{where} has the url '{url}'; it must end in VG_100K/NAME or VG_100K_2/NAME."
      )
    path = images.find(posixpath.join(folder, name), where)
    texts = (field_of(entries[image_id], "paragraph", str, where),)
    yield Example(str(image_id), str(image_id), path, references=texts)


def read_visdial(
  dialogs: epath.PathLike, dense: epath.PathLike, images: ImageFolder
) -> Iterator[Example]:
  """Yields each round of VisDial v1.0 whose candidates were judged, with the earlier rounds.

  Args:
    dialogs: file with {"data": {"questions": [text], "answers": [text], "dialogs": [{image_id,
      caption, dialog: [{question, answer, answer_options, gt_index}]}]}}. `question`, `answer` and
      `answer_options` are indices into the lists of texts. `gt_index` is an index into
      `answer_options`.
    dense: file with [{image_id, round_id, gt_relevance}]. Round ids begin at 1.
  """
  data = field_of(load_json(dialogs), "data", dict, dialogs)
  where = f"{dialogs}, data"
  questions, answers = (field_of(data, name, list, where) for name in ("questions", "answers"))
  entries = entries_by_id(
    field_of(data, "dialogs", list, where), "image_id", int, f"{dialogs}, dialogs"
  )
  for number, judged in enumerate(load_json(dense, list), 1):
    where = f"{dense}, entry {number}"
    image_id, round_id = (field_of(judged, name, int, where) for name in ("image_id", "round_id"))
    key = f"{image_id}/{round_id}"
    where = f"{dense}, image {image_id}, round {round_id}"
    if image_id not in entries:
      raise UserError(f"{where} has no dialog in {dialogs}; give two files of the same split.")
    example = _dialog_round(entries[image_id], round_id, questions, answers, dialogs)
    relevance = field_of(judged, "gt_relevance", list, where)
    if len(relevance) != len(example.candidates):
      raise UserError(
        f"{where} has {len(relevance)} values in 'gt_relevance'; it must have one for each of the "
        f"{len(example.candidates)} answers."
      )
    if not all(isinstance(value, int | float) for value in relevance):
      raise UserError(f"{where} has a value in 'gt_relevance' that is not a number.")
    path = images.find(f"{VISDIAL_FOLDER}/{VISDIAL_FOLDER}_{image_id:012d}.jpg", where)
    relevance = tuple(map(float, relevance))
    yield dataclasses.replace(example, key=key, image=path, relevance=relevance)


def _dialog_round(
  entry: dict, round_id: int, questions: list, answers: list, file: epath.PathLike
) -> Example:
  """Returns the example of one dialog round, without its key, image and relevance."""
  where = f"{file}, image {entry['image_id']}"
  rounds = field_of(entry, "dialog", list, where)
  if not 1 <= round_id <= len(rounds):
    raise UserError(f"{where} has no round {round_id}; it has rounds 1 to {len(rounds)}.")
  places = [f"{where}, round {number}" for number in range(1, round_id + 1)]
  asked = [_text_of(questions, r, "question", place) for r, place in zip(rounds, places)]
  said = [_text_of(answers, r, "answer", place) for r, place in zip(rounds, places)]
  last, place = rounds[round_id - 1], places[-1]
  options = field_of(last, "answer_options", list, place)
  candidates = [_text_of(answers, {"answer_options": i}, "answer_options", place) for i in options]
  index = field_of(last, "gt_index", int, place)
  if not 0 <= index < len(candidates):
    raise UserError(f"{place} has gt_index {index}; it must be below {len(candidates)}.")
  return Example(
    key="",
    group=str(entry["image_id"]),
    prompt=asked[-1],
    references=(said[-1],),
    caption=field_of(entry, "caption", str, where),
    history=tuple(zip(asked[:-1], said[:-1])),
    candidates=tuple(candidates),
    answer_index=index,
  )


def _text_of(texts: list, entry: dict, name: str, where: str) -> str:
  """Returns the text whose index is in the field `name` of an entry."""
  index = field_of(entry, name, int, where)
  if not 0 <= index < len(texts) or not isinstance(texts[index], str):
    raise UserError(f"{where} has {index} in '{name}'; the list has no text at this index.")
  return texts[index]
