"""Defines --init_from for the commands that start from a trained run."""

from absl import flags

INIT_FROM = flags.DEFINE_string(
  "init_from",
  "",
  "Trained run that a new run starts from: the workdir of another run, a folder that `cm3leon "
  "export` wrote, or an installed model (scenes, scenes-instruct). train and reinforce start from "
  "its parameters (the moving average, if there is one) with a new optimizer state. "
  "copy_tokenizers copies its tokenizers and CLIP.",
)
