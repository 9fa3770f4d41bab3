"""Makes small files in the formats of public releases of instruction data.

The formats that `published.files` reads are in `releases`.
"""

import json

from tests.data import releases

SPLITS = {
  "coco_karpathy": "test",
  "localized_narratives": "coco_val",
  "instruct_pix2pix": "train",
  "llava": "llava_instruct_150k",
  "coco_objects": "val2017",
}
INSTANCES = "annotations/instances_val2017.json"
CAPTIONS = "annotations/captions_val2017.json"


def json_lines(*lines) -> bytes:
  return b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"


def narrative(image_id: str, annotator: int, caption: str, **more) -> dict:
  about = {"dataset_id": "mscoco_val2017", "annotator_id": annotator}
  return {**about, "image_id": image_id, "caption": caption, **more}


def textvqa_question(key: int, image_id: str, question: str, answers: list[str]) -> dict:
  about = {"question_tokens": question.strip("?").split(), "image_width": 1024, "set_name": "val"}
  about |= {"question_id": key, "image_id": image_id}
  return {**about, "question": question, "answers": answers}


def problem(image: str | None, split: str, **fields) -> dict:
  return {
    "question": "Which state is farthest north?",
    "choices": ["West Virginia", "Louisiana ", "Arizona"],
    "answer": 0,
    "hint": "",
    "image": image,
    "lecture": "Maps have four directions.",
    "solution": "West Virginia is farthest north.\n",
    "split": split,
    **fields,
  }


def flickr_image(name: str, split: str, *captions: str) -> dict:
  sentences = [{"tokens": c.split(), "raw": c, "imgid": 0, "sentid": 1} for c in captions]
  return {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": name}


def turns(*values: str) -> list[dict]:
  return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def prompt(text: str) -> dict:
  return {"input": f"{text} by a lake", "edit": f"make it {text} ", "output": f"a lake of {text}"}


def instance(image_id: int, category_id: int, bbox: list, crowd: int = 0) -> dict:
  about = {"id": 9, "area": 1.5, "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]}
  place = {"image_id": image_id, "category_id": category_id, "bbox": bbox}
  return {**about, **place, "iscrowd": crowd}


def image_of_size(key: int, width: int, height: int) -> dict:
  name = f"{key:012d}.jpg"
  return {"id": key, "file_name": name, "width": width, "height": height, "license": 3}


STREET = {"id": "000000033471", "image": "000000033471.jpg"}
BIRDS = {"question": "how many? ", "answer": "two\nor three"}
PHONE, BRANDS = "003a8ae2ef43b901", ["dakota", "nokia ", "nokia"]
BUS = turns(
  "<image>\nWhat is it?", "A bus.", "Which color?", "Red and\nwhite.", "Is it new?", "No.", "Why?"
)
RELEASES = {
  **{name: files for name, files in releases.RELEASES.items() if name != "visdial"},
  "flickr30k": {
    "dataset_flickr30k.json": {
      "images": [
        flickr_image("1000092795.jpg", "val", "Two young guys.", " Two friends ", " "),
        flickr_image("10002456.jpg", "train", "Four men on top."),
        flickr_image("1000268201.jpg", "test", "A child."),
      ],
      "dataset": "flickr30k",
    }
  },
  "localized_narratives": {
    "coco_val_captions.jsonl": json_lines(
      narrative("137576", 93, "In this image there are cows. "),
      narrative("8", 12, " "),
      narrative("137576", 94, "Cows eat grass."),
      narrative("8", 12, "A key."),
    )
  },
  "textvqa": {
    "TextVQA_0.5.1_val.json": {
      "dataset_type": "val",
      "dataset_name": "textvqa",
      "dataset_version": "0.5.1",
      "data": [
        textvqa_question(34602, PHONE, "what brand is it? ", BRANDS + [""] * 7),
        textvqa_question(34603, PHONE, "what year?", ["2008"] * 4 + ["8"] * 6),
        textvqa_question(34604, "0c5b3b1e2f4a6d70", "is it on?", [""] * 10),
      ],
    }
  },
  "scienceqa": {
    "problems.json": {
      "1": problem("image.png", "val"),
      "2": problem(None, "val"),
      "3": problem("image.png", "val", hint="The map shows it.\n", answer=2, choices=[*"123"]),
      "4": problem("image.png", "train"),
    },
    "pid_splits.json": {
      "train": ["4"],
      "val": ["3", "2", "1"],
      "test": [],
      "trainval": ["4", "3", "2", "1"],
      "minival": ["3"],
      "minitest": [],
    },
  },
  "instruct_pix2pix": {
    "seeds.json": [[f"{i:07d}", [str(i), f"{i}7"]] for i in range(20)],
    **{f"{i:07d}/prompt.json": prompt(f"snow {i}") for i in range(20)},
  },
  "coco_objects": {
    INSTANCES: {
      "info": {},
      "licenses": [],
      "images": [image_of_size(7, 400, 200), image_of_size(8, 256, 256), image_of_size(9, 64, 128)],
      "annotations": [
        instance(7, 44, [100, 50, 100, 25]),
        instance(7, 3, [290.5, -2.0, 60, 400]),  # Half of this box is in the square.
        instance(7, 3, [0, 0, 100, 200]),  # This box is left of the square.
        instance(7, 1, [110, 10, 100, 100], crowd=1),
        instance(9, 44, [0, 0, 64, 32]),  # This box is above the square.
        instance(8, 44, [199, 130, 5, 20]),
        instance(8, 1, [3.4, 5.6, 0.0, 12.0]),  # This box has no width.
      ],
      "categories": [
        {"supercategory": "person", "id": 1, "name": "person"},
        {"supercategory": "vehicle", "id": 3, "name": "car"},
        {"supercategory": "kitchen", "id": 44, "name": "bottle"},
      ],
    },
    CAPTIONS: {
      "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (9, 8, 7)],
      "annotations": [
        {"image_id": 7, "id": 11, "caption": "A car by a bottle. "},
        {"image_id": 8, "id": 12, "caption": "A bottle."},
        {"image_id": 9, "id": 13, "caption": "A wall."},
        {"image_id": 7, "id": 14, "caption": "One car."},
      ],
    },
  },
  "jsonl": {
    "val.jsonl": json_lines(
      {"key": "birds", "group": "pond", "texts": BIRDS, "images": {"image": "a/7.jpg"}},
      {"texts": {"question": "which?", "answer": ""}, "images": {"image": "a/7.jpg"}},
    )
  },
  "llava": {
    "llava_instruct_150k.json": [
      {**STREET, "conversations": BUS},
      {"id": "wgByO4Y_0", "model": "", "conversations": turns("Hello", "Hi")},
      {**STREET, "conversations": turns("Describe it.\n<image>", "A street.")},
    ]
  },
}


def split_of(name: str) -> str:
  """Returns the split to which the files in RELEASES[name] belong."""
  return SPLITS.get(name, "val")


write = releases.write
