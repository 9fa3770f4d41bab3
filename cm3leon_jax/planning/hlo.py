"""What a compiled XLA program does, read from its text: products, collectives, and the largest arrays it makes."""

# Only what XLA prints is used, so nothing here needs a device or a private API. A program is a set of computations; the
# body of a loop counts as often as the loop runs.

from collections import Counter
from collections.abc import Iterator
import dataclasses
import functools
import math
import re

import numpy as np

BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "f32": 4,
  "s32": 4,
  "u32": 4,
  "s64": 8,
  "f64": 8,
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Pallas kernels of splash attention, whose products XLA does not see -> products of [L, L] x H that one call does.
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
# Instructions that make no array of their own.
VIEWS = {
  "parameter",
  "get-tuple-element",
  "tuple",
  "while",
  "bitcast",
  "constant",
  "call",
  "opt-barrier",
  "conditional",
}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: `%name = type op(operands), attributes`."""

  name: str
  type: str
  op: str
  rest: str

  def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of the arrays that it gives."""
    found = ((dtype, dims) for dtype, dims in _SHAPE.findall(self.type) if dtype in BYTES)
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in found]

  def attribute(self, pattern: str) -> str | None:
    found = re.search(pattern, self.rest)
    return found and found.group(1)

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


def size(shape: tuple[str, tuple[int, ...]]) -> int:
  """Bytes of an array, without the padding of its layout."""
  return BYTES[shape[0]] * math.prod(shape[1])


class Program:
  """A compiled program, from `jax.stages.Compiled.as_text()`."""

  def __init__(self, text: str):
    self._lines = text.splitlines()
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    current: list[Instruction] = []
    for line in self._lines:
      if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
        current = self.computations.setdefault(head.group(2), [])
        self.entry = head.group(2) if head.group(1) else self.entry
      elif instruction := _INSTRUCTION.match(line):
        current.append(Instruction(*instruction.groups()))

  def _callees(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
    if instruction.op == "while":
      yield instruction.attribute(r"body=%?([\w.\-]+)"), self._trips(instruction)
    elif instruction.op in ("fusion", "call", "async-start"):
      if name := instruction.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)"):
        yield name, 1
    elif instruction.op == "conditional" and (
      names := instruction.attribute(r"branch_computations=\{([^}]*)")
    ):
      yield from ((name.strip(" %"), 1) for name in names.split(","))

  def _trips(self, loop: Instruction) -> int:
    """How often a loop of `lax.scan` runs: the number that its condition compares with."""
    condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    numbers = [
      int(c.rest.split(")")[0])
      for c in condition
      if c.op == "constant" and c.type.startswith("s32")
    ]
    return max(numbers, default=1)  # A loop that data ends counts once.

  @functools.cached_property
  def runs(self) -> Counter:
    """How often each computation runs in one call of the program."""
    found: Counter = Counter()

    def visit(name: str, times: int):
      found[name] += times
      for instruction in self.computations[name]:
        for callee, trips in self._callees(instruction):
          visit(callee, times * trips)

    visit(self.entry, 1)
    return found

  @functools.cached_property
  def fused(self) -> set[str]:
    """Computations whose inner values are never arrays in memory."""
    calls = (i for name in self.computations for i in self.computations[name] if i.op == "fusion")
    return {callee for i in calls for callee, _ in self._callees(i)}

  def flops(self) -> float:
    """FLOPs of matrix products, those of splash attention (causal: half the square) included."""
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
        *outer, L, H = max(
          (dims for _, dims in i.shapes()), key=len
        )  # Scratch and log-sums have fewer, or come later.
        total += products * math.prod(outer) * L * L * H
    return total

  def traffic(self) -> float:
    """Bytes that instructions read from and write to the chip's main memory, without the padding of layouts.

    Of an array of which a part is taken, or in which a part is replaced, the part counts.
    """
    return float(
      sum(n * self._moved(name) for name, n in self.runs.items() if name not in self.fused)
    )

  def _moved(self, computation: str) -> float:
    types = {i.name: i.type for i in self.computations[computation]}
    total = 0.0
    for i in self.computations[computation]:
      if i.op in ("copy-start", "slice-start"):  # To or from the fast memory.
        sides = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", i.type)[:2]
        total += _main_bytes(sides[1].replace("S(1)", "")) * sum("S(" not in side for side in sides)
      elif i.op not in VIEWS and not i.op.endswith(("-start", "-done")):
        parts = self._parts(i)
        reads = [_main_bytes(types.get(o, "")) for o in i.operands]
        total += sum(n if part is None else min(n, part) for n, part in zip(reads, parts))
        written = _main_bytes(i.type)
        total += min(written, parts[-1]) if parts[-1] is not None else written
    return total

  def _parts(self, i: Instruction) -> list[float | None]:
    """Bytes of the part of each operand that an instruction takes, and of its result that it replaces; None: all."""
    inner = self.computations[i.attribute(r"calls=%?([\w.\-]+)")] if i.op == "fusion" else [i]
    names = [x.name for x in inner if x.op == "parameter"] if i.op == "fusion" else i.operands
    if i.op == "fusion":
      names.sort(key=lambda name: int(next(x for x in inner if x.name == name).rest.split(")")[0]))
    shapes = {x.name: x.shapes() for x in inner}
    bytes_of = lambda name: float(sum(map(size, shapes.get(name, []))))
    parts: list[float | None] = []
    for name in names:
      users = [x for x in inner if name in x.operands]
      cut = [
        x for x in users if x.op in ("slice", "dynamic-slice", "gather") and x.operands[0] == name
      ]
      put = [x for x in users if x.op == "dynamic-update-slice" and x.operands[0] == name]
      taken = sum(bytes_of(x.name) for x in cut)
      parts.append(taken if users and len(cut) + len(put) == len(users) else None)
    puts = [x for x in inner if x.op == "dynamic-update-slice"]
    return [*parts, sum(bytes_of(x.operands[1]) for x in puts) if puts else None]

  def cycles(self) -> float:
    """The compiler's estimate of the cycles of everything but Pallas kernels and waiting for collectives."""
    found = lambda name: sum(
      int(i.attribute(r'"estimated_cycles":"(\d+)"') or 0) for i in self.computations[name]
    )
    return float(sum(n * found(name) for name, n in self.runs.items() if name not in self.fused))

  def collectives(self) -> dict[str, tuple[int, int]]:
    """Kind -> (how many run in one call, bytes of their whole arrays together on one device)."""
    found: dict[str, list[int]] = {}
    for name, times in self.runs.items():
      for i in self.computations[name]:
        kind = i.op.removesuffix("-start")
        if kind not in COLLECTIVES or self._continues_another(name):
          continue
        kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
        shapes = i.shapes()
        moved = max(map(size, shapes)) if i.op.endswith("-start") else sum(map(size, shapes))
        entry = found.setdefault(kind, [0, 0])
        entry[0] += times
        entry[1] += times * moved
    return {kind: tuple(found[kind]) for kind in sorted(found)}

  def _continues_another(self, computation: str) -> bool:
    """True for the later parts of an asynchronous collective, which XLA prints again in the fusions that it runs beside."""
    text = " ".join(i.rest for i in self.computations[computation])
    if "AsyncCollectiveStart" in text:
      return False
    return "AsyncCollectiveDone" in text or computation.startswith("async_collective_fusion")

  def largest(self, count: int) -> list[dict]:
    """The largest arrays in the chip's main memory that the program makes: shape, bytes, where in our source."""
    found: dict[tuple[str, str], int] = {}
    for name in self.runs:
      for i in self.computations[name] if name not in self.fused else ():
        if i.op in VIEWS or i.op.endswith(("-done", "-start")):
          continue
        for text in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", i.type):
          shape = Instruction("", text, "", "").shapes()
          if shape and "S(" not in text:
            found[text.split("{")[0], self.source(i)] = size(shape[0])
    top = sorted(found.items(), key=lambda item: -item[1])[:count]
    return [{"array": array, "bytes": n, "source": source} for (array, source), n in top]

  def source(self, instruction: Instruction) -> str:
    """`file:line function` of the innermost frame in this project that made an instruction, or the operation's name."""
    frame = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0)
    while frame:
      location, parent = self._frames[frame]
      if "cm3leon_jax/" in location and "site-packages/" not in location:
        return location[location.rindex("cm3leon_jax/") :]
      frame = parent
    return instruction.attribute(r'op_name="([^"]*)"') or instruction.op

  @functools.cached_property
  def _frames(self) -> dict[int, tuple[str, int]]:
    """Frame -> (`path:line function`, frame that called it)."""
    table = lambda name: _table(self._lines, name)
    number = lambda field, text: int(re.search(rf"{field}=(\d+)", text).group(1))
    files, functions, locations = table("FileNames"), table("FunctionNames"), table("FileLocations")
    frames = {}
    for key, text in table("StackFrames").items():
      at = locations[number("file_location_id", text)]
      file, function = (
        files[number("file_name_id", at)].strip('"'),
        functions[number("function_name_id", at)].strip('"'),
      )
      frames[key] = f"{file}:{number('line', at)} {function}", number("parent_frame_id", text) - 1
    return frames


