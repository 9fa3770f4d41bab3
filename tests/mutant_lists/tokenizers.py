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
)
