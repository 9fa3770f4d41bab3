"""Reads the files of public evaluations, in the formats of their releases, as examples.

COCO captions (Chen et al. 2015) and their split by Karpathy and Fei-Fei (2015); VQA v2 (Goyal et
al. 2017); OK-VQA (Marino et al. 2019); VizWiz (Gurari et al. 2018); image paragraphs of Visual
Genome (Krause et al. 2017); VisDial v1.0 (Das et al. 2017). docs/data_formats.md has a table of
the files. Texts are those of the files, unchanged: metrics normalize them.
"""

from collections.abc import Iterator
import dataclasses
import json
import os
import posixpath

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.data.evaluation_examples import Example

# Name of a format -> its splits with published references.
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
# Visual Genome has its images in two folders.
VG_FOLDERS = ("VG_100K", "VG_100K_2")
VISDIAL_FOLDER = "VisualDialog_val2018"
KINDS = {str: "a text", int: "an integer", list: "a list", dict: "an object"}


def open_examples(
  name: str, root: epath.PathLike, split: str, images: epath.PathLike | None = None
) -> Iterator[Example]:
  """Yields the examples of a split, in the order of its file.

    next(open_examples("vqa_v2", "data", "val")) = Example(
      key="42000", group="42", image="data/val2014/COCO_val2014_000000000042.jpg",
      prompt="What is on the mat?", references=("cat", "cat", "a cat", ...), ...)

  Args:
    name: of the format, a key of `SPLITS`.
    root: folder with the files of the release.
    split: one of `SPLITS[name]`.
    images: folder with the release's folders of images, e.g. `val2014/`; None: `root`.

  Raises:
    UserError: an unknown name or split, or a file that does not exist; and while examples are
      read, a file of another format or a wrong record, naming file and id.
  """
  if name not in SPLITS:
    raise UserError(f"The format is '{name}'; it must be one of {', '.join(SPLITS)}.")
  if split not in SPLITS[name]:
    raise UserError(
      f"The split of format '{name}' is '{split}'; it must be one of {', '.join(SPLITS[name])}."
    )
  images = os.fspath(root if images is None else images)

  def file(*names: str) -> epath.Path:
    found = next((path for n in names if (path := epath.Path(root) / n).exists()), None)
    if found is None:
      raise UserError(
        f"{root} has no {' or '.join(names)}: format '{name}' reads it for split '{split}'."
      )
    return found

  match name:
    case "coco_2014" | "coco_2017":
      year = name.removeprefix("coco_")
      captions = f"captions_{split}{year}.json"
      folder = posixpath.join(images, f"{split}{year}")
      return read_coco(file(f"annotations/{captions}", captions), folder)
    case "coco_karpathy":
      return read_karpathy(file("dataset_coco.json"), images, split)
    case "vqa_v2" | "ok_vqa":
      version = "v2_" if name == "vqa_v2" else ""
      questions = file(f"{version}OpenEnded_mscoco_{split}2014_questions.json")
      return read_vqa(questions, file(f"{version}mscoco_{split}2014_annotations.json"), images)
    case "vizwiz":
      annotations = f"{split}.json"
      folder = posixpath.join(images, split)
      return read_vizwiz(file(f"Annotations/{annotations}", annotations), folder)
    case "vg_paragraphs":
      return read_paragraphs(file("paragraphs_v1.json"), file(f"{split}_split.json"), images)
    case _:
      dense = file(f"visdial_1.0_{split}_dense_annotations.json")
      return read_visdial(file(f"visdial_1.0_{split}.json"), dense, images)


