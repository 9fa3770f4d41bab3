"""Defines --retrieve for commands that place retrieved documents before a prompt or document."""

from absl import flags

RETRIEVE = flags.DEFINE_list(
  "retrieve",
  None,
  "Number of retrieved documents. score takes one number (default: 0). generate takes several, "
  "e.g. 0,2. Its default for held-out captions is 0 and config.data.num_neighbors; for a prompt it "
  "is config.data.num_neighbors in text_to_image, and 0 in other tasks.",
)
