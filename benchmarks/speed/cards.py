r"""Compiles the config cards in docs/cards/: memory and FLOPs by model size and devices.

  python -m benchmarks.speed.cards                    # compiles missing cards, writes the pages
  python -m benchmarks.speed.cards --size=7b --again  # compiles all cards of a size
  python -m benchmarks.speed.cards --card=7b/v5e-256/train --again
  python -m benchmarks.speed.cards --size=350m --slice=v5e-256 --check
  python -m benchmarks.speed.cards --gpu              # the cards of GPUs instead of TPU slices

A card contains a command of `cm3leon aot_compile` for a config of this package, the numbers that
the command prints, the version of the compiler and the date. Each card is written when it is
finished, so a stopped command continues where it stopped. A card takes one to several minutes on
two CPU cores, and needs no TPU or GPU. XLA's compilers for both cannot share an environment with
`jax[cuda12]` or `jax[tpu]`; that for GPUs is jax-cuda12-plugin and -pjrt (docs/installation.md).

--check compiles cards again and writes nothing to docs/. It compares the memory of arguments and
temporaries, the FLOPs and the collectives with the stored cards. The exit code is 1 if a number
differs, or if a stored card comes from a compiler version other than the installed one. With --gpu
it compiles one program of each size, a train step on one host. A stopped
check continues: workdir/cards_checked.json lists the cards that have already passed, with the
current source files and compiler.
"""

from collections.abc import Iterator
import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks.speed import card_texts
from cm3leon_jax.planning import hardware

PRETRAINED = ("7b", "760m", "350m")
SIZES = (*PRETRAINED, "chameleon_7b", "chameleon_lora")
PROGRAMS = ("train", "evaluate", "decode")
FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "cards"
PACKAGE = pathlib.Path(__file__).parents[2] / "cm3leon_jax"
CHECKED = pathlib.Path(__file__).parents[2] / "workdir" / "cards_checked.json"
KEPT = (
  "arguments_gib", "temporaries_gib", "sum_gib", "peak_gib", "rest_gib", "host_gib", "hbm_gib",
  "flops", "model_flops", "devices", "tokens", "collectives", "compute_seconds",
  "collective_seconds", "weights_gib", "cache_gib",
)  # fmt: skip

_SIZE = flags.DEFINE_enum("size", None, SIZES, "Model size or config of the cards (default: all).")
_CARD = flags.DEFINE_string("card", None, "The only card to compile, e.g. 7b/v5e-256/train.")
_SLICE = flags.DEFINE_string("slice", None, "TPU slice of the cards, e.g. v5e-256 (default: all).")
_GPU = flags.DEFINE_bool("gpu", False, "Take the cards of GPUs, not those of TPU slices.")
_AGAIN = flags.DEFINE_bool("again", False, "Also compile cards that exist.")
_CHECK = flags.DEFINE_bool(
  "check", False, "Compile the stored cards again and compare them; write nothing."
)


@dataclasses.dataclass(frozen=True)
class Slice:
  """Devices for which the program of a card is compiled.

  Attributes:
    topology: value of --topology for `cm3leon aot_compile`.
    slices: number of slices.
    fsdp: sizes of the axes fsdp and fsdp_inner on a slice, which follow the shape of its torus.
    tensor: size of the tensor axis for decoding; the decoder is replicated over other devices. 0:
      there is no card of decoding.
    hosts: number of GPU hosts, over which parameters are replicated as over slices.
  """

  topology: str
  slices: int
  fsdp: tuple[int, int]
  tensor: int = 0
  hosts: int = 1


