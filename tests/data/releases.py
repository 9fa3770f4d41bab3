"""Makes small files in the formats of public evaluation releases."""

import json

import numpy as np
from PIL import Image

VQA_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VQA_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
VISDIAL = "visdial_1.0_val.json"
DENSE = "visdial_1.0_val_dense_annotations.json"


def answers(*texts, **more):
  return [
    {"answer": text, "answer_confidence": "yes", "answer_id": i, **more}
    for i, text in enumerate(texts, 1)
  ]


def vqa_release(prefix: str) -> dict:
  questions = [
    {"image_id": 42, "question": "What is on the mat?", "question_id": 42000},
    {"image_id": 42, "question": "How many mats are there?", "question_id": 42001},
    {"image_id": 185565, "question": "Is it a dog?", "question_id": 185565000},
  ]
  answered = {
    185565000: ("is it a", "yes/no", ["yes", ""] * 5),
    42001: ("how many", "number", ["1"] * 10),
    42000: ("what is on", "other", ["cat"] * 9 + ["a cat"]),
  }
  annotations = [
    {
      "question_id": key,
      "image_id": key // 1000,
      "question_type": question_type,
      "answer_type": answer_type,
      "multiple_choice_answer": texts[0],
      "answers": answers(*texts),
    }
    for key, (question_type, answer_type, texts) in answered.items()
  ]
  about = {"info": {"version": "2.0"}, "license": {}, "data_subtype": "val2014"}
  return {
    f"{prefix}OpenEnded_mscoco_val2014_questions.json": {**about, "questions": questions},
    f"{prefix}mscoco_val2014_annotations.json": {**about, "annotations": annotations},
  }


def coco_release(year: str) -> dict:
  name = {"2014": "COCO_val2014_000000000{}.jpg", "2017": "000000000{}.jpg"}[year]
  return {
    f"annotations/captions_val{year}.json": {
      "info": {},
      "licenses": [],
      "images": [{"id": i, "file_name": name.format(i), "license": 3} for i in (139, 285)],
      "annotations": [
        {"image_id": 285, "id": 11, "caption": "A bear on grass."},
        {"image_id": 139, "id": 12, "caption": "A room with a lamp. "},
        {"image_id": 285, "id": 13, "caption": "One brown bear."},
      ],
    }
  }


def karpathy_image(key: int, folder: str, split: str, *captions: str) -> dict:
  return {
    "filepath": folder,
    "filename": f"COCO_{folder}_{key:012d}.jpg",
    "imgid": 0,
    "split": split,
    "cocoid": key,
    "sentences": [{"raw": c, "tokens": c.split(), "imgid": 0, "sentid": 1} for c in captions],
  }


OK_VQA = vqa_release("")
for entry in OK_VQA["mscoco_val2014_annotations.json"]["annotations"]:
  entry["answers"] = answers("sit", "sit", raw_answer="sitting")
ROUNDS = [
  {"question": 1, "answer": 0, "answer_options": [0, 2], "gt_index": 0},
  {"question": 0, "answer": 2, "answer_options": [1, 2, 0], "gt_index": 1},
  {"question": 2, "answer": 1, "answer_options": [1, 2], "gt_index": 0},
]
RELEASES = {
  "coco_2014": coco_release("2014"),
  "coco_2017": coco_release("2017"),
  "coco_karpathy": {
    "dataset_coco.json": {
      "images": [
        karpathy_image(7, "val2014", "test", "a bus", "a red bus"),
        karpathy_image(8, "train2014", "train", "a key"),
        karpathy_image(9, "val2014", "restval", "a bell"),
        karpathy_image(5, "val2014", "val", "a cup"),
        karpathy_image(6, "val2014", "test", "a tree"),
      ],
      "dataset": "coco",
    }
  },
  "vqa_v2": vqa_release("v2_"),
  "ok_vqa": OK_VQA,
  "vizwiz": {
    "Annotations/val.json": [
      {
        "image": "VizWiz_val_00000000.jpg",
        "question": "What is this?",
        "answers": answers("soap", "unanswerable"),
        "answer_type": "other",
        "answerable": 1,
      },
      {
        "image": "VizWiz_val_00000001.jpg",
        "question": "Which color?",
        "answers": answers("unanswerable", "unanswerable"),
        "answer_type": "unanswerable",
        "answerable": 0,
      },
    ]
  },
  "vg_paragraphs": {
    "paragraphs_v1.json": [
      {"url": "https://x.org/VG_100K/31.jpg", "image_id": 31, "paragraph": "A cat. It sleeps."},
      {"url": "https://x.org/VG_100K_2/32.jpg", "image_id": 32, "paragraph": "A dog. "},
      {"url": "https://x.org/VG_100K/31.jpg", "image_id": 31, "paragraph": "A second one."},
      {"url": "https://x.org/VG_100K/33.jpg", "image_id": 33, "paragraph": "For training."},
    ],
    "train_split.json": [33],
    "val_split.json": [32, 31],
    "test_split.json": [31],
  },
  "visdial": {
    VISDIAL: {
      "version": "1.0",
      "split": "val",
      "data": {
        "questions": ["is it sunny", "is there a dog", "what color is it"],
        "answers": ["yes, one", "white", "no"],
        "dialogs": [
          {"image_id": 9, "caption": "a street", "dialog": ROUNDS[:1]},
          {"image_id": 185565, "caption": "a dog on a lawn", "dialog": ROUNDS},
        ],
      },
    },
    DENSE: [
      {"image_id": 185565, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.4]},
      {"image_id": 9, "round_id": 1, "gt_relevance": [1, 0]},
    ],
  },
}


def write(root, release: dict) -> None:
  for name, content in release.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / name).write_bytes(text)


def write_images(paths, side: int = 8) -> None:
  for i, path in enumerate(sorted(paths)):
    pixels = np.random.default_rng(i).integers(0, 256, (side, side + 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
