"""Defines --init_from of the commands that start from a trained run."""

from absl import flags

INIT_FROM = flags.DEFINE_string(
  "init_from",
  "",
  "Trained run that a new run starts from: the workdir of another run, a folder that launch.export "
  "wrote, or an installed model: scenes, scenes-instruct. launch.train and launch.reinforce start "
  "from its parameters (the average, if it has one) with a new optimizer; launch.copy_tokenizers "
  "copies tokenizers and CLIP.",
)