def _main_bytes(text: str) -> float:
  """Bytes of the arrays of a type that lie in the main memory."""
  found = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", text)
  return float(
    sum(
      size(shape)
      for part in found
      if "S(" not in part
      for shape in Instruction("", part, "", "").shapes()
    )
  )


def _table(lines: list[str], name: str) -> dict[int, str]:
  """A numbered table in the head of the text: `name`, then `1 ...`, `2 ...`, until an empty line."""
  found: dict[int, str] = {}
  if name in lines:
    for line in lines[lines.index(name) + 1 :]:
      if not line.strip():
        break
      key, _, value = line.partition(" ")
      found[int(key)] = value
  return found


def _dot_flops(dot: Instruction, left: tuple[int, ...]) -> float:
  contracted = [
    left[int(d)]
    for d in (dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
    if d
  ]
  return 2.0 * math.prod(dot.shapes()[0][1]) * math.prod(contracted)


def _convolution_flops(
  convolution: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
  """XLA:TPU writes products as convolutions, dimensions of a batch as a window; only pairs that meet are counted."""
  lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest).groups()
  result = convolution.shapes()[0][1]
  total = 2.0 * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")]
  window = lambda name, default: (
    convolution.attribute(rf"window=\{{[^}}]*\b{name}=([\dx_\-]+)") or default
  ).split("x")
  axes = sorted(c for c in lhs if c.isdigit())
  sizes, pads = (
    window("size", "x".join("1" * len(axes))),
    window("pad", "x".join(["0_0"] * len(axes))),
  )
  strides, dilations = (window(n, "x".join("1" * len(axes))) for n in ("stride", "lhs_dilate"))
  for axis, k, pad, stride, dilation in zip(
    axes, map(int, sizes), pads, map(int, strides), map(int, dilations)
  ):
    low, n, places = int(pad.split("_")[0]), left[lhs.index(axis)], result[out.index(axis)]
    at = np.arange(places)[:, None] * stride + np.arange(k)[None] - low
    total *= np.count_nonzero((at >= 0) & (at <= (n - 1) * dilation) & (at % dilation == 0))
  return total
