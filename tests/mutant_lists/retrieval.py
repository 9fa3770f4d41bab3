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
    ("unlike_ones_kept", "vectors[candidate] @ query < min_similarity", "False"),
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
    "cm3leon_jax/retrieval/neighbors.py",
    "tests/retrieval/bank_test.py::test_documents_of_the_bank_are_found_and_search_for_nothing",
    ("training_documents_searched", "0 if config.train_documents else", "0 if True else"),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/bank.py",
    "tests/retrieval/bank_test.py::test_query_dropout_drops_its_share",
    ("query_dropout_never", "kept = order >= share", "kept = order >= 0"),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/lexical.py",
    "tests/retrieval/lexical_test.py::test_the_cosine_is_the_weighted_mean_of_both",
    ("weight_not_its_root", "math.sqrt(self.weight) * self.embed", "self.weight * self.embed"),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/lexical.py",
    "tests/retrieval/lexical_test.py::test_a_rare_word_decides_where_clip_is_blind",
    (
      "all_words_weigh_the_same",
      "weights = self.idf[[bucket(word) for word in found]]",
      "weights = np.ones(len(found))",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/bank.py",
    "tests/retrieval/lexical_test.py::test_rows_are_those_of_the_pairs",
    (
      "words_never_dropped",
      "lexical.join(texts, captions))",
      "lexical.join(texts, [p.caption for p in chunk]))",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/neighbors.py",
    "tests/retrieval/lexical_test.py::test_finished_work_is_kept_and_another_weight_embeds_again",
    ("embeddings_of_old_words_kept", "{**inputs, **counted}", "inputs"),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/arrays.py",
    "tests/retrieval/arrays_test.py",
    (
      "lost_chunks_are_zeros",
      '"fill_missing_data_reads": False',
      '"fill_missing_data_reads": True',
    ),
    ("rows_of_other_arrays_pass", "if self._digest and _digest_of", "if False and _digest_of"),
  ),
  *mutants_of(
    "cm3leon_jax/retrieval/neighbors.py",
    "tests/retrieval/neighbors_test.py::test_neighbors_outside_of_the_bank_are_refused",
    ("neighbors_below_the_bank", "(ids < -1) | (ids >= bank)", "ids >= bank"),
  ),
  *mutants_of(
    "cm3leon_jax/generation/pipeline.py",
    "tests/generation/pipeline_test.py::test_queries_are_those_of_the_stage",
    (
      "query_without_words",
      'clip.embed_texts(texts), values["text"])',
      "clip.embed_texts(texts))",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/trained/rows.py",
    "tests/training/watch/heldout_test.py::test_neighbors_are_those_of_the_caption_alone",
    ("heldout_neighbors_by_image", 'text_only=split == "heldout"', "text_only=False"),
  ),
)
