"""Lists mutants of the exports."""

from tests.mutant_lists.mutant import mutants_of

STABLEHLO = "tests/export/stablehlo_test.py"
FUNCTIONS = "tests/export/serving_functions_test.py"
EXPORT = mutants_of(
  "cm3leon_jax/export/stablehlo.py",
  f"{STABLEHLO}::test_images_and_texts_served_by_jax_alone_are_those_of_the_generator",
  (
    "stablehlo_head_with_text_first",
    "np.roll(params.read(table), vocab.image_size, axis=0).T",
    "params.read(table).T",
  ),
  "cm3leon_jax/export/serving_functions.py",
  f"{FUNCTIONS}::test_aligned_int8_decoders_with_neighbors_draw_as_the_generator",
  ("stablehlo_guided_by_itself", "[prompts, unconditional], plan", "[prompts, prompts], plan"),
  (
    "stablehlo_constant_guidance",
    "guidance[:, None] * share + (1 - share)",
    "guidance[:, None] + 0 * share",
  ),
  f"{FUNCTIONS}::test_positions_are_those_of_training",
  ("stablehlo_padding_counts", "jnp.where(valid, at - first, 0)", "jnp.where(valid, at, 0)"),
  "cm3leon_jax/export/served/artifacts.py",
  "tests/export/served_test.py",
  (
    "stablehlo_changed_files_are_read",
    'if hashlib.sha256(data).hexdigest() != ABOUT["digests"][name]:',
    "if not data:",
  ),
  "cm3leon_jax/export/bundle.py",
  "tests/export/bundle_test.py::test_a_refused_bundle_leaves_what_is_there",
  ("bundle_over_a_run", "stages.DONE).exists() for", "stages.DONE).is_dir() for"),
  "cm3leon_jax/export/orbax_checkpoint.py",
  "tests/export/orbax_checkpoint_test.py::test_nothing_is_compressed",
  ("orbax_compressed", '{"compressor": None}', '{"compressor": {"id": "zstd", "level": 1}}'),
  "cm3leon_jax/data/documents/training_data.py",
  ("license_of_a_base_forgotten", 'locate(start["source"])', "folder"),
  "cm3leon_jax/runs/stages.py",
  "tests/commands/export_test.py"
  "::test_another_config_or_no_workdir_is_refused_without_advice_to_delete",
  ("advice_to_delete_a_run_that_is_read", 'remedy="give the --config', 'remedy="delete, give the'),
)
