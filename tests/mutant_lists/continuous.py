"""Lists mutants of continuous batching: admission, ring caches, alternation of batches."""

from tests.mutant_lists.mutant import mutants_of

STATE, SLOTS = (f"cm3leon_jax/decoding/continuous/{name}.py" for name in ("state", "slots"))
ENGINE_TEST = "tests/decoding/continuous/engine_test.py"
ANY_SCHEDULE = f"{ENGINE_TEST}::test_any_schedule_gives_the_samples_of_generate"

CONTINUOUS = mutants_of(
  STATE,
  ANY_SCHEDULE,
  (
    "seen_entries_are_not_turned",
    "return cache, jnp.roll(seen, end - width, axis=1)",
    "return cache, seen",
  ),
  (
    "positions_of_the_last_sample",
    "    positions=put_streams(loop.positions, admitted.last_positions),\n",
    "",
  ),
  (
    "next_positions_of_the_last_sample",
    "    next_positions=put_streams(loop.next_positions, admitted.next_positions),\n",
    "",
  ),
  (
    "plan_of_the_last_sample",
    "    state=State(*map(put, loop.state, static.grammar.start(plan))),\n",
    "",
  ),
  ("divergence_of_the_last_sample", "    divergence=put(loop.divergence, zeros),\n", ""),
  ("noise_goes_on_with_the_slot", "(loop, put(state.counts, zeros))", "(loop, state.counts)"),
  ("rings_do_not_turn", "loop.next_entries % capacities", "loop.next_entries"),
  STATE,
  ("no_sample_takes_the_last_slot", 'mode="drop")', 'mode="clip")'),
  SLOTS,
  ANY_SCHEDULE,
  (
    "control_of_the_last_chunk",
    "      self.placed = None\n    self.admitted = []",
    "    self.admitted = []",
  ),
  (
    "only_the_last_chunk_is_told",
    "active.tokens = np.append(active.tokens, tokens)",
    "active.tokens = tokens",
  ),
  ("methods_of_one_seed", "self.sampling.method, self.seed,", "self.sampling.method, 0,"),
  "cm3leon_jax/decoding/continuous/engine.py",
  f"{ENGINE_TEST}::test_a_short_request_leaves_an_idle_batch_of_longer_ones_alone",
  (
    "idle_batches_admit_any_bucket",
    "[x for x in fits if x.active or",
    "[x for x in fits if True or",
  ),
  f"{ENGINE_TEST}::test_batches_take_turns_and_are_bounded",
  (
    "one_batch_is_always_the_next",
    "    self._batches.append(batch)\n    for update",
    "    self._batches.insert(0, batch)\n    for update",
  ),
  "cm3leon_jax/decoding/continuous/buckets.py",
  ("rings_that_end_early", "prompt + new_tokens <= capacity", "prompt <= capacity"),
  ("buckets_of_other_candidates", "sampler == all_candidates else", "True else"),
)
