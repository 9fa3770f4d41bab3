"""Lists mutants of the import of weights, including reading onto a mesh."""

from tests.mutant_lists.mutant import mutants_of

QWEN3 = "cm3leon_jax/importing/qwen3.py"
PLACED, WEIGHTS = "cm3leon_jax/weights/placed.py", "cm3leon_jax/trained/initial.py"
IMPORTER_TEST = "tests/importing/importer_test.py"
REFUSALS_TEST, TRAINING_TEST = (
  "tests/importing/refusals_test.py",
  "tests/importing/training_test.py",
)

IMPORTING = mutants_of(
  QWEN3,
  f"{IMPORTER_TEST}::test_a_qwen3_has_the_loss_of_the_original",
  (
    "heads_in_another_order",
    "np.repeat(by_head, times, axis=0)",
    "np.tile(by_head, (times, 1, 1))",
  ),
  PLACED,
  f"{IMPORTER_TEST}::test_an_export_of_this_project_is_imported_bit_for_bit",
  (
    "positions_two_rows_early",
    "slice(rows.start + first, rows.stop",
    "slice(rows.start, rows.stop - 2",
  ),
  (
    "every_device_reads_the_first_heads",
    "slice(part.start * head_size, part.stop * head_size)",
    "slice(0, (part.stop - part.start) * head_size)",
  ),
  QWEN3,
  f"{IMPORTER_TEST}::test_new_rows_are_the_mean_and_the_end_of_text",
  ("new_rows_are_the_sum", "table.mean(0, ", "table.sum(0, "),
  QWEN3,
  f"{REFUSALS_TEST}::test_a_qwen3_that_is_not_ours_is_refused",
  ("one_zero_is_enough", ".max(initial=0.0)", ".min(initial=0.0)"),
  "cm3leon_jax/importing/tokenizer.py",
  "tests/importing/tokenizer_test.py::test_special_tokens_in_data_are_plain_text",
  ("added_tokens_are_found_in_texts", '"special": True', '"special": i < vocab.num_special'),
  WEIGHTS,
  f"{TRAINING_TEST}::test_a_run_begins_with_what_was_imported_and_remembers_it",
  ("an_import_is_forgotten", "source = source or _imported(epath.Path(workdir))", "pass"),
)
