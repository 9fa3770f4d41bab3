"""Mutants of the retrieval rules."""

from tests.mutant_lists.mutant import mutants_of

RETRIEVAL = (
  *mutants_of(
    "cm3leon_jax/retrieval/neighbors.py",
    "tests/retrieval/neighbors_test.py",
    ("own_group_allowed", "if forbidden(candidate):", "if False:"),
    (
      "no_group_is_a_group",
      "(bank_groups == groups[i]) & (groups[i] != 0)",
      "bank_groups == groups[i]",
    ),
    ("itself_allowed", "(bank_keys == keys[i]) | ((", "(("),
    ("similarity_limit_ignored", "vectors[candidate] @ query > max_similarity", "False"),
    (
      "kept_not_compared",
      "candidate in kept or (vectors[kept] @ vectors[candidate] > max_similarity).any()",
      "candidate in kept",
    ),
    ("pruned_against_themselves", "(vectors[kept] @", "(vectors[[*kept, candidate]] @"),
    ("worst_first", "for c in side if c >= 0]", "for c in side[::-1] if c >= 0]"),
    ("text_side_only", "in walks * kept_per_side", "in walks[:1] * (2 * kept_per_side)"),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/neighbors.py",
    "tests/retrieval/bank_test.py::test_candidates_come_from_the_caption_and_from_the_image",
    (
      "searched_by_text_twice",
      "retriever.search(images)]",
      "retriever.search(queries)]",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/neighbors.py",
    "tests/retrieval/bank_test.py::test_the_stage_writes_neighbors_of_both_splits",
    (
      "caption_neighbors_by_document",
      "retriever.retrieve(queries)",
      "retriever.retrieve(documents)",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/bank.py",
    "tests/retrieval/bank_test.py::test_query_dropout_drops_its_share",
    ("query_dropout_never", "kept = order >= share", "kept = order >= 0"),
  ),
  *mutants_of(
    "cm3leon_jax/commands/train.py",
    "tests/training/heldout_test.py::test_neighbors_are_those_of_the_caption_alone",
    ("heldout_neighbors_by_image", 'text_only=split == "heldout"', "text_only=False"),
  ),
)
