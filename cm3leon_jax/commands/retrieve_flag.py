"""Flag of the commands that put retrieved documents before a prompt or a document."""

from absl import flags

RETRIEVE = flags.DEFINE_list(
  "retrieve",
  None,
  "Number of retrieved documents; generate takes several, e.g. 0,2 (default of generate: 0 and "
  "config.data.num_neighbors; with --prompt only the latter for text_to_image, 0 for other tasks; "
  "default of score: 0).",
)
