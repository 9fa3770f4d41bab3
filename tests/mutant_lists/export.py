"""Mutants of the exports."""

from tests.mutant_lists.mutant import mutants_of

STABLEHLO = "tests/export/stablehlo_test.py"
FUNCTIONS = "tests/export/serving_functions_test.py"
EXPORT = (
  *mutants_of(
    "cm3leon_jax/export/stablehlo.py",
    STABLEHLO,
    (
      "stablehlo_half_with_a_manifest",
      "(folder / MANIFEST).unlink(missing_ok=True)",
      "(folder / MANIFEST).exists()",
    ),
    ("stablehlo_names_folders", "jax.config.update(name, 0)", "jax.config.update(name, 100)"),
    (
      "stablehlo_head_with_text_first",
      "np.roll(params.read(table), vocab.image_size, axis=0).T",
      "params.read(table).T",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/export/serving_functions.py",
    f"{FUNCTIONS}::test_aligned_int8_decoders_with_neighbors_draw_as_the_generator",
    ("stablehlo_guided_by_itself", "[prompts, unconditional], plan", "[prompts, prompts], plan"),
    (
      "stablehlo_image_after_text",
      "jnp.where(codes, self.vocab.text_size, self.vocab.unk)",
      "jnp.where(codes, self.vocab.unk, self.vocab.unk)",
    ),
    (
      "stablehlo_constant_guidance",
      "guidance[:, None] * share + (1 - share)",
      "guidance[:, None] + 0 * share",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/export/serving_functions.py",
    f"{FUNCTIONS}::test_positions_are_those_of_training",
    ("stablehlo_padding_counts", "jnp.where(valid, at - first, 0)", "jnp.where(valid, at, 0)"),
    (
      "stablehlo_text_starts_anew",
      "begins & ((code < next_begin) | (at == first))",
      "begins",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/export/served/artifacts.py",
    STABLEHLO,
    ("stablehlo_captions_with_special_tokens", "special_tokens = True", "special_tokens = False"),
  ),
  *mutants_of(
    "cm3leon_jax/export/served/artifacts.py",
    "tests/export/served_test.py",
    (
      "stablehlo_changed_files_are_read",
      'if hashlib.sha256(data).hexdigest() != ABOUT["digests"][name]:',
      "if not data:",
    ),
    ("stablehlo_old_conventions", "if not oldest <= version", "if not 0 <= version"),
    ("stablehlo_new_conventions", "version <= newest:", "version <= 99:"),
    ("stablehlo_programs_unread", "    artifact.mlir_module()", "    artifact.platforms  "),
    ("stablehlo_any_id", "< i < ids)", "< i < 2 * ids)"),
    ("stablehlo_ids_by_their_look", "if not flags.ids:", "if not flags.caption[0].isdigit():"),
    ("stablehlo_refusals_succeed", "sys.exit(2)", "sys.exit(0)"),
  ),
  *mutants_of(
    "cm3leon_jax/export/served/serve_example.py",
    STABLEHLO,
    ("stablehlo_text_without_image", "BREAK, *image, EOS", "BREAK, EOS"),
  ),
  *mutants_of(
    "cm3leon_jax/export/bundle.py",
    "tests/export/bundle_test.py::test_a_refused_bundle_leaves_what_is_there",
    ("bundle_over_a_run", "stages.DONE).exists() for", "stages.DONE).is_dir() for"),
    ("bundle_removed_before_a_refusal", "  huggingface.check(settings.model)\n", ""),
  ),
  *mutants_of(
    "cm3leon_jax/export/orbax_checkpoint.py",
    "tests/export/orbax_checkpoint_test.py::test_nothing_is_compressed",
    ("orbax_compressed", '{"compressor": None}', '{"compressor": {"id": "zstd", "level": 1}}'),
  ),
  *mutants_of(
    "cm3leon_jax/data/documents/training_data.py",
    "tests/data/documents/training_data_test.py",
    ("license_of_a_base_forgotten", 'locate(start["source"])', "folder"),
    ("known_data_as_unknown", '"known": bool(found)', '"known": False'),
    ("files_of_instructions_unnamed", "  if not root:", "  if True:"),
  ),
  *mutants_of(
    "cm3leon_jax/runs/stages.py",
    "tests/commands/export_test.py"
    "::test_another_config_or_no_workdir_is_refused_without_advice_to_delete",
    (
      "advice_to_delete_a_run_that_is_read",
      'remedy="give the --config',
      'remedy="delete, give the',
    ),
    ("a_missing_workdir_is_a_missing_stage", 'if "train" in names and', 'if "" in names and'),
  ),
)
