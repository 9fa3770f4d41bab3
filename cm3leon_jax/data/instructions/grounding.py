"""Reads captions with object boxes. Describes the boxes as text, as in CM3Leon's figure 15."""

from collections.abc import Iterator, Sequence
import dataclasses

from etils import epath

from cm3leon_jax.data.instructions.records import Record, caption_records
from cm3leon_jax.data.published import files
from cm3leon_jax.data.published.releases import field_of, load_json
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.errors import UserError

SIDE = 256  # Image side for locations, in pixels. It is the same for every resolution of a run.
MOST_OBJECTS = 8  # Maximum number of objects in a text. A location takes about 20 tokens.

Box = tuple[int, int, int, int]  # Left, top, right, bottom.


def read_coco_objects(
  instances: epath.PathLike, captions: epath.PathLike, images: ImageFolder, folder: str
) -> Iterator[Record]:
  """Yields one record per caption of COCO, with the objects of the image.

    a bottle in the box [199, 130, 5, 20] of an image of 256 x 256 pixels:
    objects "bottle at location (199, 130) -> (204, 150)"

  Locations refer to the image after preprocessing: its centered square, scaled to SIDE x SIDE
  pixels. Boxes are clipped to the square. Crowds and objects outside the square are skipped. The
  text lists the largest MOST_OBJECTS, the largest first. Images without objects are skipped.

  Args:
    instances: file with {"images": [{id, width, height}], "categories": [{id, name}],
      "annotations": [{image_id, category_id, bbox: [left, top, width, height], iscrowd: 0 or 1}]}.
    captions: caption file of the same split.
    images, folder: as in `files.read_coco`.
  """
  objects = _objects_by_image(instances)
  for record in caption_records(files.read_coco(captions, images, folder)):
    if int(record.group) not in objects:
      raise UserError(
        f"{captions}, image {record.group}, is not in {instances}; give two files of the same "
        "split."
      )
    if listed := objects[int(record.group)]:
      yield dataclasses.replace(record, texts={**record.texts, "objects": listed})


def _objects_by_image(file: epath.PathLike) -> dict[int, str]:
  """Returns a dict from image id to the text that describes the objects."""
  content = load_json(file)
  images, categories, boxes = (
    field_of(content, name, list, file) for name in ("images", "categories", "annotations")
  )
  try:
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    names = {category["id"]: category["name"] for category in categories}
    found: dict[int, list[tuple[str, Box]]] = {key: [] for key in sizes}
    for entry in boxes:
      box = square_box(entry["bbox"], *sizes[entry["image_id"]])
      if box is not None and not entry["iscrowd"]:
        found[entry["image_id"]].append((names[entry["category_id"]], box))
  except (LookupError, TypeError, ValueError, ArithmeticError) as error:
    raise UserError(f"{file} has the wrong format: {error!r}.") from error
  return {key: describe_objects(objects) for key, objects in found.items()}


def square_box(bbox: Sequence[float], width: int, height: int) -> Box | None:
  """Converts a box to coordinates of the image's centered square, scaled to SIDE x SIDE pixels.

    square_box((100, 50, 100, 25), 400, 200) = (0, 64, 128, 96)
    The square begins at column 100, and the scale is 1.28.

  `bbox` is left, top, width and height in pixels of the image. The result is left, top, right and
  bottom, clipped to the square and rounded. It is None if the box is outside the square.
  """
  side = min(width, height)
  scale = SIDE / side
  place = []
  for start, length, size in zip(bbox[:2], bbox[2:], (width, height)):
    start -= (size - side) / 2
    place.append([round(min(max(x * scale, 0), SIDE)) for x in (start, start + length)])
  (left, right), (top, bottom) = place
  return (left, top, right, bottom) if left < right and top < bottom else None


def describe_objects(objects: Sequence[tuple[str, Box]]) -> str:
  """Describes the largest objects as text, in descending order of area (CM3Leon, figure 15).

  [("cup", (0, 0, 9, 9)), ("bottle", (199, 130, 204, 150))] becomes
  "bottle at location (199, 130) -> (204, 150), cup at location (0, 0) -> (9, 9)"
  """

  def area(named: tuple[str, Box]) -> int:
    left, top, right, bottom = named[1]
    return (right - left) * (bottom - top)

  largest = sorted(objects, key=area, reverse=True)[:MOST_OBJECTS]
  return ", ".join(
    f"{name} at location ({left}, {top}) -> ({right}, {bottom})"
    for name, (left, top, right, bottom) in largest
  )
