"""Contains one absl app per command: `cm3leon NAME`, or `python -m launch.NAME` in a checkout."""

# The names are in the order in which a run uses the commands.
COMMANDS = (
  "run",
  "prepare_data",
  "train_text_tokenizer",
  "train_vqgan",
  "import_vqgan",
  "copy_tokenizers",
  "import_weights",
  "encode_documents",
  "encode_instructions",
  "train_clip",
  "build_neighbors",
  "inspect_data",
  "train",
  "checkpoints",
  "generate",
  "evaluate",
  "measure_forgetting",
  "score",
  "export",
  "serve",
  "reinforce",
  "report",
  "plan",
  "aot_compile",
)