def read_coco(file: epath.PathLike, images: str) -> Iterator[Example]:
  """Yields each image of captions_val2014.json, or of a file like it, with all of its captions.

  Args:
    file: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}.
    images: folder of the images.

  Raises:
    UserError: naming file and id: another format, an id that is there twice, an image without
      captions, a caption without an image.
  """
  content = _load(file)
  listed = _by_id(_field(content, "images", list, file), "id", int, f"{file}, images")
  captions = {image_id: [] for image_id in listed}
  for number, entry in enumerate(_field(content, "annotations", list, file), 1):
    where = f"{file}, annotation {number}"
    image_id = _field(entry, "image_id", int, where)
    if image_id not in captions:
      raise UserError(f"{where} has image_id {image_id}, which 'images' of the file does not have.")
    captions[image_id].append(entry)
  for image_id, entry in listed.items():
    where = f"{file}, image {image_id}"
    name = _field(entry, "file_name", str, where)
    texts = _texts(captions[image_id], "caption", where)
    yield Example(str(image_id), str(image_id), posixpath.join(images, name), references=texts)


def read_karpathy(file: epath.PathLike, images: str, split: str) -> Iterator[Example]:
  """Yields each image of a split of dataset_coco.json with all of its captions.

  Args:
    file: {"images": [{cocoid, filepath, filename, split, sentences: [{raw}]}]}.
    images: folder that holds the folders `filepath`.
    split: "train", "restval", "val" or "test"; the usual training data are the first two.

  Raises:
    UserError: naming file and id: another format, an id that is there twice, an image without
      captions, no image in the split.
  """
  entries = _by_id(_field(_load(file), "images", list, file), "cocoid", int, f"{file}, images")
  chosen = {
    image_id: entry
    for image_id, entry in entries.items()
    if _field(entry, "split", str, f"{file}, image {image_id}") == split
  }
  if not chosen:
    found = sorted({entry["split"] for entry in entries.values()})
    raise UserError(f"{file} has no image of split '{split}'; it has {', '.join(found) or 'none'}.")
  for image_id, entry in chosen.items():
    where = f"{file}, image {image_id}"
    folder, name = (_field(entry, field, str, where) for field in ("filepath", "filename"))
    texts = _texts(_field(entry, "sentences", list, where), "raw", where)
    path = posixpath.join(images, folder, name)
    yield Example(str(image_id), str(image_id), path, references=texts)


def read_vqa(
  questions: epath.PathLike, annotations: epath.PathLike, images: str
) -> Iterator[Example]:
  """Yields each question of VQA v2 or OK-VQA with the answers of its annotators.

  Args:
    questions: file, {"data_subtype": "val2014", "questions": [{question_id, image_id, question}]}.
    annotations: file, {"annotations": [{question_id, question_type, answer_type, answers:
      [{answer}]}]}. The field `raw_answer` of OK-VQA is not read: its metric compares `answer`.
    images: folder that holds the folder `data_subtype`.

  Raises:
    UserError: naming file and id: another format, an id that is there twice, a question without
      annotation or answers.
  """
  content = _load(questions)
  subset = _field(content, "data_subtype", str, questions)
  listed = _field(content, "questions", list, questions)
  listed = _by_id(listed, "question_id", int, f"{questions}, questions")
  answered = _field(_load(annotations), "annotations", list, annotations)
  answered = _by_id(answered, "question_id", int, f"{annotations}, annotations")
  for key, entry in listed.items():
    where = f"{questions}, question {key}"
    if key not in answered:
      raise UserError(
        f"{where} has no annotation in {annotations}; give the two files of one split."
      )
    image_id = _field(entry, "image_id", int, where)
    prompt = _field(entry, "question", str, where)
    where = f"{annotations}, question {key}"
    yield Example(
      key=str(key),
      group=str(image_id),
      image=posixpath.join(images, subset, f"COCO_{subset}_{image_id:012d}.jpg"),
      prompt=prompt,
      references=_texts(_field(answered[key], "answers", list, where), "answer", where),
      question_type=_field(answered[key], "question_type", str, where),
      answer_type=_field(answered[key], "answer_type", str, where),
    )


