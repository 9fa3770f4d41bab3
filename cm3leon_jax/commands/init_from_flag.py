"""Defines --init_from, and the flag of runs whose images need another tokenizer."""

from absl import flags

INIT_FROM = flags.DEFINE_string(
  "init_from",
  "",
  "Trained run that a new run starts from: the workdir of another run, a bundle that `cm3leon "
  "export --bundle` wrote, or an installed model (scenes, scenes-instruct, illustrations). For "
  "cm3leon run, the default is config.train.base, and none is no run. train and reinforce "
  "start from its parameters (the moving average, if there is one) with a new optimizer state; "
  "they also accept an export in the format hf or orbax. copy_tokenizers copies its tokenizers and "
  "CLIP.",
)
OWN_IMAGE_TOKENIZER = flags.DEFINE_bool(
  "own_image_tokenizer",
  False,
  "Train an image tokenizer on the images of this run, instead of copying that of --init_from. The "
  "decoder then learns new image codes, and forgets the images of --init_from.",
)