SLICES = {
  "v5e-256": Slice("v5e-256", 1, (16, 16), 8),
  "v5p-256": Slice("v5p-256", 1, (16, 8), 4),
  "2 x v5e-256": Slice("v5e-256", 2, (16, 16), 8),
  "v6e-256": Slice("v6e-256", 1, (16, 16), 4),
  "tpu7x-256": Slice("tpu7x-256", 1, (16, 16), 4),
}
GPUS = {"h100-8": Slice("h100-8", 1, (8, 1), 8), "h100-64": Slice("h100-64", 1, (8, 1), 8, 8)}
GPUS_7B = {name: Slice(name, 1, (8, 1), 8, 8) for name in ("h200-64", "b200-64")}
CHECKED_GPU = "h100-8/train"
# Sizes of the program "plain", a train step without the Triton kernel. Heads of the 760M have 96
# values, which the kernel does not support.
PLAIN = ("350m",)
SMALL = {"v5e-8": Slice("v5e-8", 1, (2, 4), 8), "h100-1": Slice("h100-1", 1, (1, 1), 1)}
# Slices of the program "adapters" of the 7B.
ADAPTED = {"v5e-16": Slice("v5e-16", 1, (4, 4)), "v5p-8": Slice("v5p-8", 1, (4, 1))}
# Slices of the program "gqa", the decoding of cm3leon_7b:gqa.
GROUPED = ("v5e-256",)
RANK = 16
PLACES = {**SLICES, **ADAPTED, **GPUS, **GPUS_7B, **SMALL}
PROMPTS = 64  # Prompts per decoder replica; each has two guidance streams.
# The same for Chameleon, whose images have 1,024 codes, and the positions of a sample.
CHAMELEON = 4, 4_096


def config_of(size: str) -> str:
  """Returns the name of the config of a model size."""
  return f"cm3leon_{size}" if size in PRETRAINED else size


def prompts_of(size: str) -> int:
  """Returns the number of prompts per decoder replica."""
  return PROMPTS if size in PRETRAINED else CHAMELEON[0]


@dataclasses.dataclass(frozen=True)
class Card:
  """A program compiled for a model size, or another config, and a slice."""

  size: str
  where: str
  program: str

  @property
  def name(self) -> str:
    """Name of the card in the JSON file of its model size."""
    return f"{self.where}/{self.program}"

  @property
  def command(self) -> list[str]:
    """Arguments of `cm3leon aot_compile`."""
    place = PLACES[self.where]
    variant = ":gqa" if self.program == "gqa" else ""
    command = [f"--config={config_of(self.size)}{variant}", f"--topology={place.topology}"]
    if place.slices > 1:
      command.append(f"--slices={place.slices}")
    if self.compiled == "decode":
      devices = place.slices * place.hosts * place.fsdp[0] * place.fsdp[1]
      # Without a GPU, XLA finds no tiles for 2 heads of 96, so 4 GPUs share the 760M.
      tensor = 4 if self.gpu and self.size == "760m" else place.tensor
      replicas = devices // tensor
      axes = {"data": replicas, "fsdp": 1, "tensor": tensor}
      command.append(f"--decode_batch={prompts_of(self.size) * replicas}")
      if self.size not in PRETRAINED:
        command.append(f"--decode_positions={CHAMELEON[1]}")
    else:
      replicas = place.slices * place.hosts
      axes = {"data": replicas, "fsdp": place.fsdp[0], "fsdp_inner": place.fsdp[1]}
    command += [f"--config.mesh.{axis}={n}" for axis, n in axes.items()]
    if self.size == "chameleon_7b" and self.compiled != "decode":
      command.append("--config.train.rows_per_device=4")  # The config is not for training.
    if self.program == "adapters":
      command += [f"--config.adapter.rank={RANK}", "--batch_per_device=1"]
    if self.program == "plain":
      command.append("--config.model.attention=plain")
    if self.program == "muon":
      command.append("--config.optimizer.name=muon")
    return [*command, f"--program={self.compiled}"]

  @property
  def compiled(self) -> str:
    """Program of `cm3leon aot_compile`."""
    other = {"adapters": "train", "plain": "train", "muon": "train", "gqa": "decode"}
    return other.get(self.program, self.program)

  @property
  def gpu(self) -> bool:
    """Whether the devices are GPUs."""
    return hardware.load(PLACES[self.where].topology).platform == "gpu"

  @property
  def compiler(self) -> str:
    """Versions of the installed packages that affect the numbers of the card."""
    cuda = 13 if importlib.util.find_spec("jax_cuda13_plugin") else 12
    names = (f"jax-cuda{cuda}-pjrt" if self.gpu else "libtpu", "jax")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


