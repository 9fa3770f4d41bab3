"""Counts matrix products, collectives and arrays in the text of a compiled XLA program.

The text is available without a device or a private API. A program is a set of computations. Counts
in the body of a loop are multiplied by the number of iterations.
"""

from collections import Counter
from collections.abc import Iterator
import dataclasses
import functools
import math
import re

import numpy as np

_SIZES = {1: "pred s8 u8", 2: "bf16 f16 s16 u16", 4: "f32 s32 u32", 8: "s64 f64"}
BYTES = {dtype: n for n, dtypes in _SIZES.items() for dtype in dtypes.split()}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Number of [L, L] x H products per call of each Pallas kernel of splash attention, which XLA does
# not count.
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
# The same for the Triton kernels of attention, whose results are [B, L, N, H].
TRITON_KERNELS = {"mha_forward": 2, "mha_backward": 7}
# Instructions that create no array.
_VIEWS = "parameter get-tuple-element tuple while bitcast constant call opt-barrier conditional"
VIEWS = set(_VIEWS.split())
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")


@dataclasses.dataclass(frozen=True)
class HloInstruction:
  """One line of a computation: `%name = type op(operands), attributes`."""

  name: str
  type: str
  op: str
  rest: str

  def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (dtype, dimensions) of each array in the result."""
    arrays = ((dtype, dims) for dtype, dims in _SHAPE.findall(self.type) if dtype in BYTES)
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in arrays]

  def attribute(self, pattern: str) -> str | None:
    """Returns group 1 of `pattern` in the operands and attributes, or None without a match."""
    match = re.search(pattern, self.rest)
    return match.group(1) if match else None

  def required(self, pattern: str) -> str:
    """Returns `attribute`. Raises ValueError if there is no match."""
    return _match(pattern, self.rest).group(1)

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


def size(shape: tuple[str, tuple[int, ...]]) -> int:
  """Computes the bytes of an array from (dtype, dimensions), without the padding of its layout."""
  return BYTES[shape[0]] * math.prod(shape[1])


class Program:
  """A compiled program, parsed from `jax.stages.Compiled.as_text()`."""

  def __init__(self, text: str):
    self._lines = text.splitlines()
    self._tiled = ":T(" in text  # For TPUs, whose plain reduce-scatters count as one shard.
    self.computations: dict[str, list[HloInstruction]] = {}
    self.entry = ""
    current: list[HloInstruction] = []
    for line in self._lines:
      if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
        current = self.computations.setdefault(head.group(2), [])
        self.entry = head.group(2) if head.group(1) else self.entry
      elif instruction := _INSTRUCTION.match(line):
        current.append(HloInstruction(*instruction.groups()))

  def _callees(self, caller: str, instruction: HloInstruction) -> Iterator[tuple[str, int]]:
    if instruction.op == "while":
      yield instruction.required(r"body=%?([\w.\-]+)"), self._trips(caller, instruction)
    elif instruction.op in ("fusion", "call", "async-start"):
      if name := instruction.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)"):
        yield name, 1
    elif instruction.op == "conditional" and (
      names := instruction.attribute(r"branch_computations=\{([^}]*)")
    ):
      yield from ((name.strip(" %"), 1) for name in names.split(","))

  def _trips(self, caller: str, loop: HloInstruction) -> int:
    """Returns the number of iterations of a `lax.scan` loop; 1 if it depends on data.

    XLA may move the first iteration out of a loop ("peel" it). The loop index then starts at 1.
    """
    condition = self.computations[loop.required(r"condition=%?([\w.\-]+)")]
    ends = [_constant(i) for i in condition if _is_index(i) and i.op == "constant"]
    if not ends:  # XLA:GPU writes the number down. Without it, the end depends on data.
      return int(loop.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
    places = [i for i in condition if _is_index(i) and i.op == "get-tuple-element"]
    start = 0
    if len(places) == 1:
      start = self._carried(caller, loop, int(places[0].required(r"index=(\d+)")))
    return max(ends) - start

  def _carried(self, caller: str, loop: HloInstruction, place: int) -> int:
    """Returns the initial value of element `place` of a loop's tuple; 0 if it is not constant."""
    made = {i.name: i for i in self.computations[caller]}
    values = made[loop.operands[0]]
    value = made[values.operands[place]] if values.op == "tuple" else values
    while value.op in ("copy", "bitcast", "convert"):
      value = made[value.operands[0]]
    return _constant(value) if value.op == "constant" and _is_index(value) else 0

  @functools.cached_property
  def runs(self) -> Counter:
    """Counts how often each computation runs in one call of the program."""
    runs: Counter = Counter()

    def visit(name: str, times: int) -> None:
      runs[name] += times
      for instruction in self.computations[name]:
        for callee, trips in self._callees(name, instruction):
          visit(callee, times * trips)

    visit(self.entry, 1)
    return runs

  @functools.cached_property
  def fused(self) -> set[str]:
    """Names of fused computations, whose intermediate values are not arrays in memory."""
    calls = ((name, i) for name, made in self.computations.items() for i in made)
    return {callee for name, i in calls if i.op == "fusion" for callee, _ in self._callees(name, i)}

  def flops(self) -> float:
    """Counts the FLOPs of matrix products.

    Splash attention is causal, so only half of its [L, L] products are counted.
    """
    return float(sum(n * self._product_flops(name) for name, n in self.runs.items()))

  def _product_flops(self, computation: str) -> float:
    instructions = self.computations[computation]
    shapes = {i.name: i.shapes() for i in instructions}
    total = 0.0
    for i in instructions:
      if i.op == "convolution":
        total += _convolution_flops(i, *(shapes[o][0][1] for o in i.operands[:2]))
      elif i.op == "dot":
        total += _dot_flops(i, shapes[i.operands[0]][0][1])
      elif i.op == "custom-call" and (
        products := next((n for k, n in KERNELS.items() if i.name.startswith(k)), 0)
      ):
        # The output is the first array with the most dimensions. Scratch arrays and log-sums have
        # fewer dimensions or follow it.
        *outer, L, H = max((dims for _, dims in i.shapes()), key=len)
        total += products * math.prod(outer) * L * L * H
      elif i.op == "custom-call" and (name := i.attribute(r'op_name="[^"]*/(mha_\w+)/pallas_call')):
        _, L, *_ = dims = i.shapes()[0][1]
        total += TRITON_KERNELS.get(name, 0) * math.prod(dims) * L
    return total

  def traffic(self) -> float:
    """Counts the bytes read from and written to the chip's main memory, without layout padding.

    If an instruction reads or replaces only a part of an array, only this part is counted.
    """
    runs = ((name, n) for name, n in self.runs.items() if name not in self.fused)
    return float(sum(n * self._moved_bytes(name) for name, n in runs))

  def _moved_bytes(self, computation: str) -> float:
    types = {i.name: i.type for i in self.computations[computation]}
    total = 0.0
    for i in self.computations[computation]:
      if i.op in ("copy-start", "slice-start"):  # Copies to or from the fast memory.
        sides = _ARRAY.findall(i.type)[:2]
        total += _main_bytes(sides[1].replace("S(1)", "")) * sum("S(" not in side for side in sides)
      elif i.op not in VIEWS and not i.op.endswith(("-start", "-done")):
        parts = self._parts(i)
        reads = [_main_bytes(types.get(o, "")) for o in i.operands]
        total += sum(n if part is None else min(n, part) for n, part in zip(reads, parts))
        written = _main_bytes(i.type)
        total += min(written, parts[-1]) if parts[-1] is not None else written
    return total

  def _parts(self, i: HloInstruction) -> list[float | None]:
    """Returns the bytes that are read from each operand, then the bytes replaced in the result.

    None instead of a number means all bytes of the array.
    """
    inner = self.computations[i.required(r"calls=%?([\w.\-]+)")] if i.op == "fusion" else [i]
    names = [x.name for x in inner if x.op == "parameter"] if i.op == "fusion" else i.operands
    if i.op == "fusion":
      names.sort(key=lambda name: int(next(x for x in inner if x.name == name).rest.split(")")[0]))
    sizes = {x.name: float(sum(map(size, x.shapes()))) for x in inner}
    parts: list[float | None] = []
    for name in names:
      users = [x for x in inner if name in x.operands]
      sources = [x for x in users if x.operands[0] == name]
      reads = [x for x in sources if x.op in ("slice", "dynamic-slice", "gather")]
      updates = [x for x in sources if x.op == "dynamic-update-slice"]
      read = sum(sizes[x.name] for x in reads)
      parts.append(read if users and len(reads) + len(updates) == len(users) else None)
    updates = [x for x in inner if x.op == "dynamic-update-slice"]
    replaced = sum(sizes.get(x.operands[1], 0.0) for x in updates)
    return [*parts, replaced if updates else None]

  def cycles(self) -> float:
    """Sums the compiler's cycle estimates, without Pallas kernels and waits for collectives."""
    pattern, total = r'"estimated_cycles":"(\d+)"', 0
    for name in self.runs.keys() - self.fused:
      cycles = sum(int(i.attribute(pattern) or 0) for i in self.computations[name])
      total += self.runs[name] * cycles
    return float(total)

  def collectives(self) -> dict[str, tuple[int, int]]:
    """Maps a kind of collective to (runs per call, bytes of all its whole arrays on one device)."""
    kinds: dict[str, list[int]] = {}
    for name, times in self.runs.items():
      sizes = {i.name: sum(map(size, i.shapes())) for i in self.computations[name]}
      for i in self.computations[name]:
        kind = i.op.removesuffix("-start")
        if kind not in COLLECTIVES or self._continues_another(name):
          continue
        kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
        moved = sum(sizes.get(o, 0) for o in i.operands)
        if i.op.endswith("-start"):  # The result has the operands, then their results.
          n, arrays = len(i.operands), list(map(size, i.shapes()))
          moved = max(sum(arrays[:n]), sum(arrays[n : 2 * n]))
        elif kind != "reduce-scatter" or self._tiled:
          moved = sizes[i.name]
        entry = kinds.setdefault(kind, [0, 0])
        entry[0] += times
        entry[1] += times * moved
    return {kind: (kinds[kind][0], kinds[kind][1]) for kind in sorted(kinds)}

  def _continues_another(self, computation: str) -> bool:
    """Returns whether a computation only continues an asynchronous collective of another one.

    XLA prints such a collective again in the fusions that overlap with it.
    """
    text = " ".join(i.rest for i in self.computations[computation])
    if "AsyncCollectiveStart" in text:
      return False
    return "AsyncCollectiveDone" in text or computation.startswith("async_collective_fusion")

  def largest(self, count: int) -> list[dict]:
    """Returns the `count` largest arrays that the program creates in the chip's main memory.

    Each entry has "array" (dtype and shape), "bytes", and "source" (a line of this project).
    """
    sizes: dict[tuple[str, str], int] = {}
    for name in self.runs:
      for i in self.computations[name] if name not in self.fused else ():
        if i.op in VIEWS or i.op.endswith(("-done", "-start")):
          continue
        for text in _ARRAY.findall(i.type):
          shape = HloInstruction("", text, "", "").shapes()
          if shape and "S(" not in text:
            sizes[text.split("{")[0], self.source(i)] = size(shape[0])
    top = sorted(sizes.items(), key=lambda item: -item[1])[:count]
    return [{"array": array, "bytes": n, "source": source} for (array, source), n in top]

  def source(self, instruction: HloInstruction) -> str:
    """Returns `file:line function` of the innermost frame in this project, or the op's name."""
    frame = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0)
    while frame:
      location, parent = self._frames[frame]
      if "cm3leon_jax/" in location and "site-packages/" not in location:
        return location[location.rindex("cm3leon_jax/") :]
      frame = parent
    return instruction.attribute(r'op_name="([^"]*)"') or instruction.op

  @functools.cached_property
  def _frames(self) -> dict[int, tuple[str, int]]:
    """Maps the id of a stack frame to (`path:line function`, id of the calling frame)."""
    names = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    files, functions, locations, calls = (_table(self._lines, name) for name in names)
    frames = {}
    for key, text in calls.items():
      at = locations[_number("file_location_id", text)]
      file = files[_number("file_name_id", at)].strip('"')
      function = functions[_number("function_name_id", at)].strip('"')
      frames[key] = f"{file}:{_number('line', at)} {function}", _number("parent_frame_id", text) - 1
    return frames


