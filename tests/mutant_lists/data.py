"""Mutants of what becomes of documents: CM3, the row plan, rows, and near-duplicates."""

from tests.mutant_lists.mutant import mutants_of

DATA = (
  *mutants_of(
    "cm3leon_jax/data/rows/cm3.py",
    "tests/data/rows/cm3_test.py",
    ("span_crosses_a_break", "start, end = max(low, a), min(high, b)", "start, end = low, high"),
    ("span_in_the_last_segment", "- max(low, a) > end - start", "- max(low, a) > 0"),
    ("everything_masked", "0 < end - start < context", "0 < end - start <= context"),
    ("every_segment_masked", "min(num_spans, len(bounds) - 1)", "min(num_spans, len(bounds))"),
    ("spans_overlap", "if apart and 0 <", "if 0 <"),
    ("one_try_a_span", "range(num_spans**2)", "range(num_spans)"),
    ("spans_unsorted", "return tuple(sorted(spans))", "return tuple(spans)"),
    ("sentinels_from_1", "[vocab.mask(i) for i in", "[vocab.mask(i + 1) for i in"),
    ("eoss_left_out", "np.arange(start, end), [length + len(spans)]]", "np.arange(start, end)]"),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/plan.py",
    "tests/data/rows/plan_test.py::test_shares_are_shares_of_slots",
    ("shares_equal", "= used[source] / shares[source]", "= used[source]"),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/plan.py",
    "tests/data/rows/plan_test.py::test_plans_follow_from_seed_source_pass_and_unit",
    ("passes_alike", "(seed, source, pass_)).", "(seed, source))."),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/sample_plan.py",
    "tests/data/rows/sample_plan_test.py",
    ("whole_segments_never", "rng.random() < config.whole_segment_rate", "rng.random() < 0"),
    ("dropped_keeps_neighbors", "SamplePlan((), True", "SamplePlan(tuple(neighbors), True"),
    (
      "drop_without_a_last_image",
      "config.condition_dropout and is_image[-1]",
      "config.condition_dropout",
    ),
    ("paper_draws_of_all", "min(num_candidates, PAPER_CANDIDATES)", "num_candidates"),
    (
      "fixed_takes_the_first",
      "rng.permutation(num_candidates)[:wanted].tolist()",
      "list(range(num_candidates))[:wanted]",
    ),
    ("spans_without_room", "min(num_spans, (limit - total) // cm3.OVERHEAD)", "num_spans"),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/sample_plan.py",
    "tests/data/rows/plan_test.py::test_rates_of_drops",
    ("neighbors_never_dropped", ">= config.neighbor_dropout", ">= 0"),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/sample_plan.py",
    "tests/data/rows/sample_plan_test.py::test_the_number_of_spans_is_poisson",
    ("always_two_spans", "int(rng.poisson(config.mean_spans))", "2 if config.mean_spans else 0"),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/config.py",
    "tests/training/watch/heldout_test.py",
    ("heldout_loss_counts_neighbors", "neighbor_loss_weight=0.0", "neighbor_loss_weight=1.0"),
    ("heldout_neighbors_at_random", 'neighbor_sampling="best"', 'neighbor_sampling="fixed"'),
    ("heldout_rows_with_spans", "mean_spans=0.0", "mean_spans=1.0"),
  ),
  *mutants_of(
    "cm3leon_jax/positions.py",
    "tests/positions_test.py",
    ("masked_first_codes_are_not_counted", "int(before[0]) + 1", "int(first[0])"),
    ("images_of_one_unit", "is_image[:-1] & is_break[1:]", "is_image[:-1] & is_image[1:] & False"),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/loader.py",
    "tests/data/rows/loader_test.py",
    (
      "padding_weighs_1",
      'row["inputs"][:] = row["targets"][:] = vocab.pad',
      'row["inputs"][:] = row["targets"][:] = vocab.pad; row["loss_weights"][:] = 1',
    ),
    ("skipped_without_limit", "if count > config.max_skipped:", "if False:"),
    ("opening_tokens_weigh_1", "weights[:3] = 0", "weights[:1] = 0"),
    ("positions_run_on", "= positions_of(tokens,", "= at + positions_of(tokens,"),
    ("neighbors_hidden", "(layout > before) & vocab", "(layout > 0) & vocab"),
    ("targets_hidden", 'row["inputs"][at : at', 'row["targets"][at : at'),
    (
      "one_share_hidden",
      "share = most * rng.random()",
      "share = most / 2",
    ),
    ("hidden_alone", "if sample.has_source else config.code_dropout_alone", ""),
    ("hidden_after_neighbors_alone", "config.code_dropout if sample.has_source else", ""),
    (
      "positions_without_the_last_target",
      "positions_of(tokens, vocab, align_images)[:-1]",
      "positions_of(tokens[:-1], vocab, align_images)",
    ),
    (
      "neighbors_after_the_document",
      "join([*neighbors, document], vocab)",
      "join([document, *neighbors], vocab)",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/loader.py",
    "tests/training/watch/heldout_test.py",
    ("neighbor_weights_shifted", "joined_weights[1 : 1 + before]", "joined_weights[:before]"),
  ),
  *mutants_of(
    "cm3leon_jax/data/checks/duplicates.py",
    "tests/data/checks/duplicates_test.py",
    (
      "near_by_both_measures",
      "(noise >= min_psnr) | (distance <= MAX_BITS)",
      "(noise >= min_psnr) & (distance <= MAX_BITS)",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/world.py",
    "tests/scenes/source_test.py::test_training_shows_nothing_that_is_held_out",
    (
      "heldout_pair_in_training",
      "any(HELDOUT_COLOR.get(placed.object) == placed.color for",
      "all(HELDOUT_COLOR.get(placed.object) == placed.color for",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/captions.py",
    "tests/scenes/world_test.py",
    ("left_is_right", "if column < other_column", "if column > other_column"),
  ),
  *mutants_of(
    "cm3leon_jax/scenes/instructions.py",
    "tests/scenes/instructions_test.py",
    (
      "edits_into_heldout_scenes",
      "not (may_be_edited(scene) and may_be_edited(edit.target))",
      "not may_be_edited(scene)",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/data/published/files.py",
    "tests/data/published/files_test.py",
    ("captions_of_other_images", "captions[image_id].append(entry)", "captions[139].append(entry)"),
    ("answer_in_the_history", "zip(asked[:-1], said[:-1])", "zip(asked, said)"),
  ),
  *mutants_of(
    "cm3leon_jax/data/instructions/llava.py",
    "tests/data/instructions/llava_test.py",
    ("turns_forgotten", "history += f", "history = f"),
  ),
  *mutants_of(
    "cm3leon_jax/data/instructions/files.py",
    "tests/data/instructions/files_test.py",
    ("before_is_after", 'enumerate(("before", "after"))', 'enumerate(("after", "before"))'),
  ),
  *mutants_of(
    "cm3leon_jax/data/published/examples.py",
    "tests/data/published/examples_test.py",
    ("images_not_spread", "turns.sort(key=lambda turn: turn[:2])", ""),
  ),
  *mutants_of(
    "cm3leon_jax/data/instructions/samples.py",
    "tests/data/instructions/samples_test.py",
    (
      "sentinels_count_as_targets",
      "len(tokens) - 1 - (stop - start)",
      "len(tokens) - 2 - (stop - start)",
    ),
    ("ends_of_targets_do_not_count", "weights[start : stop + 1] =", "weights[start:stop] ="),
    (
      "instructions_dropped_with_all",
      "draw < drops.all + drops.instruction",
      "draw < drops.instruction",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/data/instructions/stores.py",
    "tests/data/instructions/stores_test.py",
    ("codes_of_the_first_record", "of_record.get(i, {})", "of_record.get(0, {})"),
    ("targets_are_redrawn", "field != task.target and is", "is"),
  ),
  *mutants_of(
    "cm3leon_jax/data/instructions/tasks.py",
    "tests/data/instructions/samples_test.py",
    ("shares_of_unclipped_sizes", "min(max(size / mean, least), most)", "size / mean"),
  ),
  *mutants_of(
    "cm3leon_jax/data/sources/formats.py",
    "tests/data/sources/archive_bounds_test.py",
    (
      "links_of_lists_followed",
      'info["type"] == "file" and not info.get("islink")',
      'info["type"] == "file"',
    ),
  ),
  *mutants_of(
    "cm3leon_jax/data/sources/archives.py",
    "tests/data/sources/archive_bounds_test.py",
    ("headers_unbounded", "if size > MAX_HEADER + tarfile.BLOCKSIZE:", "if size < 0:"),
  ),
  *mutants_of(
    "cm3leon_jax/data/sources/image_folder.py",
    "tests/data/sources/image_folder_test.py",
    ("links_lead_out", "os.path.realpath(os.path.abspath(", "(os.path.abspath("),
  ),
  *mutants_of(
    "cm3leon_jax/data/raw/reader.py",
    "tests/data/raw/untrusted_test.py",
    ("large_images_at_once", "  with _one_at_a_time():", "  if True:"),
  ),
  *mutants_of(
    "cm3leon_jax/data/raw/summary.py",
    "tests/data/raw/summary_test.py",
    ("heldout_characters_count", 'record.split == "train"', 'record.split != "bank"'),
  ),
  *mutants_of(
    "cm3leon_jax/data/checks/leaks.py",
    "tests/data/checks/leaks_test.py",
    ("copies_of_one_concept_count", " & (concepts[pairs[0]] != concepts[pairs[1]])", ""),
  ),
  *mutants_of(
    "cm3leon_jax/data/sources/samples.py",
    "tests/data/sources/samples_test.py",
    ("json_before_txt", '("txt", "caption", "json")', '("json", "caption", "txt")'),
  ),
  *mutants_of(
    "cm3leon_jax/files/atomic.py",
    "tests/files/atomic_test.py",
    ("unreadable_files_are_absent", "if error.errno in NOT_THERE:", "if error:"),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/plan_starts.py",
    "tests/data/rows/plan_test.py::test_a_line_that_the_run_did_not_write_is_named",
    ("changed_starts_unnoticed", "or found[1] != self._digests[-1]", ""),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/plan_starts.py",
    "tests/data/rows/plan_test.py::test_a_line_of_another_plan_is_named",
    ("starts_digested_alone", 'sha256(f"{before}{line}"', 'sha256(f"{line}"'),
  ),
  *mutants_of(
    "cm3leon_jax/data/checks/validate.py",
    "tests/data/checks/validate_test.py",
    ("changed_images_unnoticed", "if found != expected[name]:", "if found is None:"),
  ),
)