def read_vizwiz(file: epath.PathLike, images: str) -> Iterator[Example]:
  """Yields each question of VizWiz with the answers of its annotators.

  Args:
    file: [{image, question, answers: [{answer}], answer_type, answerable: 0 or 1}].
    images: folder of the images.

  Raises:
    UserError: naming file and image: another format, an image that is there twice, a question
      without answers.
  """
  for image, entry in _by_id(_load(file, list), "image", str, str(file)).items():
    where = f"{file}, image {image}"
    yield Example(
      key=image,
      group=image,
      image=posixpath.join(images, image),
      prompt=_field(entry, "question", str, where),
      references=_texts(_field(entry, "answers", list, where), "answer", where),
      answer_type=_field(entry, "answer_type", str, where),
      answerable=bool(_field(entry, "answerable", int, where)),
    )


def read_paragraphs(file: epath.PathLike, split: epath.PathLike, images: str) -> Iterator[Example]:
  """Yields each image of a split with its paragraph.

  Some images of the released file are there twice. As in the usual preprocessing for the metrics
  of captions, the first paragraph counts.

  Args:
    file: [{image_id, paragraph, url}]; `url` ends in the folder and the name of the image.
    split: file with a list of image ids.
    images: folder that holds VG_100K/ and VG_100K_2/.

  Raises:
    UserError: naming file and id: another format, an image that is twice in the split or has no
      paragraph, a `url` of another folder.
  """
  entries = {}
  for number, entry in enumerate(_load(file, list), 1):
    entries.setdefault(_field(entry, "image_id", int, f"{file}, entry {number}"), entry)
  seen = set()
  for image_id in _load(split, list):
    if not isinstance(image_id, int) or image_id not in entries:
      raise UserError(f"{split} has image {image_id!r}, which has no paragraph in {file}.")
    if image_id in seen:
      raise UserError(f"{split} has image {image_id} twice; it must be there once.")
    seen.add(image_id)
    where = f"{file}, image {image_id}"
    url = _field(entries[image_id], "url", str, where)
    folder, name = posixpath.split(url)
    folder = posixpath.basename(folder)
    if folder not in VG_FOLDERS:
      raise UserError(
        f"{where} has the url '{url}'; it must end in a name in VG_100K or VG_100K_2."
      )
    path = posixpath.join(images, folder, name)
    texts = (_field(entries[image_id], "paragraph", str, where),)
    yield Example(str(image_id), str(image_id), path, references=texts)


def read_visdial(dialogs: epath.PathLike, dense: epath.PathLike, images: str) -> Iterator[Example]:
  """Yields each round of VisDial v1.0 whose candidates were judged, with the rounds before it.

  Args:
    dialogs: file, {"data": {"questions": [text], "answers": [text], "dialogs": [{image_id,
      caption, dialog: [{question, answer, answer_options, gt_index}]}]}}. `question`, `answer` and
      `answer_options` are places in the lists of texts, `gt_index` is one in `answer_options`.
    dense: file, [{image_id, round_id, gt_relevance}]; rounds count from 1.
    images: folder that holds VisualDialog_val2018/.

  Raises:
    UserError: naming file and id: another format, an id that is there twice, a round without a
      dialog, a place outside its list, another number of judgments than of candidates.
  """
  data = _field(_load(dialogs), "data", dict, dialogs)
  where = f"{dialogs}, data"
  questions, answers = (_field(data, name, list, where) for name in ("questions", "answers"))
  entries = _by_id(_field(data, "dialogs", list, where), "image_id", int, f"{dialogs}, dialogs")
  keys = set()
  for number, judged in enumerate(_load(dense, list), 1):
    where = f"{dense}, entry {number}"
    image_id, round_id = (_field(judged, name, int, where) for name in ("image_id", "round_id"))
    key = f"{image_id}/{round_id}"
    where = f"{dense}, image {image_id}, round {round_id}"
    if key in keys:
      raise UserError(f"{where} is there twice; each round must be there once.")
    keys.add(key)
    if image_id not in entries:
      raise UserError(f"{where} has no dialog in {dialogs}; give the two files of one split.")
    example = _dialog_round(entries[image_id], round_id, questions, answers, dialogs)
    relevance = _field(judged, "gt_relevance", list, where)
    if len(relevance) != len(example.candidates):
      raise UserError(
        f"{where} has {len(relevance)} values in 'gt_relevance'; it must have one for each of the "
        f"{len(example.candidates)} answers."
      )
    if not all(isinstance(value, int | float) for value in relevance):
      raise UserError(f"{where} has a value in 'gt_relevance' that is no number.")
    path = posixpath.join(images, VISDIAL_FOLDER, f"{VISDIAL_FOLDER}_{image_id:012d}.jpg")
    relevance = tuple(map(float, relevance))
    yield dataclasses.replace(example, key=key, image=path, relevance=relevance)


