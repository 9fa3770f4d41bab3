"""Reads prose to train on from docstrings of the standard library and of installed packages."""

import ast
from collections.abc import Iterator
import dataclasses
import hashlib
from importlib import metadata
import pathlib
import platform
import re
import sysconfig
from typing import Any
import warnings

MIN_CHARS = 60
MAX_CHARS = 1_500

_OPEN = re.compile(
  r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|MPL|HPND)\b", re.IGNORECASE
)
# Skipped folders: tests, and files that belong to another package.
_SKIPPED = {"tests", "test", "testing", "idlelib", "site-packages", ".."}
_SKIPPED |= {"_vendor", "vendor", "vendored", "third_party", "externals"}
_ROLE = re.compile(r":[a-z:]+:`~?\.?([^`<]+?)(?: <[^`>]+>)?`")
_HEADINGS = (
  "Args|Arguments|Attributes|Examples?|Notes?|Parameters|Raises|References|Returns?|Yields"
)
_SECTION = re.compile(rf"^\s*({_HEADINGS})\s*:?\s*$", re.MULTILINE)
_CODE = re.compile(r">>>|::|[{}<>=|\\]|\w\(|^\s*[-*.@:+]|https?:|\w_\w|\.\. ")


@dataclasses.dataclass(frozen=True)
class Module:
  """Python source file, which is read but never imported."""

  name: str
  path: pathlib.Path
  source: str
  license: str
  attribution: str


@dataclasses.dataclass(frozen=True)
class Piece:
  """Part of a docstring; the key is the module, the line of the definition and the part number."""

  key: str
  text: str
  module: Module


def pieces(limit: int) -> Iterator[Piece]:
  """Yields at most `limit` different texts of MIN_CHARS to MAX_CHARS characters.

  Modules are ordered by a hash of their names, so that a small limit still covers many packages.
  The result depends only on the installed versions.
  """
  if limit == 0:
    return
  seen = set()
  for module in sorted(_modules(), key=_order):
    for line, docstring in _docstrings(module.path):
      for i, text in enumerate(prose(docstring)):
        if text.lower() in seen:
          continue
        seen.add(text.lower())
        yield Piece(f"{module.name}:{line}:{i}", text, module)
        if len(seen) == limit:
          return


def _order(module: Module) -> bytes:
  return hashlib.sha256(b"order:" + module.name.encode()).digest()


def prose(docstring: str) -> list[str]:
  """Returns the prose in a docstring: no code, tables, lists, signatures or fields."""
  texts, run = [], ""
  for paragraph in [*re.split(r"\n\s*\n", docstring), ""]:
    sentence = _sentence(paragraph)
    if sentence and len(run) + len(sentence) < MAX_CHARS:
      run = f"{run}\n{sentence}" if run else sentence
      continue
    texts.append(run)
    run = sentence
  return [text for text in texts if MIN_CHARS <= len(text) <= MAX_CHARS]


def _sentence(paragraph: str) -> str:
  """Returns a paragraph as one line, or '' if it contains anything but sentences."""
  text = _ROLE.sub(r"\1", paragraph)
  text = " ".join(text.replace("`", "").split())
  if (
    _CODE.search(paragraph.strip())
    or _SECTION.search(paragraph)
    or not re.match(r"[A-Z].*[.!?]$", text)
  ):
    return ""
  letters = sum(c.isalpha() or c == " " for c in text)
  return text if letters >= 0.9 * len(text) and len(text.split()) >= 4 else ""


def _docstrings(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields (line, docstring) of a module and its definitions, or nothing after a syntax error."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      tree = ast.parse(path.read_bytes())
  except (SyntaxError, ValueError, RecursionError, OSError):
    return
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      docstring = ast.get_docstring(node)
      if docstring:
        yield getattr(node, "lineno", 0), docstring


def _modules() -> Iterator[Module]:
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  about = (f"Python {platform.python_version()}", "PSF-2.0", "Python Software Foundation")
  for path in root.rglob("*.py"):
    relative = path.relative_to(root)
    if _is_kept(relative):
      yield Module(_module_name(relative), path, *about)
  for package in metadata.distributions():
    license_ = _license(package.metadata)
    if license_:
      about = (f"{package.name} {package.version}", license_, f"the authors of {package.name}")
      for file in package.files or ():
        if file.suffix == ".py" and _is_kept(file):
          yield Module(_module_name(file), pathlib.Path(str(file.locate())), *about)


def _is_kept(path: pathlib.PurePath) -> bool:
  is_test = path.stem.startswith("test_") or path.stem.endswith("_test")
  return not is_test and not _SKIPPED.intersection(path.parts)


def _module_name(path: pathlib.PurePath) -> str:
  return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _license(about: Any) -> str:
  """Returns the license of a package, or '' if it has none or forbids reuse of its text."""
  stated = [about.get("License-Expression"), about.get("License")]
  stated += [
    c.rsplit(" :: ", 1)[-1]
    for c in about.get_all("Classifier", [])
    if c.startswith("License :: OSI Approved :: ")
  ]
  for name in stated:
    if name and len(name) < 80 and "\n" not in name and _OPEN.search(name) and "GPL" not in name:
      return name
  return ""
