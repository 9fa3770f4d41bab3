"""Defines the flags of commands that generate samples for the prompts in a file."""

from absl import flags

PROMPTS = flags.DEFINE_string(
  "prompts", None, "JSONL file with one prompt per line, see docs/generating.md."
)
SAMPLES = flags.DEFINE_integer("samples", 1, "Samples per prompt.", lower_bound=1)
