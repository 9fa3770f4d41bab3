"""Flags of the commands that measure by protocols."""

from absl import flags

PROTOCOL = flags.DEFINE_string(
  "protocol", None, "Measure by a protocol: its name, or a YAML file (docs/protocols.md)."
)
METRICS = flags.DEFINE_list("metrics", [], "Metrics to measure instead of those of the protocol.")
EXAMPLES = flags.DEFINE_integer(
  "examples",
  None,
  "Number of examples instead of that of the protocol; 0: all. Only evaluations of the same number "
  "can be compared.",
  lower_bound=0,
)
DATA = flags.DEFINE_string(
  "data", None, "Folder of the evaluation files and images that the protocol reads."
)
EXTRACTOR = flags.DEFINE_string(
  "extractor",
  None,
  "Weights of the network whose features distances compare: a safetensors file of Inception-v3, or "
  "a Hugging Face folder of DINOv2 or CLIP.",
)
CLIP = flags.DEFINE_string(
  "clip", None, "Folder of the Hugging Face CLIP that scores images; default: the run's."
)
BEFORE = flags.DEFINE_bool(
  "before",
  False,
  "Measure the parameters that the run began from by --init_from, not its own: before tuning.",
)
COMPARE = flags.DEFINE_list(
  "compare", [], "Print the differences between two folders of evaluations: A,B."
)