# The compiler compiles this program, but cannot print it (libtpu 0.0.52, jax 0.10.2).
NOT_PRINTED = {("350m", "tpu7x-256", "decode")}
CARDS = [
  Card(size, where, program)
  for where in SLICES
  for size in PRETRAINED
  for program in PROGRAMS
  if (size, where, program) not in NOT_PRINTED
] + [
  Card("7b", where, program)
  for program, slices in (("adapters", ADAPTED), ("gqa", GROUPED))
  for where in slices
]
CARDS += [Card(size, where, name) for where in GPUS for size in PRETRAINED for name in PROGRAMS]
CARDS += [Card("7b", where, name) for where in GPUS_7B for name in PROGRAMS]
CARDS += [Card(size, "h100-8", "plain") for size in PLAIN]
CARDS += [Card("350m", "v5e-256", "muon")]
CARDS += [Card("chameleon_7b", "v5e-256", name) for name in ("train", "evaluate")]
CARDS += [Card("chameleon_7b", where, "decode") for where in SMALL]
CARDS += [
  Card("chameleon_lora", where, name)
  for where in (*SMALL, "h100-8")
  for name in ("train", "evaluate")
]


def measure(card: Card) -> dict:
  """Compiles a card's program; if the command fails, prints the error and exits."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "report.json"
    command = [sys.executable, "-m", "launch.aot_compile", *card.command, f"--json={path}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
      sys.exit(f"{' '.join(command)}:\n{result.stderr[-1_000:]}")
    reports = json.loads(path.read_text())
  report = reports[card.compiled]
  numbers = {key: report[key] for key in KEPT if key in report}
  if card.compiled == "decode":
    numbers["prefill_peak_gib"] = reports["prefill"]["peak_gib"]
  date = datetime.datetime.now(datetime.UTC).date().isoformat()
  return {"command": " ".join(card.command), "compiler": card.compiler, "date": date, **numbers}


def stored(size: str) -> dict[str, dict]:
  """Returns the stored cards of a model size: name of a card -> its numbers."""
  path = FOLDER / f"{config_of(size)}.json"
  return json.loads(path.read_text()) if path.exists() else {}


def write(size: str, cards: dict[str, dict]) -> None:
  """Writes the cards of a model size and their page."""
  FOLDER.mkdir(parents=True, exist_ok=True)
  named = {
    card.name: cards[card.name] for card in CARDS if card.size == size and card.name in cards
  }
  (FOLDER / f"{config_of(size)}.json").write_text(json.dumps(named, indent=1) + "\n")
  (FOLDER / f"{config_of(size)}.md").write_text(page(size, named))


def page(size: str, cards: dict[str, dict]) -> str:
  """Returns the page of a model size as Markdown."""
  positions = 1_152 if size in PRETRAINED else CHAMELEON[1]
  fields = {"config": config_of(size), "prompts": prompts_of(size), "positions": positions}
  parts = [card_texts.HEADER.format(**fields)]
  if any(card.size == size and card.program == "adapters" for card in CARDS):
    parts += [card_texts.ADAPTERS.format(rank=RANK), card_texts.SHARED]
  if any(card.size == size and card.program == "muon" for card in CARDS):
    parts.append(card_texts.MUON)
  of_gpus = {card.name for card in CARDS if card.gpu}
  for header, there in (("", cards.keys() - of_gpus), (card_texts.OF_GPUS, cards.keys() & of_gpus)):
    if there:
      parts += [
        header,
        card_texts.WITHOUT_KERNEL if header and size in PRETRAINED else "",
        card_texts.TABLE,
        *(_row(name, cards[name]) for name in cards if name in there),
      ]
  if cards:
    parts.append(
      card_texts.COMMANDS.format(commands="\n".join(c["command"] for c in cards.values()))
    )
  missing = [c.name for c in CARDS if c.size == size and c.name not in cards]
  if missing:
    parts += ["\nNot made yet:\n\n", *(f"- {name}\n" for name in missing)]
  return "".join(parts)


def _row(name: str, card: dict) -> str:
  where, program = name.split("/")
  return f"| {where} | {program} | {' | '.join(_cells(card))} |\n"


def _cells(card: dict) -> Iterator[str]:
  arrays = f"{card['arguments_gib']:.2f} + {card['temporaries_gib']:.2f}"
  memory = f"{arrays} = **{card['sum_gib']:.2f}** of {card['hbm_gib']:.2f}"
  if "rest_gib" in card:
    memory += f"; with the rest of the state {card['sum_gib'] + card['rest_gib']:.2f}"
  if "prefill_peak_gib" in card:
    memory += f"; prefill, at its peak, {card['prefill_peak_gib']:.2f}"
  if "cache_gib" in card:
    memory += f"; of weights {card['weights_gib']:.2f}, of the cache {card['cache_gib']:.2f}"
  yield memory
  flops = f"{card['flops']:.3e}"
  if "model_flops" in card:
    flops += f", {card['flops'] * card['devices'] / card['model_flops']:.3f} x model"
  yield flops
  yield "; ".join(
    f"{kind} {c['count']:,}, {c['bytes'] / 2**30:.2f}" for kind, c in card["collectives"].items()
  )
  yield f"{card['compiler']}; {card['date']}"


def drift(old: dict, new: dict) -> dict[str, float]:
  """Returns name of a number -> relative change, for each number of a card that changed."""
  before, after = (
    {
      **{name: card[name] for name in ("arguments_gib", "temporaries_gib", "flops")},
      **{f"{kind}, {n}": v for kind, c in card["collectives"].items() for n, v in c.items()},
    }
    for card in (old, new)
  )
  changes = {}
  for name in before.keys() | after.keys():
    a, b = before.get(name, 0.0), after.get(name, 0.0)
    if a != b:
      changes[name] = abs(b - a) / max(abs(a), abs(b))
  return changes


def source_digest() -> str:
  """Returns a digest of the package's source files and this file."""
  digest = hashlib.sha256(pathlib.Path(__file__).read_bytes())
  for path in sorted(PACKAGE.rglob("*.py")):
    digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
  return digest.hexdigest()


