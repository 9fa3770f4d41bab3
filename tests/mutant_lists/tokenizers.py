"""Lists mutants of the image tokenizers and their training."""

from tests.mutant_lists.mutant import mutants_of

VQGAN_TEST = "tests/training/small/vqgan_training_test.py"
PUBLISHED_FILES_TEST = "tests/tokenizers/published_files_test.py"
NETWORK, NETWORK_TEST = "cm3leon_jax/tokenizers/vqgan.py", "tests/tokenizers/vqgan_test.py"

TOKENIZERS = mutants_of(
  "cm3leon_jax/tokenizers/published.py",
  "tests/tokenizers/published_test.py::test_codes_and_pixels_equal_torch",
  ("stride_from_the_other_side", "padding=((0, 1), (0, 1))", "padding=((1, 0), (1, 0))"),
  "cm3leon_jax/tokenizers/published_source.py",
  f"{PUBLISHED_FILES_TEST}::test_a_pickle_is_never_opened",
  ("a_pickle_by_another_name_is_read", "or not is_pickle", "or True"),
  "cm3leon_jax/tokenizers/published_files.py",
  f"{PUBLISHED_FILES_TEST}::test_the_grid_and_the_codebook_must_be_those_of_the_config",
  ("another_codebook", "if tokenizer.num_codes != num_codes:", "if False:"),
  "cm3leon_jax/commands/train_vqgan.py",
  "tests/commands/import_vqgan_test.py::test_a_tokenizer_is_imported_once",
  ("an_imported_tokenizer_is_trained", 'if stages.is_given(workdir, "vqgan"):', "if False:"),
  NETWORK,
  f"{NETWORK_TEST}::test_a_local_code_depends_on_its_own_square_alone",
  ("local_codes_see_the_image", "axes = 3 if local else (1, 2, 3)", "axes = (1, 2, 3)"),
  "cm3leon_jax/tokenizers/quantizers.py",
  f"{VQGAN_TEST}::test_generator_loss_is_the_oracle",
  ("codebook_gradient_stopped", "_squared(q - stop(z))", "_squared(stop(q) - stop(z))"),
  "cm3leon_jax/tokenizers/losses.py",
  f"{VQGAN_TEST}::test_adversarial_step",
  (
    "adversarial_sign",
    "loss += config.adversarial_weight * adaptive",
    "loss -= config.adversarial_weight * adaptive",
  ),
  "cm3leon_jax/training/small/vqgan_training.py",
  "tests/training/small/vqgan_watch_test.py::test_the_tokenizer_is_the_average_of_the_parameters",
  ("last_parameters_saved", 'state.get("ema", state["params"])', 'state["params"]'),
  "cm3leon_jax/tokenizers/losses.py",
  "tests/tokenizers/losses_test.py::test_multiscale_loss_literals",
  (
    "pixels_left_out",
    "error.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))",
    "error[:, ::2, ::2]",
  ),
  "cm3leon_jax/tokenizers/perceptual.py",
  "tests/tokenizers/perceptual_test.py::test_the_distance_is_that_of_torch",
  ("features_not_normalized", "(_unit(features) for features in pair)", "pair"),
  "cm3leon_jax/tokenizers/ink.py",
  ("ink_of_the_brightest_channel", "-x.min(-1, keepdims=True)", "-x.max(-1, keepdims=True)"),
  ("white_mixed_into_the_color", "ink - (1 - x) / 2, ink]", "ink * (1 + x) / 2, ink]"),
  "cm3leon_jax/tokenizers/quantizers.py",
  (
    "shapes_and_colors_swapped",
    "jnp.repeat(shapes, len(colors), 0), jnp.tile(",
    "jnp.tile(shapes, (len(colors), 1)), jnp.tile(",
  ),
  ("used_shapes_restart", "(used.sum(1), new", "(used.min(1), new"),
  "cm3leon_jax/models/shape_color.py",
  ("colors_with_the_mean_of_the_codes", "colored - colored.mean(0, keepdims=True)", "colored"),
  (
    "gradient_of_a_mean",
    "codes.sum(1), codes.sum(0))",
    "codes.mean(1), codes.mean(0))",
  ),
  "cm3leon_jax/models/transformer.py",
  "tests/models/shape_color_test.py::test_the_start_is_a_sum_with_the_variance_of_other_codes",
  ("start_without_sums", "if colors := config.code_colors:", "if colors := 0:"),
  "cm3leon_jax/training/steps.py",
  "tests/training/shape_color_run_test.py",
  ("rows_trained_one_by_one", "0 if adapter.rank else model.code_colors", "0"),
  "cm3leon_jax/training/step/grpo.py",
  "tests/training/step/grpo_test.py::test_a_step_whose_groups_teach_nothing_leaves_the_parameters_unchanged",
  ("noise_becomes_an_update", "jnp.any(rollout.advantages != 0)", "jnp.bool_(True)"),
)
