"""What a written export is, by its files. Imports no JAX."""

from etils import epath

from cm3leon_jax.files.json_files import read_foreign_json

ABOUT = "export.json"  # Marks a folder as an export, and says of what.
IMAGES = "image_tokenizer"  # Folder of the image tokenizer in an export.
DIGESTS = "digests.json"  # Of the format orbax; written last: without it there is no checkpoint.

# What `kind_of` returns -> what an export is.
KINDS = {
  "stablehlo": "in the format stablehlo",
  "orbax": "in the format orbax",
  "gpt2": "in the format gpt2 of an earlier version",
  "int8": "with int8 weights",
}


def kind_of(folder: epath.PathLike) -> str:
  """Returns the key of `KINDS` of an export, by its files; "": one of `hf`, or another folder."""
  folder = epath.Path(folder)
  for kind, name in (("stablehlo", "manifest.json"), ("orbax", DIGESTS)):
    if (folder / name).exists():
      return kind
  path = folder / "config.json"
  described = read_foreign_json(path, {}) if path.exists() else {}
  if described.get("model_type") == "gpt2":
    return "gpt2"
  return "int8" if described.get("quantization_config") else ""
