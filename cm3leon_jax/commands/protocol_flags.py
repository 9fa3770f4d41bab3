"""Defines the flags of commands that measure with protocols."""

from absl import flags

PROTOCOL = flags.DEFINE_string(
  "protocol", None, "Measure with a protocol: its name, or a YAML file (docs/evaluation.md)."
)
METRICS = flags.DEFINE_list("metrics", [], "Metrics that replace the protocol's metrics.")
EXAMPLES = flags.DEFINE_integer(
  "examples",
  None,
  "Number of examples that replaces the protocol's number; 0: all. Only evaluations with the same "
  "number of examples can be compared.",
  lower_bound=0,
)
DATA = flags.DEFINE_string(
  "data", None, "Folder of the evaluation files and images that the protocol reads."
)
EXTRACTOR = flags.DEFINE_string(
  "extractor",
  None,
  "Weights of the network whose features the distances compare: a safetensors file of "
  "Inception-v3, or a Hugging Face folder of DINOv2 or CLIP.",
)
CLIP = flags.DEFINE_string(
  "clip", None, "Folder of a Hugging Face CLIP that scores images; default: the CLIP of the run."
)
BEFORE = flags.DEFINE_bool(
  "before",
  False,
  "Measure the parameters before tuning, which the run started from with --init_from.",
)
OPTIONS = (METRICS, EXAMPLES, DATA, EXTRACTOR, CLIP, BEFORE)
