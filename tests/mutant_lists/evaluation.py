"""Mutants of evaluation, reports, configs and stages."""

from tests.mutant_lists.mutant import mutants_of

EVALUATION = (
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/moments.py",
    "tests/evaluation/metrics/moments_test.py",
    ("moments_forget_the_shift", "(self.count * count / total)", "0.0"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/frechet_interval.py",
    "tests/evaluation/metrics/frechet_interval_test.py",
    ("frechet_bias_not_corrected", "[tail, 1 - tail]) - bias", "[tail, 1 - tail])"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/kernel_distance.py",
    "tests/evaluation/metrics/kernel_distance_test.py",
    ("kernel_of_a_row_with_itself_counts", "np.fill_diagonal(own, 0.0)", "pass"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/precision_recall.py",
    "tests/evaluation/metrics/precision_recall_test.py",
    ("rows_are_their_own_neighbors", "np.fill_diagonal(distances, np.inf)", "pass"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/code_histograms.py",
    "tests/evaluation/metrics/code_histograms_test.py",
    ("divergence_in_nats", "float(nats / np.log(2))", "float(nats)"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/likelihood/bits.py",
    "tests/evaluation/likelihood/bits_test.py::test_intervals_are_over_the_concepts_of_the_documents",
    (
      "intervals_of_independent_documents",
      'str(store.concepts[j] or f"document {j}")',
      'f"document {j}"',
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/likelihood/document_scores.py",
    "tests/evaluation/likelihood/document_scores_test.py",
    ("neighbors_count_as_special_tokens", " & (np.arange(len(log_probs))[::-1] < targets)", ""),
    (
      "documents_are_their_own_neighbors",
      "[group_id(documents[i].key) for i in pairs]",
      "[0 for _ in pairs]",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/likelihood/given_documents.py",
    "tests/evaluation/likelihood/given_documents_test.py",
    (
      "separators_take_no_position",
      "len(self.layout.encode(text)) + 1",
      "len(self.layout.encode(text))",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/intervals.py",
    "tests/evaluation/intervals_test.py",
    (
      "bootstrap_of_independent_rows",
      "_, places = np.unique(np.asarray(groups), return_inverse=True)",
      "places = np.arange(len(groups))",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/world.py",
    "tests/evaluation/world_test.py",
    (
      "answers_to_training_alone_are_judged",
      "if name and task.heldout else None",
      "if name else None",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/judge/judge.py",
    "tests/scenes/judge/judge_test.py",
    (
      "weak_matches_are_objects",
      "name if score >= min_score else UNKNOWN",
      "name",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/judge/facts.py",
    "tests/scenes/judge/facts_test.py",
    (
      "more_objects_than_named_are_right",
      '"count": len(found) == len(slots)',
      '"count": len(found) >= len(slots)',
    ),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/judge/answers.py",
    "tests/scenes/judge/answers_test.py::test_a_completion_keeps_the_given_half",
    ("given_half_may_change", 'if not holds["kept"]:', "if False:"),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/judge/clauses.py",
    "tests/scenes/judge/clauses_test.py",
    (
      "unknown_words_are_ignored",
      "      return None\n    words = words[part",
      "      words = words[1:]\n      continue\n    words = words[part",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/judge/table.py",
    "tests/scenes/judge/table_test.py",
    (
      "intervals_of_independent_images",
      'one.concept or f"image {i}"',
      'f"image {i}"',
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/likelihood/answer_scores.py",
    "tests/evaluation/likelihood/answer_scores_test.py",
    ("answers_without_their_end", "x[-n:].sum()", "x[-n:-1].sum()"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/protocols/text_metrics.py",
    "tests/evaluation/text_metrics_test.py",
    ("captions_resampled_alone", "np.asarray(column.groups)", "np.arange(len(column.groups))"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/protocols/compare.py",
    "tests/evaluation/protocol_run_test.py::test_paired_differences_cancel_what_both_find_hard",
    (
      "unpaired_differences",
      "apart = (second - first)[both]",
      "apart = (np.sort(second) - first)[both]",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/reports/instruction_check.py",
    "tests/reports/instruction_check_test.py",
    ("targets_not_compared", "if not np.array_equal(tokens[start:stop], expected):", "if False:"),
  ),
  *mutants_of(
    "cm3leon_jax/runs/stages.py",
    "tests/runs/stages_test.py",
    ("stale_inputs_count_as_done", 'return stored.get("inputs") == inputs', "return True"),
    (
      "another_config_accepted",
      '{**stored, "inputs": inputs}, {**config, "inputs": inputs}',
      "config, config",
    ),
    ("damaged_files_pass", "(wrong := damage(folder / file, expected))", "(wrong := None)"),
  ),
  *mutants_of(
    "cm3leon_jax/config.py",
    "tests/config_test.py",
    ("unknown_fields_ignored", '"extra": "forbid"', '"extra": "ignore"'),
    ("addresses_printed", "printable(without_addresses(text", "printable((text"),
  ),
  *mutants_of(
    "cm3leon_jax/parameters.py",
    "tests/damaged_files_test.py",
    ("nan_accepted", "if bad := not_finite(flat):", "if bad := not_finite({}):"),
  ),
  *mutants_of(
    "cm3leon_jax/reports/report.py",
    "tests/reports/untrusted_test.py",
    ("controls_on_pages", "finalize=inert,", "finalize=None,"),
  ),
  *mutants_of(
    "cm3leon_jax/generation/tasks.py",
    "tests/generation/untrusted_test.py",
    ("any_type_of_seed", "if not isinstance(value, int | np.integer) or", "if value == 0 and"),
  ),
  *mutants_of(
    "cm3leon_jax/export/decode_image.py",
    "tests/export/decode_image_test.py",
    ("fsq_even_levels_as_odd_ones", "(1 - self.levels % 2) / 2", "0 * self.levels"),
  ),
  *mutants_of(
    "cm3leon_jax/export/image_tokenizer.py",
    "tests/export/image_tokenizer_test.py",
    ("half_a_tokenizer_is_one", "(target / CONFIG).unlink(missing_ok=True)", "pass"),
  ),
  *mutants_of(
    "cm3leon_jax/reports/card_figures.py",
    "tests/reports/model_card_test.py::test_figures_of_other_parameters_are_left_out_and_named",
    ("figures_of_another_step", ' and done["summary"].get("step", step) == step', ""),
  ),
)