def check(cards: list[Card], checked: pathlib.Path = CHECKED) -> list[str]:
  """Compiles cards again. Prints and returns a sentence for each card that changed.

  Args:
    cards: cards to check; a card that is not stored is skipped.
    checked: file that lists the cards that have passed, with the source digest and the compiler.
  """
  digest = source_digest()
  noted = json.loads(checked.read_text()) if checked.exists() else {}
  wrong = []
  for card in cards:
    name, old = f"{card.size}/{card.name}", stored(card.size).get(card.name)
    if old is None:
      print(f"{name}: not stored", flush=True)
      continue
    key = f"{digest}, {card.compiler}"
    if noted.get(name) == key:
      print(f"{name}: as stored (checked before)", flush=True)
      continue
    if sentence := _wrong(card, old):
      wrong.append(f"{name} {sentence}")
      print(wrong[-1], flush=True)
      continue
    print(f"{name}: as stored", flush=True)
    noted[name] = key
    checked.parent.mkdir(parents=True, exist_ok=True)
    checked.write_text(json.dumps(noted, indent=1))
  return wrong


def _wrong(card: Card, old: dict) -> str:
  """Describes how a card differs from the stored card; "" if they match."""
  if old["command"] != " ".join(card.command):
    return f"was compiled by another command: {old['command']}."
  if old["compiler"] != card.compiler:
    return f"was compiled by {old['compiler']}, and {card.compiler} is installed."
  changes = sorted(drift(old, measure(card)).items())
  found = ", ".join(f"{number} by {change:.2%}" for number, change in changes)
  return f"differs: {found}." if changes else ""


def chosen() -> list[Card]:
  """Returns the cards that the flags select. Raises app.UsageError for an unknown name."""
  names = [f"{card.size}/{card.name}" for card in CARDS]
  if _CARD.value not in (None, *names):
    raise app.UsageError(f"--card is '{_CARD.value}'; it must be one of {', '.join(names)}.")
  if _SLICE.value not in (None, *PLACES):
    raise app.UsageError(f"--slice is '{_SLICE.value}'; it must be one of {', '.join(PLACES)}.")
  return [
    card
    for card, name in zip(CARDS, names)
    if (_CARD.value or _SLICE.value or card.gpu == _GPU.value)
    and not (_GPU.value and _CHECK.value and card.name != CHECKED_GPU)
    and _SIZE.value in (None, card.size)
    and _SLICE.value in (None, card.where)
    and _CARD.value in (None, name)
  ]


def main(_) -> None:
  if _CHECK.value:
    wrong = check(chosen())
    sys.exit(1 if wrong else 0)
  for card in chosen():
    cards = stored(card.size)
    if card.name not in cards or _AGAIN.value:
      cards[card.name] = measure(card)
      print(f"{card.size}/{card.name}: {cards[card.name]['sum_gib']:.2f} GiB", flush=True)
      write(card.size, cards)
  for size in SIZES:
    write(size, stored(size))


if __name__ == "__main__":
  app.run(main)
