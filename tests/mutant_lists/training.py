"""Mutants of the loss, the optimizer, checkpoints and the small trainers."""

from tests.mutant_lists.mutant import mutants_of

LOSS = "cm3leon_jax/training/step/loss.py"
LOSS_TEST = "tests/training/step/loss_test.py"
STATE = "cm3leon_jax/training/step/state.py"
STATE_TEST = "tests/training/step/state_test.py"
NUMERICS = "cm3leon_jax/training/step/numerics.py"
NUMERICS_TEST = "tests/training/step/numerics_test.py"
SKIPPED_TEST = "tests/training/faults/skipped_rows_test.py"
SOURCES_TEST = "tests/training/source_losses_test.py"
CHECKPOINT = "cm3leon_jax/checkpoints/checkpoint.py"
CHECKPOINT_TEST = "tests/checkpoints/checkpoint_test.py"
SAVING = "cm3leon_jax/training/saves/saving.py"
UNREADABLE_TEST = "tests/training/unreadable_test.py"
POLICY, POLICY_TEST = "cm3leon_jax/training/step/grpo.py", "tests/training/step/grpo_test.py"

TRAINING = (
  *mutants_of(
    LOSS,
    f"{LOSS_TEST}::test_chunked_and_sharded_equals_plain_fp64",
    (
      "last_chunk_skipped",
      "values = whole(nll), whole(log_z)",
      "values = whole(nll.at[-1].set(0)), whole(log_z)",
    ),
    ("maximum_of_one_shard", "jax.lax.pmax(jnp.max(logits, -1), tensor)", "jnp.max(logits, -1)"),
  ),
  *mutants_of(
    LOSS,
    f"{LOSS_TEST}::test_the_hand_written_gradient_equals_autodiff_of_the_full_logits",
    (
      "table_gradient_of_one_data_shard",
      'jax.lax.psum(_scattered(by_rows), "data")',
      "_scattered(by_rows)",
    ),
    ("z_loss_gradient_halved", "1 + 2 * z_loss * log_z", "1 + z_loss * log_z"),
  ),
  *mutants_of(
    LOSS,
    f"{LOSS_TEST}::test_large_logits_and_z_loss",
    ("z_loss_sign", "nll + z_loss * log_z**2", "nll - z_loss * log_z**2"),
  ),
  *mutants_of(
    LOSS,
    f"{LOSS_TEST}::test_modality_losses_literal",
    ("first_code_is_text", "targets >= text_size", "targets > text_size"),
  ),
  *mutants_of(
    LOSS,
    f"{SOURCES_TEST}::test_source_sums_literal",
    ("sources_counted_from_0", "jnp.arange(1, num_sources + 1,", "jnp.arange(0, num_sources,"),
    ("source_nll_unweighted", "values = (weights * nll, weights)", "values = (nll, weights)"),
  ),
  *mutants_of(
    "cm3leon_jax/data/rows/loader.py",
    f"{SOURCES_TEST}::test_a_row_names_the_source_of_each_slot",
    (
      "slots_of_other_sources",
      "[p.source + 1 for p in placements]",
      "[p.source for p in placements]",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/planning/programs.py",
    "tests/planning/programs_test.py::test_the_steps_of_a_tuning_are_those_of_its_run",
    ("planned_without_sources", 'num_sources=num_sources(settings, "train")', "num_sources=0"),
  ),
  *mutants_of(
    "cm3leon_jax/training/watch/heldout.py",
    f"{SOURCES_TEST}::test_a_killed_run_has_step_0_once",
    ("step_0_is_lost", "self._monitor.logged_heldout(0)", "{}"),
  ),
  *mutants_of(
    "cm3leon_jax/training/step/optimizer.py",
    "tests/training/step/optimizer_test.py",
    ("clipping_removed", "optax.clip_by_global_norm(config.clip_norm)", "optax.identity()"),
    ("adam_b1_half", "    config.b1,", "    0.5,"),
    ("decay_of_everything", "mask=decayed", "mask=None"),
    ("muon_of_another_size", "consistent_rms=UPDATE_RMS", "consistent_rms=None"),
    ("muon_decays_everything", "(config.weight_decay, decayed)", "(config.weight_decay)"),
    (
      "heads_mixed_up",
      '"qkv": MuonDimensionNumbers((-3,), (-2, -1))',
      '"qkv": MuonDimensionNumbers((-3, -2), (-1,))',
    ),
  ),
  *mutants_of(
    STATE,
    f"{STATE_TEST}::test_mesh_and_accumulation_change_nothing",
    (
      "accumulation_by_maximum",
      "jax.tree.map(jnp.add, grads, part_grads)",
      "jax.tree.map(jnp.maximum, grads, part_grads)",
    ),
  ),
  *mutants_of(
    STATE,
    f"{NUMERICS_TEST}::test_a_poisoned_batch_leaves_no_trace",
    (
      "skipped_steps_are_taken",
      "sound = numerics.is_sound(value, norm, opt_state)",
      "sound = jnp.bool_(True)",
    ),
    (
      "average_of_a_skipped_step_moves",
      "numerics.select(sound, (params, opt_state, ema), old)",
      "(*numerics.select(sound, (params, opt_state), old[:2]), ema)",
    ),
  ),
  *mutants_of(
    NUMERICS,
    f"{NUMERICS_TEST}::test_spikes_by_hand",
    ("infinite_losses_are_sound", "jnp.isfinite(value) & ", "~jnp.isnan(value) & "),
    ("spikes_are_sound", " & ~spike\n", "\n"),
  ),
  *mutants_of(
    "cm3leon_jax/training/loop.py",
    "tests/training/loop_test.py::test_hooks_are_called_in_their_order_around_each_step",
    (
      "ready_before_the_batch",
      "    batch = next(batches)\n    for hook in hooks:\n      hook.ready(step)\n",
      "    for hook in hooks:\n      hook.ready(step)\n    batch = next(batches)\n",
    ),
  ),
  *mutants_of(
    SAVING,
    f"{SKIPPED_TEST}::test_too_many_skipped_steps_stop_the_run_and_it_goes_on_without_their_rows",
    ("skipped_steps_are_saved", "or not skipped or", "or skipped < 2 or"),
  ),
  *mutants_of(
    SAVING,
    f"{SKIPPED_TEST}::test_a_parameter_that_is_not_finite_is_not_saved",
    ("nans_are_saved", 'check_finite(state, f"checkpoint {step}", REMEDY)', "pass"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/skipped_rows.py",
    f"{SKIPPED_TEST}::test_row_number_by_hand",
    ("rows_left_out_by_their_count_alone", "if i >= first:", "if i > first:"),
  ),
  *mutants_of(
    STATE,
    f"{STATE_TEST}::test_loss_and_gradient_are_those_of_a_weighted_mean",
    ("loss_not_normalized", "return value / total, loss", "return value, loss"),
  ),
  *mutants_of(
    STATE,
    f"{STATE_TEST}::test_the_average_on_a_mesh_is_the_recursion_of_the_parameters",
    (
      "average_of_the_parameters_before_the_step",
      "update_average(ema, params,",
      "update_average(ema, state.params,",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/training/step/optimizer.py",
    "tests/training/step/optimizer_test.py::test_the_average_is_the_recursion_of_its_documentation",
    ("average_without_warm_up", "jnp.maximum(1 - decay, 9 / (10 + step))", "1 - decay"),
  ),
  *mutants_of(
    "cm3leon_jax/weights/stored.py",
    f"{CHECKPOINT_TEST}::test_parameters_alone_are_the_average_of_a_run_that_has_one",
    ("average_not_read", '"ema" if described', '"params" if described'),
  ),
  *mutants_of(
    "cm3leon_jax/trained/initial.py",
    "tests/trained/initial_test.py::test_a_checkpoint_of_the_same_step_that_was_trained_anew_is_refused",
    ("changed_source_unnoticed", "!= weights:", "is None:"),
  ),
  *mutants_of(
    "cm3leon_jax/checkpoints/sealing.py",
    f"{CHECKPOINT_TEST}::test_a_damaged_file_is_refused",
    (
      "digests_not_compared",
      "expected.get(name) != _digest(folder / name)",
      "_digest(folder / name) is None",
    ),
  ),
  *mutants_of(
    CHECKPOINT,
    f"{UNREADABLE_TEST}::test_a_file_that_cannot_be_read_is_named_and_nothing_is_deleted",
    (
      "unreadable_digests_are_absent",
      "if exists(self._digest_path(step))",
      "if self._digest_path(step).exists()",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/training/watch/metrics.py",
    "tests/training/watch/metrics_test.py",
    ("changed_log_unnoticed", '"differs from what was written" if changed else ""', '""'),
  ),
  *mutants_of(
    "cm3leon_jax/training/small/trainer.py",
    "tests/training/small/trainer_test.py::test_checkpoints_without_their_config_are_refused_and_kept",
    ("checkpoints_without_config_accepted", "elif any_in(folder):", "elif False:"),
  ),
  *mutants_of(
    CHECKPOINT,
    f"{CHECKPOINT_TEST}::test_a_checkpoint_without_digests_does_not_count",
    (
      "unsealed_checkpoints_count",
      "[step] if exists(self._digest_path(step)) else []",
      "[step]",
    ),
  ),
  *mutants_of(
    CHECKPOINT,
    f"{CHECKPOINT_TEST}::test_a_job_that_lost_its_lease_neither_saves_nor_seals",
    ("saved_without_lease", "    self._check()\n    # A killed run", "    # A killed run"),
  ),
  *mutants_of(
    "cm3leon_jax/checkpoints/retention.py",
    "tests/checkpoints/retention_test.py::test_a_checkpoint_is_kept_for_any_of_three_reasons",
    ("worst_is_kept", "else -loss", "else loss"),
  ),
  *mutants_of(
    CHECKPOINT,
    "tests/commands/checkpoints_test.py::test_rollback_removes_what_is_newer_and_says_so",
    ("rolled_back_too_far", "if newer > step:", "if newer >= step:"),
  ),
  *mutants_of(
    "cm3leon_jax/training/saves/upkeep.py",
    "tests/commands/checkpoints_test.py::test_prune_removes_nothing_if_the_newest_is_damaged",
    ("pruned_to_damage", "if not checkpoints.damage(newest):", "if True:"),
  ),
  *mutants_of(
    "cm3leon_jax/training/small/clip_training.py",
    "tests/training/small/clip_training_test.py::test_loss_is_the_oracle",
    ("one_concept_is_a_negative", "& ~jnp.eye(len(concepts), dtype=bool)", ""),
  ),
  *mutants_of(
    "cm3leon_jax/training/small/trainer.py",
    "tests/training/small/trainer_test.py::test_a_killed_training_continues_bit_for_bit",
    ("small_trainer_restarts", "range(done + 1, config.steps + 1)", "range(1, config.steps + 1)"),
  ),
  *mutants_of(
    "cm3leon_jax/training/small/trainer.py",
    "tests/training/small/trainer_test.py::test_layout_of_arrays_in_literals",
    ("small_state_replicated", "< SPLIT_FROM or not divisible", ">= 0"),
  ),
  *mutants_of(
    POLICY,
    f"{POLICY_TEST}::test_a_step_follows_the_gradient_of_its_definition",
    ("policy_sign", "-jnp.mean(rollout.advantages", "jnp.mean(rollout.advantages"),
    ("kl_not_weighted", "+ kl_weight * kl", "+ kl"),
    ("kl_of_the_policy", "(of_reference - log_probs)", "(log_probs - of_reference)"),
    ("policy_without_temperature", "logits / temperature", "logits"),
  ),
  *mutants_of(
    POLICY,
    f"{POLICY_TEST}::test_log_probs_are_those_of_the_decoder",
    (
      "policy_streams_swapped",
      "rollout.guidance.swapaxes(1, 2)",
      "rollout.guidance[..., ::-1].swapaxes(1, 2)",
    ),
    ("policy_codes_one_late", "ids[:-1], at[:-1], 1", "ids[1:], at[1:], 1"),
  ),
  *mutants_of(
    POLICY,
    f"{POLICY_TEST}::test_advantages_are_standard_deviations_of_a_group",
    ("advantages_not_centered", "rewards - rewards.mean(1, keepdims=True)", "rewards"),
  ),
  *mutants_of(
    "cm3leon_jax/reinforcement/rollouts.py",
    "tests/reinforcement/rollouts_test.py::test_a_step_depends_on_its_number_alone_and_groups_share_their_prompt",
    ("every_step_draws_alike", "itertools.count(first, each)", "itertools.repeat(first)"),
  ),
  *mutants_of(
    "cm3leon_jax/training/step/accumulation.py",
    "tests/training/step/accumulation_test.py::test_the_mesh_sets_the_passes_of_a_batch",
    ("rows_count_as_passes", "steps = config.global_batch_size // parts", "steps = rows"),
  ),
  *mutants_of(
    "cm3leon_jax/planning/memory.py",
    "tests/planning/memory_test.py::test_a_step_that_does_not_fit_names_the_flags_that_fit",
    ("flags_that_do_not_fit", "shape, platform).total <= limit", "shape, platform).kept <= limit"),
  ),
)
