"""Mutants of what becomes of documents: CM3, the row plan, rows, and near-duplicates."""

from tests.mutant_lists.mutant import mutants_of

DATA = (
  *mutants_of(
    "cm3leon_jax/data/cm3.py",
    "tests/data/cm3_test.py",
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
    "cm3leon_jax/data/plan.py",
    "tests/data/plan_test.py",
    ("shares_equal", "= used[source] / shares[source]", "= used[source]"),
    ("passes_alike", "(seed, source, pass_)).", "(seed, source))."),
  ),
  *mutants_of(
    "cm3leon_jax/data/sample_plan.py",
    "tests/data/sample_plan_test.py",
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
    "cm3leon_jax/data/sample_plan.py",
    "tests/data/plan_test.py::test_rates_of_drops",
    ("neighbors_never_dropped", ">= config.neighbor_dropout", ">= 0"),
  ),
  *mutants_of(
    "cm3leon_jax/data/sample_plan.py",
    "tests/data/sample_plan_test.py::test_the_number_of_spans_is_poisson",
    ("always_two_spans", "int(rng.poisson(config.mean_spans))", "2 if config.mean_spans else 0"),
  ),
  *mutants_of(
    "cm3leon_jax/data/sample_plan.py",
    "tests/training/heldout_test.py",
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
    "cm3leon_jax/data/pipeline.py",
    "tests/data/pipeline_test.py",
    (
      "padding_weighs_1",
      'row["inputs"][:] = row["targets"][:] = vocab.pad',
      'row["inputs"][:] = row["targets"][:] = vocab.pad; row["loss_weights"][:] = 1',
    ),
    ("opening_tokens_weigh_1", "weights[:3] = 0", "weights[:1] = 0"),
    ("positions_run_on", "= positions_of(tokens,", "= at + positions_of(tokens,"),
    ("neighbors_hidden", "(layout > before) & vocab", "(layout > 0) & vocab"),
    ("targets_hidden", 'row["inputs"][at : at', 'row["targets"][at : at'),
    (
      "one_share_hidden",
      "share = most * rng.random()",
      "share = most / 2",
    ),
    ("hidden_alone", "if has_neighbors else config.code_dropout_alone", ""),
    ("hidden_after_neighbors_alone", "config.code_dropout if has_neighbors else", ""),
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
    "cm3leon_jax/data/pipeline.py",
    "tests/training/heldout_test.py",
    ("neighbor_weights_shifted", "joined_weights[1 : 1 + before]", "joined_weights[:before]"),
  ),
  *mutants_of(
    "cm3leon_jax/data/duplicates.py",
    "tests/data/duplicates_test.py",
    (
      "near_by_both_measures",
      "(noise >= min_psnr) | (distance <= MAX_BITS)",
      "(noise >= min_psnr) & (distance <= MAX_BITS)",
    ),
    (
      "nothing_united",
      "_, components = connected_components(links, directed=False)",
      "components = np.arange(len(ordered))",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/data/builtin_sources.py",
    "tests/data/leaks_test.py",
    ("split_by_drawing", "split_of(d.concept, ", "split_of(d.code, "),
  ),
  *mutants_of(
    "cm3leon_jax/data/scene_world.py",
    "tests/data/scenes_test.py::test_training_shows_nothing_that_is_held_out",
    (
      "heldout_pair_in_training",
      "any(HELDOUT_COLOR.get(placed.object) == placed.color for",
      "all(HELDOUT_COLOR.get(placed.object) == placed.color for",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/data/scene_captions.py",
    "tests/data/scene_world_test.py",
    ("left_is_right", "if column < other_column", "if column > other_column"),
  ),
  *mutants_of(
    "cm3leon_jax/data/scene_drawings.py",
    "tests/data/scene_world_test.py",
    ("box_in_the_cell", "return [left + x0, top + y0,", "return [x0, y0,"),
  ),
)
