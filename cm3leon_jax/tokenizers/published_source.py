"""Finds the safetensors files of a published image tokenizer.

This module never loads a pickle, because loading a pickle can execute arbitrary code.
"""

from collections.abc import Collection
import os

from etils import epath
import safetensors

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import check_foreign
from cm3leon_jax.weights.stored_tensors import files_of_index

DIFFUSERS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS = "model.safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def _refuse_pickle(path: epath.Path) -> None:
  """Raises UserError if a file is a pickle or has its suffix."""
  check_foreign(path)
  with path.open("rb") as file:
    start = file.read(4)
  is_pickle = start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
  if path.suffix in PICKLES or (is_pickle and path.suffix != ".safetensors"):
    raise UserError(
      f"{path} is a pickle, which can run any code when it is read, so it is not read here: "
      "docs/weights.md shows how to convert it to safetensors."
    )


def find_files(source: epath.PathLike) -> list[epath.Path]:
  """Finds the safetensors files of `source`, a safetensors file or a folder.

  The folder contains one such file, the files of an index, or a folder vqvae/ with one file, as in
  aMUSEd.

  Raises:
    UserError: there is no such file, there are several, or there is only a pickle.
  """
  path = epath.Path(source)
  if "://" in os.fspath(source) or not path.exists():
    raise UserError(f"--source is {source}; it must be a file or folder on this machine.")
  if not path.is_dir():
    _refuse_pickle(path)
    return [path]
  folder = path / "vqvae" if (path / "vqvae").is_dir() else path
  for name in (DIFFUSERS, TRANSFORMERS):
    if (folder / name).exists():
      return [folder / name]
  if (index := folder / f"{TRANSFORMERS}.index.json").exists():
    return [folder / name for name in sorted(set(files_of_index(index).values()))]
  found = sorted(folder.glob("*.safetensors"))
  for other in () if found else sorted(folder.iterdir()):
    if other.suffix in PICKLES:
      _refuse_pickle(other)
  if len(found) != 1:
    raise UserError(
      f"--source is {source}, a folder with {len(found)} .safetensors files: name the file with "
      "the weights."
    )
  return found


def read_headers(files: Collection[epath.Path]) -> dict[str, tuple[epath.Path, tuple[int, ...]]]:
  """Returns tensor name -> (file, shape), from the headers of the files."""
  found = {}
  for path in files:
    check_foreign(path)
    try:
      with safetensors.safe_open(os.fspath(path), framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
          found[name] = path, tuple(file.get_slice(name).get_shape())
    except (safetensors.SafetensorError, OSError) as error:
      raise UserError(
        f"{path} is not a whole safetensors file ({error}): download it again."
      ) from error
  return found
