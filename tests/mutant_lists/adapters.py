"""Lists mutants of adapters: their sum, their training, their files and their base."""

from tests.mutant_lists.mutant import mutants_of

MODEL_TEST = "tests/models/adapters_test.py"
STEP_TEST = "tests/training/step/adapter_step_test.py"
RUN_TEST = "tests/training/adapter_run_test.py"
COMMANDS_TEST = "tests/commands/adapters_test.py"
PEFT_TEST = "tests/export/peft_adapter_test.py"

ADAPTERS = mutants_of(
  "cm3leon_jax/models/adapters.py",
  f"{MODEL_TEST}::test_the_sum_is_that_of_plain_matrices",
  ("alpha_is_not_divided_by_the_rank", "alpha / a.shape[-1] * b", "alpha * b"),
  ("keys_get_the_adapter_of_values", 'zip("qkv", parts)', 'zip("qvk", parts)'),
  f"{MODEL_TEST}::test_new_adapters_change_no_bit",
  (
    "adapters_have_the_scale_of_their_output",
    "math.sqrt(math.prod(shape))",
    "math.sqrt(config.rank)",
  ),
  f"{MODEL_TEST}::test_parameters_are_counted_on_each_device",
  ("parts_of_adapters_are_not_counted", "found //= math.prod(", "found //= 1 or math.prod("),
  f"{MODEL_TEST}::test_rows_are_added_at_their_ids_and_nowhere_else",
  ("rows_have_the_order_of_their_ids", "sources[list(ids)]", "sources[sorted(ids)]"),
  (
    "other_rows_change",
    "np.full(len(table), len(ids), np.int32)",
    "np.zeros(len(table), np.int32)",
  ),
  "cm3leon_jax/models/config.py",
  f"{COMMANDS_TEST}::test_bad_starts_are_refused_before_a_step_is_compiled",
  ("a_row_is_trained_twice", "if len(set(found)) < len(found):", "if len(found) < 0:"),
  ("ranges_leave_the_vocabulary", "start < end <= vocab_size", "start < end"),
  "cm3leon_jax/models/transformer.py",
  f"{MODEL_TEST}::test_adapters_equal_merged_matrices",
  ("adapters_are_left_out", "return y + jnp.einsum(outof", "return y - jnp.einsum(outof"),
  ("layers_share_no_adapters", "attend, factors), None", "attend, None), None"),
  "cm3leon_jax/training/step/state.py",
  f"{STEP_TEST}::test_gradients_are_those_of_plain_jax",
  (
    "training_ignores_alpha",
    "adapters.scaled(params, adapter.alpha)",
    "adapters.scaled(params, 1.0)",
  ),
  ("training_ignores_rows", "base = adapters.add_rows(base, params, adapter)", "base = dict(base)"),
  ("output_rows_have_no_gradient", "z_loss, added, bool(adapter.tokens))", "z_loss, added)"),
  "cm3leon_jax/training/step/loss.py",
  f"{STEP_TEST}::test_a_frozen_table_has_no_gradient_in_the_program",
  (
    "a_frozen_table_has_a_gradient",
    "if gradients and not frozen else None",
    "if gradients else None",
  ),
  "cm3leon_jax/training/step/optimizer.py",
  f"{STEP_TEST}::test_only_adapters_are_in_the_state_and_the_loss_falls",
  ("muon_leaves_adapters_to_adam", 'if name in ("a", "b") else', "if not name else"),
  "cm3leon_jax/training/decoder.py",
  f"{RUN_TEST}::test_grids_of_samples_get_the_sum_of_the_base_and_the_averaged_adapters",
  ("grids_show_the_base", "return draw(merge(base, params), step)", "return draw(base, step)"),
  "cm3leon_jax/trained/initial.py",
  f"{COMMANDS_TEST}::test_adapters_are_added_to_their_base_and_to_no_other",
  (
    "adapters_fit_every_base",
    "if (given.step, given.digest) != (found.base.step, found.base.digest):",
    "if given.step != found.base.step:",
  ),
  f"{COMMANDS_TEST}::test_a_base_that_is_absent_or_has_changed_is_refused",
  ("a_changed_base_is_loaded", "  if not same:", "  if not same and found.base.step is None:"),
  f"{COMMANDS_TEST}::test_bad_starts_are_refused_before_a_step_is_compiled",
  ("adapters_of_random_parameters", "if tunes and not source:", "if tunes and source is None:"),
  "cm3leon_jax/trained/run.py",
  f"{COMMANDS_TEST}::test_the_loaded_sum_is_that_of_the_merged_export_to_the_bit",
  ("exports_of_the_last_adapters", "run.params(found.step, average is not False)", "run.params(2)"),
  "cm3leon_jax/weights/adapter_tensors.py",
  f"{PEFT_TEST}::test_the_adapters_are_read_as_they_were_written",
  (
    "loaded_factors_are_not_transposed",
    "tensor(theirs, shape).T.reshape(shape)",
    "tensor(theirs, shape).reshape(shape)",
  ),
  f"{PEFT_TEST}::test_peft_reads_the_sums_of_rows",
  ("peft_gets_differences", 'source = f"{SUMS}.{name}"', "source = name"),
  f"{PEFT_TEST}::test_damaged_adapters_are_refused",
  ("adapters_with_nans_are_loaded", "if bad := not_finite(found):", "if bad := not_finite({}):"),
)