def _is_index(instruction: HloInstruction) -> bool:
  return instruction.type.startswith("s32[]")


def _constant(instruction: HloInstruction) -> int:
  return int(instruction.rest.split(")")[0])


def _number(field: str, text: str) -> int:
  return int(_match(rf"{field}=(\d+)", text).group(1))


def _match(pattern: str, text: str) -> re.Match[str]:
  """Searches for a pattern. Raises ValueError if there is no match."""
  if (result := re.search(pattern, text)) is None:
    raise ValueError(f"no {pattern} in {text}")
  return result


def _main_bytes(text: str) -> float:
  """Computes the bytes of all arrays in main memory that a type contains."""
  arrays = " ".join(array for array in _ARRAY.findall(text) if "S(" not in array)
  return float(sum(map(size, HloInstruction("", arrays, "", "").shapes())))


def _table(lines: list[str], name: str) -> dict[int, str]:
  """Parses a table in the program text: `name`, then lines `1 ...`, `2 ...`, then an empty line."""
  rows: dict[int, str] = {}
  if name in lines:
    for line in lines[lines.index(name) + 1 :]:
      if not line.strip():
        break
      key, _, value = line.partition(" ")
      rows[int(key)] = value
  return rows


def _dot_flops(dot: HloInstruction, left: tuple[int, ...]) -> float:
  dims = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
  contracted = math.prod(left[int(d)] for d in dims.split(",") if d)
  return 2.0 * math.prod(dot.shapes()[0][1]) * contracted


def _convolution_flops(
  convolution: HloInstruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
  """Counts the FLOPs of a convolution, except for products with padding.

  XLA:TPU represents matrix products as convolutions, and may treat batch dimensions as a window.
  """
  lhs, rhs, out = _match(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest).groups()
  result = convolution.shapes()[0][1]
  total = 2.0 * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")]
  axes = sorted(c for c in lhs if c.isdigit())
  windows = []
  for name, default in (("size", "1"), ("pad", "0_0"), ("stride", "1"), ("lhs_dilate", "1")):
    values = convolution.attribute(rf"window=\{{[^}}]*\b{name}=([\dx_\-]+)")
    windows.append(values.split("x") if values else [default] * len(axes))
  for axis, k, pad, stride, dilation in zip(axes, *windows):
    low, n, places = int(pad.split("_")[0]), left[lhs.index(axis)], result[out.index(axis)]
    at = np.arange(places)[:, None] * int(stride) + np.arange(int(k))[None] - low
    inside = (at >= 0) & (at <= (n - 1) * int(dilation)) & (at % int(dilation) == 0)
    total *= np.count_nonzero(inside)
  return total