def _dialog_round(
  entry: dict, round_id: int, questions: list, answers: list, file: epath.PathLike
) -> Example:
  """Returns the example of one round of a dialog, without its image and its judgments."""
  where = f"{file}, image {entry['image_id']}"
  rounds = _field(entry, "dialog", list, where)
  if not 1 <= round_id <= len(rounds):
    raise UserError(f"{where} has no round {round_id}; it has rounds 1 to {len(rounds)}.")
  places = [f"{where}, round {number}" for number in range(1, round_id + 1)]
  asked = [_text_of(questions, r, "question", place) for r, place in zip(rounds, places)]
  said = [_text_of(answers, r, "answer", place) for r, place in zip(rounds, places)]
  last, place = rounds[round_id - 1], places[-1]
  options = _field(last, "answer_options", list, place)
  candidates = [_text_of(answers, {"answer_options": i}, "answer_options", place) for i in options]
  index = _field(last, "gt_index", int, place)
  if not 0 <= index < len(candidates):
    raise UserError(f"{place} has gt_index {index}; it must be below {len(candidates)}.")
  return Example(
    key="",
    group=str(entry["image_id"]),
    prompt=asked[-1],
    references=(said[-1],),
    caption=_field(entry, "caption", str, where),
    history=tuple(zip(asked[:-1], said[:-1])),
    candidates=tuple(candidates),
    answer_index=index,
  )


def _text_of(texts: list, entry: dict, name: str, where: str) -> str:
  """Returns the text whose place in `texts` is the field `name` of an entry."""
  index = _field(entry, name, int, where)
  if not 0 <= index < len(texts) or not isinstance(texts[index], str):
    raise UserError(f"{where} has {index} in '{name}'; the list has no text at this place.")
  return texts[index]


def _load(file: epath.PathLike, kind: type = dict):
  """Reads a JSON file; raises UserError unless it is JSON and of this kind."""
  path = epath.Path(file)
  if not path.exists():
    raise UserError(f"{file} does not exist; give the file of the release.")
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is not valid JSON ({error}).") from error
  if not isinstance(content, kind):
    raise UserError(f"{file} is of another format; it must be {KINDS[kind]} in JSON.")
  return content


def _field(entry, name: str, kind: type, where: object):
  """Returns a field; raises UserError unless the entry is an object that has it, of this kind."""
  value = entry.get(name) if isinstance(entry, dict) else None
  if not isinstance(value, kind) or isinstance(value, bool):
    raise UserError(f"{where} must be an object with {KINDS[kind]} in its field '{name}'.")
  return value


def _by_id(entries: list, name: str, kind: type, where: str) -> dict:
  """Returns entries by the field `name`; raises UserError if two have the same."""
  found = {}
  for number, entry in enumerate(entries, 1):
    key = _field(entry, name, kind, f"{where}, entry {number}")
    if key in found:
      raise UserError(f"{where}: {name} {key} is there twice; it must be there once.")
    found[key] = entry
  return found


def _texts(entries: list, name: str, where: str) -> tuple[str, ...]:
  """Returns the field `name` of all entries; raises UserError if there is none."""
  if not entries:
    raise UserError(f"{where} has no '{name}'; it must have at least one.")
  return tuple(_field(e, name, str, f"{where}, entry {n}") for n, e in enumerate(entries, 1))
