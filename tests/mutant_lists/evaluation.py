"""Mutants of evaluation, reports, configs and stages."""

from tests.mutant_lists.mutant import mutants_of

EVALUATION = (
  *mutants_of(
    "cm3leon_jax/evaluation/bits.py",
    "tests/evaluation/bits_test.py::test_intervals_are_over_the_concepts_of_the_documents",
    (
      "intervals_of_independent_documents",
      'str(store.concepts[j] or f"document {j}")',
      'f"document {j}"',
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
      "confidence_level=_percentile_level(effective)",
      "confidence_level=LEVEL",
    ),
    ("bootstrap_unpaired", "paired=True", "paired=False"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/scenes.py",
    "tests/evaluation/scenes_test.py",
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
    ("silhouettes_not_shifted", "MAX_SHIFT = 2", "MAX_SHIFT = 0"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/scene_facts.py",
    "tests/evaluation/scene_facts_test.py",
    (
      "more_objects_than_named_are_right",
      '"count": len(found) == len(slots)',
      '"count": len(found) >= len(slots)',
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/scene_table.py",
    "tests/evaluation/scene_table_test.py",
    (
      "intervals_of_independent_images",
      'one.concept or f"image {i}"',
      'f"image {i}"',
    ),
    ("images_of_as_many_objects_show_more", "np.mean(extra > 0)", "np.mean(extra >= 0)"),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/scene_samples.py",
    "tests/evaluation/scene_samples_test.py",
    (
      "sheet_of_any_categories",
      "key=lambda i: turns[i]",
      "key=lambda i: i",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/evaluation/scene_sheet.py",
    "tests/evaluation/scene_sheet_test.py",
    (
      "right_and_wrong_have_one_mark",
      "for line in check if right else cross:",
      "for line in check:",
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
    "cm3leon_jax/stages.py",
    "tests/stages_test.py",
    ("stale_inputs_count_as_done", 'return stored.get("inputs") == inputs', "return True"),
    (
      "another_config_accepted",
      '{**stored, "inputs": inputs}, {**config, "inputs": inputs}',
      "config, config",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/config.py",
    "tests/config_test.py",
    ("unknown_fields_ignored", '"extra": "forbid"', '"extra": "ignore"'),
  ),
)
