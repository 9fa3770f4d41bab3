"""Flags of the commands that generate for prompts of a file."""

from absl import flags

PROMPTS = flags.DEFINE_string(
  "prompts", None, "A file with one JSON object per line: see docs/generating.md."
)
SAMPLES = flags.DEFINE_integer(
  "samples", 1, "Samples of each prompt; an export for GenEval has 4.", lower_bound=1
)
