"""Mutants of decoding in batches: sampling, guidance, grammar, cache and speculation."""

from tests.mutant_lists.mutant import mutants_of

LOOP = "cm3leon_jax/decoding/loop.py"
CACHE, CACHE_TEST = "cm3leon_jax/decoding/cache.py", "tests/decoding/cache_test.py"
SPECULATIVE = "cm3leon_jax/decoding/speculative.py"
SPECULATIVE_TEST = "tests/decoding/speculative_test.py"
GENERATOR_TEST = "tests/decoding/generator_test.py"
STREAMS = f"{GENERATOR_TEST}::test_streams_equal_separate_passes"
GROWS = f"{GENERATOR_TEST}::test_guidance_grows_over_the_codes"

DECODING = (
  *mutants_of(
    "cm3leon_jax/decoding/sampling/top_p.py",
    "tests/decoding/sampling/top_p_test.py",
    ("top_k_one_more", "[None] < top_k)", "[None] <= top_k)"),
    ("nucleus_without_its_last", "(before < top_p)", "(before + probabilities < top_p)"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/contrastive.py",
    "tests/decoding/sampling/contrastive_test.py",
    ("contrastive_k_is_one", "largest(expert, min(k, expert.shape[-1]))", "largest(expert, 1)"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/mixture.py",
    "tests/decoding/sampling/mixture_test.py",
    ("mixture_inverted", "np.broadcast_to(one % 2,", "np.broadcast_to(1 - one % 2,"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/methods.py",
    "tests/decoding/sampling/methods_test.py",
    (
      "contrast_without_a_stream",
      "TOP_P if method.needs_unconditional and count == 1 else method",
      "method",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/rows.py",
    "tests/decoding/sampling/rows_test.py",
    ("texts_by_other_methods", "uses[method.name] & is_image", "uses[method.name]"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/guidance.py",
    "tests/decoding/sampling/guidance_test.py",
    ("guidance_sign", "[alpha, 1 - alpha]", "[alpha, alpha - 1]"),
    (
      "editing_weights_exchanged",
      "[text, image - text, 1 - image]",
      "[image, text - image, 1 - text]",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/request.py",
    "tests/decoding/request_test.py",
    ("guidance_of_later_tokens", "[weights, weights[-1:]]", "[weights, weights[:1]]"),
    (
      "infill_guided_against_itself",
      "for text, segment in zip(is_text, marked) if not text]",
      "for text, segment in zip(is_text, marked)]",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/grammar.py",
    "tests/decoding/grammar_test.py",
    ("image_in_too_little_room", "left > self.image_tokens", "left >= self.image_tokens"),
    ("empty_text_allowed", "(kind == TEXT) & (left < _entry(plan, state.part, 1))", "kind == TEXT"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/control.py",
    "tests/decoding/control_test.py",
    ("settings_of_the_last_request", "into[row] = np.reshape", "into[-1] = np.reshape"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/result.py",
    "tests/decoding/result_test.py",
    ("divergence_without_a_stream", "if streams > 1 else 0", "if streams else 0"),
    ("padding_is_a_token", "(ids != pad).sum()", "len(ids)"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/batch.py",
    "tests/decoding/batch_test.py",
    (
      "prompt_positions_without_its_image",
      "if any(part.kind == grammar.CODES for part in plan)",
      "if not plan",
    ),
    ("tokens_at_other_positions_shared", "(a[:n] != b[:n]).any(axis=1)", "a[:n, 0] != b[:n, 0]"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/loop.py",
    "tests/decoding/loop_test.py",
    (
      "positions_count_padding",
      "extend(config, model, tokens.ids, tokens.positions, attend)",
      "extend(config, model, tokens.ids, 0 * tokens.ids + jnp.arange(length)[None], attend)",
    ),
    ("attention_to_the_future_cache", "[None] <= ends[:, None]", "[None] >= 0 * ends[:, None]"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/loop.py",
    "tests/decoding/generator_test.py::test_divergence_is_the_mean_kl_of_the_streams_over_image_codes",
    (
      "divergence_of_the_guided_stream",
      "for x in logits[1:]]",
      "for x in logits[::2]]",
    ),
    ("divergence_counts_texts", "apart = jnp.where(is_image, apart, 0)", "apart = 1.0 * apart"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/cache.py",
    "tests/decoding/cache_test.py",
    ("cache_keeps_the_padding", "x[:, :, x.shape[2] - kept :]", "x[:, :, :kept]"),
    ("rows_of_another_shard", "index % x.shape[0]", "index // len(x)"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/speculative.py",
    "tests/decoding/speculative_test.py",
    (
      "draft_accepted_too_rarely",
      "uniform * pick(odds, drafts) < pick(p[:-1], drafts)",
      "uniform < pick(p[:-1], drafts)",
    ),
    ("divergence_of_rejected_drafts", "< taken[:, None], apart, 0)", "< window, apart, 0)"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/top_p.py",
    "tests/decoding/sampling/rows_test.py::test_samples_follow_the_exact_distribution",
    ("temperature_is_a_factor", "logits.guided / temperature", "logits.guided * temperature"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/top_p.py",
    "tests/decoding/sampling/top_p_test.py::test_rounding_of_logits_changes_no_token",
    (
      "noise_of_places",
      "(None, 0)))(keys, ids)",
      "(None, 0)))(keys, 0 * ids + jnp.arange(ids.shape[1])[None])",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/rows.py",
    "tests/decoding/sampling/rows_test.py::test_log_probs_are_those_of_the_guided_distribution",
    (
      "log_probs_after_temperature",
      "jax.nn.log_softmax(logits.guided, axis=-1)",
      "jax.nn.log_softmax(logits.guided / temperature, axis=-1)",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/contrastive.py",
    "tests/decoding/sampling/rows_test.py::test_samples_follow_the_exact_distribution",
    (
      "the_expert_is_its_own_amateur",
      "logits.unconditional / rows.amateur",
      "logits.conditional / rows.amateur",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/sampling/guidance.py",
    "tests/decoding/sampling/guidance_test.py::test_cosine_is_flat_at_its_ends",
    ("cosine_is_half_a_sine", "(1 - np.cos(np.pi * t)) / 2", "np.sin(np.pi * t / 2)"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/request.py",
    "tests/decoding/request_test.py",
    (
      "texts_are_guided_too",
      "all(hole.codes for hole in holes) and any(is_text)",
      "any(hole.codes for hole in holes) and any(is_text)",
    ),
    ("kept_neighbors_are_lost", "[*before, [vocab.mask(0)]]", "[[vocab.mask(0)]]"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/grammar.py",
    "tests/decoding/grammar_test.py",
    ("codes_done_are_those_left", "1) - state.left, self", "1) * 0 + state.left, self"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/grammar.py",
    "tests/decoding/grammar_test.py::test_admits_exactly_the_language",
    ("a_break_without_room", "(left >= 3)", "(left >= 2)"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/batch.py",
    "tests/decoding/batch_test.py",
    ("padding_is_seen", "valid[place] = True", "valid[row] = True"),
    ("an_answer_begins_at_the_last_position", "positions[-1] + 1)", "positions[-1])"),
    ("shared_prefixes_need_no_entries", "np.where(prefixed, prompts.entries, rests)", "rests"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/params.py",
    "tests/decoding/params_test.py",
    ("int8_scales_of_inputs", '"up": (0,)', '"up": (1,)'),
    ("int8_without_scales", "(x.values.astype(jnp.float32) * x.scale)", "x.values"),
    ("text_columns_first", "vocab.image_size, axis=0)", "0, axis=0)"),
    ("heads_are_split_anyhow", 'None if rows % devices else "vocab"', '"vocab"'),
  ),
  *mutants_of(
    CACHE,
    f"{CACHE_TEST}::test_attention_over_the_cache_is_attention_over_what_was_written",
    ("entries_one_late", "into, x, entry, axis=2)", "into, x, entry + 1, axis=2)"),
  ),
  *mutants_of(
    CACHE,
    f"{CACHE_TEST}::test_int8_is_near",
    (
      "int8_values_without_scales",
      "weights *= self.value_scales.swapaxes(2, 3)",
      "weights *= 1.0",
    ),
    (
      "int8_keys_have_the_scales_of_values",
      "scores *= self.key_scales.swapaxes",
      "scores *= self.value_scales.swapaxes",
    ),
  ),
  *mutants_of(
    CACHE,
    STREAMS,
    ("keys_of_the_first_stream", "s, k[:, s], v[:, s])", "s, k[:, 0], v[:, s])"),
    ("mask_of_the_first_stream", ".attend(q[:, s], mask)", ".attend(q[:, s], masks[0])"),
    ("streams_of_other_samples", "jnp.stack(attended, axis=1)", "jnp.stack(attended, axis=0)"),
  ),
  *mutants_of(
    LOOP,
    STREAMS,
    (
      "the_last_entry_is_overwritten",
      "next_entries=loop.next_entries + 1",
      "next_entries=loop.next_entries",
    ),
    ("a_token_does_not_see_itself", "tuple(mark(x, loop.next_entries[s]) for s,", "tuple(x for s,"),
    (
      "guidance_of_exchanged_streams",
      "combine_streams(out, weights)",
      "combine_streams(out[::-1], weights)",
    ),
    (
      "prompts_seen_as_the_first_stream",
      "local_rows(seen, unique[:, s])",
      "local_rows(seen, unique[:, 0])",
    ),
    (
      "the_last_prompt_token_one_late",
      'positions=shard(prompts.last_positions, "batch")',
      'positions=shard(prompts.next_positions, "batch")',
    ),
  ),
  *mutants_of(
    LOOP,
    GROWS,
    ("the_end_is_guided_as_the_first_code", "place, grammar.image_tokens)", "place, 0)"),
    (
      "guidance_one_code_late",
      "jnp.minimum(grammar.codes_done(control.plan, state), grammar",
      "jnp.minimum(grammar.codes_done(control.plan, state) + 1, grammar",
    ),
  ),
  *mutants_of(
    LOOP,
    f"{GENERATOR_TEST}::test_divergence_is_the_mean_kl_of_the_streams_over_image_codes",
    ("divergence_from_the_prompt", "out[0], out[-1]]", "out[-1], out[0]]"),
  ),
  *mutants_of(
    LOOP,
    "tests/decoding/loop_test.py::test_cached_equals_uncached",
    (
      "rests_do_not_see_their_prefix",
      "ends = entry + jnp.arange(length)",
      "ends = jnp.arange(length)",
    ),
  ),
  *mutants_of(
    LOOP,
    f"{GENERATOR_TEST}::test_a_cache_that_grows_equals_plain_passes",
    (
      "a_grown_cache_is_seen_shifted",
      "jnp.pad(x, ((0, 0), (0, by)))",
      "jnp.pad(x, ((0, 0), (by, 0)))",
    ),
    ("a_step_without_room", "jnp.minimum(steps, free)", "steps"),
  ),
  *mutants_of(
    LOOP,
    "tests/decoding/continuous/engine_test.py::test_any_schedule_gives_the_samples_of_generate",
    (
      "entries_of_the_first_stream",
      "cache.write(loop.next_entries[s], k, v)",
      "cache.write(loop.next_entries[0], k, v)",
    ),
    ("every_token_has_the_first_noise", "(keys, loop.count)", "(keys, 0 * loop.count)"),
  ),
  *mutants_of(
    SPECULATIVE,
    f"{SPECULATIVE_TEST}::test_each_token_that_counts_is_one_of_p",
    (
      "a_failed_draft_is_sampled_from_p",
      "jnp.concatenate([odds, jnp.zeros_like(p[-1:])])",
      "jnp.zeros_like(p)",
    ),
    ("drafts_after_a_failed_one_hold", "jnp.cumprod(holds.astype(jnp.int32)).sum()", "holds.sum()"),
  ),
  *mutants_of(
    SPECULATIVE,
    f"{SPECULATIVE_TEST}::test_log_probs_are_those_of_plain_passes_and_the_end_is_sampled",
    ("drafts_one_position_late", "+ jnp.arange(window - 1)[None]", "+ jnp.arange(1, window)[None]"),
    ("drafts_do_not_see_themselves", "(entries <= ends)", "(entries < ends)"),
  ),
  *mutants_of(
    SPECULATIVE,
    f"{SPECULATIVE_TEST}"
    "::test_a_window_has_the_weights_of_its_places_and_the_end_follows_all_codes",
    (
      "a_window_has_the_weights_of_the_first",
      "jnp.minimum(done[:, None] + jnp",
      "jnp.minimum(0 * done[:, None] + jnp",
    ),
    (
      "the_end_overwrites_the_last_code",
      "next_entries=loop.next_entries + codes,",
      "next_entries=loop.next_entries + codes - 1,",
    ),
    (
      "the_end_does_not_see_the_first_code",
      "written = (entries >= loop",
      "written = (entries > loop",
    ),
  ),
)
