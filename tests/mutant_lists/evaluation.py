"""Mutants of evaluation, reports, configs and stages."""

from tests.mutant_lists.mutant import mutants_of

EVALUATION = (
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/moments.py",
    "tests/evaluation/metrics/moments_test.py",
    ("moments_forget_the_shift", "(self.count * count / total)", "0.0"),
    ("covariance_divided_by_n", "self.scatter / (self.count - 1)", "self.scatter / self.count"),
    ("counts_of_rows_ignored", " * np.sqrt(counts)[:, None]", ""),
    (
      "rounding_errors_have_roots",
      "values > len(values) * np.finfo(np.float64).eps * values[-1]",
      "values > 0",
    ),
    ("distance_below_0", "return max(0.0, float(distance))", "return float(distance)"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/frechet_interval.py",
    "tests/evaluation/metrics/frechet_interval_test.py",
    ("frechet_bias_not_corrected", "[tail, 1 - tail]) - bias", "[tail, 1 - tail])"),
    ("paired_groups_drawn_apart", "[counts[where]", "[rng.permutation(counts)[where]"),
    (
      "frechet_interval_of_the_larger_set",
      "effective = min(",
      "effective = max(",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/kernel_distance.py",
    "tests/evaluation/metrics/kernel_distance_test.py",
    ("kernel_of_a_row_with_itself_counts", "np.fill_diagonal(own, 0.0)", "pass"),
    ("kid_subsets_with_replacement", "replace=False", "replace=True"),
    ("cmmd_without_unit_length", " / np.linalg.norm(rows, axis=1, keepdims=True)", " * 1.0"),
    ("cmmd_unbiased", "(_sum_within(_gaussian, rows) + len(rows))", "_sum_within(_gaussian, rows)"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/precision_recall.py",
    "tests/evaluation/metrics/precision_recall_test.py",
    ("rows_are_their_own_neighbors", "np.fill_diagonal(distances, np.inf)", "pass"),
    ("balls_of_the_wrong_rows", "radii[j * BLOCK : (j + 1) * BLOCK]", "radii[: len(y)]"),
    ("copies_are_apart", "* lengths] = 0.0", "* lengths] += 0.0"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/metrics/code_histograms.py",
    "tests/evaluation/metrics/code_histograms_test.py",
    ("divergence_in_nats", "float(nats / np.log(2))", "float(nats)"),
    ("only_the_last_batch_counts", "counts += np.bincount", "counts = np.bincount"),
    ("histograms_not_normalized", "return first / first.sum(), second", "return first, second"),
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
      "scores_of_another_row_length",
      "nats |= {int(i): -np.log(2) * row for i, row in zip(members, scored)}",
      "nats |= {i: -np.log(2) * row for i, row in enumerate(scored)}",
    ),
    (
      "documents_are_their_own_neighbors",
      "[group_id(documents[i].key) for i in pairs]",
      "[0 for _ in pairs]",
    ),
    ("finished_parts_scored_again", " if not file.exists()])[0]", "])[0]"),
    ("perplexity_in_bits", "np.exp(-log_probs.sum()", "np.exp2(-log_probs.sum()"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/likelihood/given_documents.py",
    "tests/evaluation/likelihood/given_documents_test.py",
    (
      "separators_take_no_position",
      "len(self.layout.encode(text)) + 1",
      "len(self.layout.encode(text))",
    ),
    (
      "images_do_not_change_the_digest",
      "digest.update(self._check_image(str(image), where))",
      "self._check_image(str(image), where)",
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
    (
      "interval_not_expanded",
      "confidence_level=percentile_level(effective)",
      "confidence_level=LEVEL",
    ),
    ("bootstrap_unpaired", "paired=True", "paired=False"),
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
    (
      "half_of_the_ink_decides_the_color",
      "names[color] if is_clear else UNKNOWN",
      "names[color]",
    ),
    ("pale_ink_has_a_color", "(all_solid > 0) & (agreeing", "(agreeing"),
    ("silhouettes_not_shifted", "MAX_SHIFT = 2", "MAX_SHIFT = 0"),
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
    "tests/scenes/judge/answers_test.py",
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
    ("images_of_as_many_objects_show_more", "np.mean(extra > 0)", "np.mean(extra >= 0)"),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/judge/samples.py",
    "tests/scenes/judge/samples_test.py",
    (
      "sheet_of_any_categories",
      "key=lambda i: turns[i]",
      "key=lambda i: i",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/judge/sheet.py",
    "tests/scenes/judge/sheet_test.py",
    (
      "right_and_wrong_have_one_mark",
      "for line in check if right else cross:",
      "for line in check:",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/likelihood/answer_scores.py",
    "tests/evaluation/likelihood/answer_scores_test.py",
    ("answers_without_their_end", "x[-n:].sum()", "x[-n:-1].sum()"),
    ("masks_after_the_answer", "1 + len(before)", "2 + len(before)"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/protocols/text_metrics.py",
    "tests/evaluation/text_metrics_test.py",
    ("captions_resampled_alone", "np.asarray(column.groups)", "np.arange(len(column.groups))"),
    ("worst_candidate_first", "ndcg([scores]", "ndcg([-np.asarray(scores)]"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/protocols/samples.py",
    "tests/evaluation/protocol_run_test.py",
    ("worst_sample_counts", "in (None, 1)", "in (None, 2)"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/protocols/features.py",
    "tests/evaluation/protocol_run_test.py",
    ("features_of_one_set", "protocol_lib.stem(name)", 'protocol_lib.stem("x")'),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/protocols/protocol.py",
    "tests/evaluation/protocol_test.py",
    ("columns_share_files", "{slug(column)}-{digest(column)[:6]}", "{slug(column)}"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/protocols/run.py",
    "tests/evaluation/protocol_run_test.py",
    ("examples_shuffled_onto_themselves", "result[order] = np.roll(order, 1)", "result[:] = order"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/protocols/compare.py",
    "tests/evaluation/protocol_run_test.py",
    (
      "unpaired_differences",
      "apart = (second - first)[both]",
      "apart = (np.sort(second) - first)[both]",
    ),
    ("data_not_compared", '("protocol", "data")', '("protocol",)'),
    ("resamples_unpaired", "apart = second - first -", "apart = second[::-1] - first -"),
  ),
  *mutants_of(
    "cm3leon_jax/reports/instruction_check.py",
    "tests/reports/instruction_check_test.py",
    ("targets_not_compared", "if not np.array_equal(tokens[start:stop], expected):", "if False:"),
    ("weights_without_the_end", "weights[start : stop + 1] = 1", "weights[start:stop] = 1"),
    ("drops_not_compared", "!= task.plan.masked:", "is None:"),
    ("left_out_segments_expected", "if i not in left_out)", ")"),
  ),
  *mutants_of(
    "cm3leon_jax/reports/inspect_page.py",
    "tests/reports/instruction_check_test.py",
    (
      "all_after_the_start_is_target",
      "view.target[0] <= part.start < view.target[1]",
      "part.start >= 0",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/reports/summary.py",
    "tests/reports/report_test.py",
    (
      "samples_of_a_prompt_independent",
      '[r.get("concept") or r.get("key") or r["prompt"] for r in column]',
      "list(range(len(column)))",
    ),
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
    ("ids_of_time", "id_of(described) if described else", ""),
    ("ids_of_other_files_pass", "(ids if stage.varying else ids[-1:])", "ids"),
    ("varying_files_count", "(ids if stage.varying else ids[-1:])", "ids[-1:]"),
    ("damaged_files_pass", "(wrong := damage(folder / file, expected))", "(wrong := None)"),
  ),
  *mutants_of(
    "cm3leon_jax/config.py",
    "tests/config_test.py",
    ("unknown_fields_ignored", '"extra": "forbid"', '"extra": "ignore"'),
    ("control_characters_printed", "printable(without_addresses(text", "(without_addresses(text"),
    ("addresses_printed", "printable(without_addresses(text", "printable((text"),
    ("whole_numbers_unbounded", "abs(value) > LARGEST", "abs(value) < 0"),
  ),
  *mutants_of(
    "cm3leon_jax/files/json_files.py",
    "tests/damaged_files_test.py",
    ("types_of_fields_unchecked", "if not isinstance(found, right) or", "if found is None or"),
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
    ("halves_of_pairs_accepted", 'if any("\\ud800" <= c', 'if all("\\ud800" <= c'),
  ),
  *mutants_of(
    "cm3leon_jax/export/decode_image.py",
    "tests/export/decode_image_test.py",
    ("half_an_image_decoded", "if stop - start != count:", "if stop - start > count:"),
    ("fsq_levels_from_the_last_channel", 'order="F"', 'order="C"'),
    ("fsq_even_levels_as_odd_ones", "np.where(levels % 2, 0, 0.5)", "np.zeros(len(levels))"),
    ("numpy_simvq_without_its_matrix", 'if "codebook.projection" in', 'if "projection" in'),
    ("padding_of_numpy_convolutions", "(around // 2, around - around // 2)", "(0, around)"),
  ),
  *mutants_of(
    "cm3leon_jax/export/image_tokenizer.py",
    "tests/export/image_tokenizer_test.py",
    ("unknown_network_exported", 'if apart > 1 else ""', 'if apart > 255 else ""'),
    ("half_a_tokenizer_is_one", "(target / CONFIG).unlink(missing_ok=True)", "pass"),
  ),
  *mutants_of(
    "cm3leon_jax/reports/card_figures.py",
    "tests/reports/model_card_test.py::test_figures_of_other_parameters_are_left_out_and_named",
    ("figures_of_another_step", ' and done["summary"].get("step", step) == step', ""),
    ("figures_before_tuning", ' or "parameters" in result:', ":"),
  ),
)
