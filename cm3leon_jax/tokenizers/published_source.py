"""Finds the safetensors files of a published image tokenizer.

This module never loads a pickle, because loading a pickle can execute arbitrary code.
"""

from collections.abc import Collection
import os

from etils import epath
import safetensors

from cm3leon_jax.config import UserError, short
from cm3leon_jax.files.json_files import check_foreign, read_foreign_json
from cm3leon_jax.parameters import files_of_index
from cm3leon_jax.tokenizers import published
from cm3leon_jax.tokenizers.vqgan import CONFIG

DIFFUSERS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS = "model.safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def _refuse_pickle(path: epath.Path) -> None:
  """Raises UserError if a file is a pickle or has its suffix. It says how to convert the file."""
  check_foreign(path)
  with path.open("rb") as file:
    start = file.read(4)
  is_pickle = start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
  if path.suffix not in PICKLES and (path.suffix == ".safetensors" or not is_pickle):
    return
  raise UserError(
    f"{path} is a pickle, which can run any code when it is read, so it is not read here. Convert "
    "it in another environment, one without secrets: "
    f"t = torch.load('{path.name}', map_location='cpu', weights_only=True); "
    "t = t.get('state_dict', t); safetensors.torch.save_file({k: v.contiguous() for k, v in "
    f"t.items()}}, '{path.stem}.safetensors'). Then --source is {path.stem}.safetensors. If "
    "weights_only=True refuses a class, docs/published_tokenizers.md shows how to allow the class "
    "with torch.serialization.safe_globals; do not turn weights_only off."
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
    names = sorted(set(files_of_index(index).values()))
    if absent := [name for name in names if not (folder / name).exists()]:
      raise UserError(
        f"{folder / absent[0]} does not exist, but {index} lists it: download it, too."
      )
    return [folder / name for name in names]
  found = sorted(folder.glob("*.safetensors"))
  if len(found) > 1:
    raise UserError(
      f"{folder} contains {', '.join(x.name for x in found[:4])}; name one of them: "
      f"--source={found[0]}"
    )
  for other in sorted(folder.iterdir()) if not found else ():
    if other.suffix in PICKLES:
      _refuse_pickle(other)
  if not found:
    raise UserError(
      f"{folder} contains no .safetensors file: name the folder or file with the weights."
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


def check_kind(folder: epath.Path, names: Collection[str], source: epath.PathLike) -> None:
  """Raises UserError, which says what to do, if a folder contains another kind of model.

  The kind is read from config.json in `folder`. Messages name the checkpoint `source`.
  """
  path = folder / CONFIG
  stored = read_foreign_json(path, {}) if path.exists() else {}
  if "vqgan" in stored or published.SECTION in stored:
    raise UserError(
      f"{source} is an image tokenizer of this project: omit --family, and name its folder."
    )
  kind = stored.get("model_type")
  if kind is None or any("quantize." in name for name in names):
    return
  right = "name the folder or file with the weights of an image tokenizer."
  if kind in ("opt", "qwen3"):
    right = f"`cm3leon import_weights` imports a decoder; here {right}"
  raise UserError(
    f"{source} contains no image tokenizer: according to {path}, it is a model of type "
    f"{short(kind)}: {right}"
  )
