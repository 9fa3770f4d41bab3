"""Writes the inputs for `benchmarks.golden`: pairs, texts, documents, prompts, requests."""

import base64
import json
import pathlib

from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "orange", "purple", "black")
PLACES = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("square", "disk", "bar")
SIDE = 48
CAPTIONS = [f"a {c} {s} at the {p}" for c in COLORS for p in PLACES for s in SHAPES]
INSTRUCTIONS = ("Mirror the image", "make the square red")
QUESTIONS = ("What color is the square?", "How many squares are there?")


def write(folder: pathlib.Path) -> None:
  """Writes all input files to a new folder."""
  (folder / "images").mkdir(parents=True)
  for i, caption in enumerate(CAPTIONS):
    _draw(caption).save(folder / "images" / f"{i}.png")
  images = [f"images/{i}.png" for i in range(len(CAPTIONS))]
  pairs = [{"image": image, "caption": text} for image, text in zip(images, CAPTIONS)]
  texts = [{"text": f"Number {i}: {a}, then {b}."} for i, (a, b) in enumerate(_twos())]
  documents = [
    {"segments": [{"text": "First."}, {"image": images[i]}, {"text": f"Then {CAPTIONS[i]}."}]}
    for i in range(0, len(images), 2)
  ]
  for name, records in (("pairs", pairs), ("texts", texts), ("interleaved", documents)):
    keyed = [{"key": f"{name}-{i}", **record} for i, record in enumerate(records)]
    write_lines(folder / f"{name}.jsonl", keyed)
  write_lines(folder / "tasks.jsonl", _tasks())
  write_lines(folder / "scenes.jsonl", [{"prompt": text} for text in _scene_prompts()])
  write_lines(folder / "scenes-instruct.jsonl", _scene_tasks())


def write_lines(path: pathlib.Path, records: list[dict]) -> None:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def http_requests(folder: pathlib.Path) -> list[tuple]:
  """Returns (path, JSON body or form fields, optional image) of requests to a server."""
  image = (folder / "data" / "images" / "0.png").read_bytes()
  url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
  shown = {"type": "image_url", "image_url": {"url": url}}
  contents = [[shown], *([shown, {"type": "text", "text": q}] for q in QUESTIONS)]
  contents.append([{"type": "text", "text": "a <mask> square at the top left"}])
  found: list[tuple] = [
    ("/v1/images/generations", {"prompt": text, "n": 1 + i % 3, "seed": i})
    for i, text in enumerate(CAPTIONS[:8])
  ]
  found += [
    ("/v1/chat/completions", {"seed": i, "messages": [{"role": "user", "content": content}]})
    for i, content in enumerate(contents)
  ]
  edits = [{"prompt": text, "seed": "1"} for text in INSTRUCTIONS]
  edits.append({"box": "0,0,24,48", "seed": "2"})
  return [*found, *(("/v1/images/edits", fields, image) for fields in edits)]


def _draw(caption: str) -> Image.Image:
  image = Image.new("RGB", (SIDE, SIDE), "white")
  half = SIDE // 2
  left, top = half * ("right" in caption), half * ("bottom" in caption)
  box = [left + 4, top + 4, left + half - 5, top + (12 if " bar " in caption else half - 5)]
  draw = ImageDraw.Draw(image)
  shape = draw.ellipse if " disk " in caption else draw.rectangle
  shape(box, fill=next(color for color in COLORS if f" {color} " in caption))
  return image


def _twos() -> list[tuple[str, str]]:
  return list(zip(CAPTIONS, reversed(CAPTIONS)))


def _tasks() -> list[dict]:
  """Returns tasks of every kind for `cm3leon generate`, with common and rare settings."""
  given = {"image": "images/0.png"}
  flat = {"text_top_k": 0, "text_temperature": 1.5, "top_k": 0, "temperature": 1.5}
  return [
    *({"prompt": text, "retrieve": i % 2} for i, text in enumerate(CAPTIONS[:4])),
    {"prompt": CAPTIONS[4], "method": "contrastive"},
    {"prompt": CAPTIONS[5], "method": "mixture", "guidance_schedule": "cosine"},
    {"task": "unconditional"},
    {"task": "infill_image", **given, "box": [0, 0, 24, 48]},
    {"task": "infill_image", **given, "box": [24, 24, 48, 48], "prompt": CAPTIONS[0], **flat},
    *({"task": "edit", **given, "prompt": text} for text in INSTRUCTIONS),
    {"task": "instruct", "prompt": f"Draw {CAPTIONS[7]}"},
    {"task": "caption", **given},
    {"task": "caption", **given, **flat},
    *({"task": "question", **given, "prompt": text} for text in QUESTIONS),
    {"task": "infill_text", "prompt": "a <mask> square at the top left", "length": 12},
    {"task": "interleaved", "prompt": CAPTIONS[8], "length": 100},
  ]


def _scene_prompts() -> list[str]:
  """Returns ten prompts for the bundled model `scenes`, from all categories of captions."""
  return [
    *("a bell", "a red key", "three green fish", "a blue anchor and a black cat"),
    *("a yellow duck to the left of a purple crown", "a green bell below a red bone"),
    *("a cyan door at the top left", "an orange violin at the bottom right"),
    *("two black cameras", "a red cactus and a red flag"),
  ]


def _scene_tasks() -> list[dict]:
  """Returns ten tasks for the bundled model `scenes-instruct`."""
  given = [{"image": f"images/{i}.png"} for i in (0, 5, 40)]
  return [
    *({"task": "caption", **image} for image in given),
    *({"task": "question", **image, "prompt": QUESTIONS[0]} for image in given),
    *({"task": "edit", **image, "prompt": INSTRUCTIONS[0]} for image in given[:2]),
    {"task": "text_to_image", "prompt": "a red key"},
    {"task": "infill_image", **given[1], "box": [0, 0, 24, 48]},
  ]
