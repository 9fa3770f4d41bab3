"""Lists mutants of the decoder: attention, norms, rotary positions, and initial parameters."""

from tests.mutant_lists.mutant import mutants_of

ATTENTION, ATTENTION_TEST = "cm3leon_jax/models/attention.py", "tests/models/attention_test.py"
TRANSFORMER_TEST = "tests/models/transformer_test.py"

MODELS = mutants_of(
  ATTENTION,
  f"{ATTENTION_TEST}::test_blocks_of_queries_equal_the_full_matrix_in_fp64",
  ("scores_without_their_scale", " * q.shape[-1] ** -0.5\n  )", "\n  )"),
  ("no_token_sees_itself", "None] >= jnp.arange(stop)", "None] > jnp.arange(stop)"),
  (
    "every_block_is_the_first",
    "jnp.arange(start, stop)[:, None]",
    "jnp.arange(stop - start)[:, None]",
  ),
  f"{ATTENTION_TEST}::test_scores_of_bfloat16_are_summed_in_fp32",
  ("scores_in_the_compute_dtype", ", preferred_element_type=wide(q.dtype)", ""),
  f"{ATTENTION_TEST}::test_the_kernels_equal_plain_attention_and_so_do_their_gradients",
  ("splash_without_scale", "(q * scale, k, v, ids)", "(q, k, v, ids)"),
  ("triton_without_segments", "*rows_first, segment_ids, sm", "*rows_first, None, sm"),
  f"{TRANSFORMER_TEST}::test_packed_samples_do_not_see_each_other",
  (
    "packed_samples_see_each_other",
    "== segment_ids[:, None, None, :stop]",
    ">= segment_ids[:, None, None, :stop]",
  ),
  "cm3leon_jax/models/transformer.py",
  f"{TRANSFORMER_TEST}::test_positions_of_opt_start_at_the_papers_spread",
  ("positions_900_times_too_large", "POSITION_RATIO = 1 / 30", "POSITION_RATIO = 30"),
  f"{TRANSFORMER_TEST}::test_opt_starts_with_equal_logits_up_to_the_tied_table",
  (
    "layers_start_at_random",
    "out_std = 0.0 if traits.starts_as_identity else std",
    "out_std = std",
  ),
  (
    "attention_replaces_the_stream",
    'x = x + product("out", "BLNh,NhD->BLD"',
    'x = product("out", "BLNh,NhD->BLD"',
  ),
  "tests/models/look_up_test.py",
  (
    "embedding_gradient_in_bf16",
    "  wide = attention.wide(table.dtype)\n",
    "  wide = jnp.dtype(dtype)\n",
  ),
  f"{TRANSFORMER_TEST}::test_rotation_literals",
  ("rotary_wavelengths_of_the_whole_head", "wide) / half)", "wide) / x.shape[-1])"),
  ("rotary_pairs_are_mirrored", "b * cos + a * sin]", "b * cos - a * sin]"),
  f"{TRANSFORMER_TEST}::test_norms_of_bfloat16_are_computed_in_fp32",
  ("norms_in_the_compute_dtype", "x32 = x.astype(attention.wide(x.dtype))", "x32 = x"),
  ("layer_norm_is_not_centered", "x32 = x32 - x32.mean(-1, keepdims=True)", "x32 = x32"),
  f"{TRANSFORMER_TEST}::test_logits_of_bfloat16_are_fp32",
  ("logits_in_the_compute_dtype", ": attention.wide(hidden.dtype),", ": hidden.dtype,"),
  f"{TRANSFORMER_TEST}::test_what_a_remat_policy_keeps",
  ("attention_is_computed_again", '"save_qkv": ("qkv", "attention"),', '"save_qkv": ("qkv",),'),
  f"{TRANSFORMER_TEST}::test_a_decoder_is_that_of_plain_numpy",
  (
    "keys_have_no_norm",
    'apply_norm(scale("q_norm"), q), apply_norm(scale("k_norm"), k)',
    'apply_norm(scale("q_norm"), q), k',
  ),
  ("the_second_norm_is_left_out", 'h = apply_norm(scale("norm2"), x)', "h = x"),
  ("the_gate_is_the_value", "up * jax.nn.silu(gate)", "gate * jax.nn.silu(up)"),
  ("rotary_base_of_the_config_ignored", "positions, config.rotary_base)", "positions)"),
  "tests/models/start_test.py::test_only_codes_change_and_codes_that_look_alike_are_near",
  ("variance_of_codes_shrinks", "math.sqrt(share) * std * rows", "share * std * rows"),
  ("texts_look_like_codes", "((text_size, 0), (0, 0))", "((0, text_size), (0, 0))"),
  "tests/models/start_test.py::test_a_direction_of_rounding_errors_stays_0",
  ("noise_of_a_codebook_is_whitened", "(values > 1e-6 * values[0])", "(values > 0)"),
  "cm3leon_jax/models/products.py",
  ("gradients_are_not_summed_over_devices", ", unreduced=stored.reduced", ""),
  ("accelerators_get_the_gradient_of_cpus", 'platform == "cpu"', 'platform != "gpu"'),
  ("cpus_get_the_gradient_of_accelerators", 'platform == "cpu"', 'platform == ""'),
)
