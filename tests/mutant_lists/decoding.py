"""Mutants of the decoding engine: sampling, guidance, grammar, cache and speculation."""

from tests.mutant_lists.mutant import mutants_of

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
    "tests/decoding/generator_test.py",
    (
      "divergence_of_the_guided_stream",
      "for x in logits[1:]]",
      "for x in logits[::2]]",
    ),
    ("divergence_counts_texts", "apart = jnp.where(is_image, apart, 0)", "apart = 1.0 * apart"),
  ),
  *mutants_of(
    "cm3leon_jax/decoding/continuous/buckets.py",
    "tests/decoding/continuous/buckets_test.py",
    ("rings_that_end_early", "prompt + new_tokens <= capacity", "prompt <= capacity"),
    ("buckets_of_other_candidates", "sampler == all_candidates else", "True else"),
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
)
