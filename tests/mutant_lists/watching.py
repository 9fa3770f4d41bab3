"""Mutants of what watches a run: hang watch, boards, metrics for Prometheus, checked steps."""

from tests.mutant_lists.mutant import mutants_of

WATCH, WATCH_TEST = (
  "cm3leon_jax/training/faults/hang_watch.py",
  "tests/training/faults/hang_watch_test.py",
)
REPLAY_TEST = "tests/training/faults/replay_test.py"

WATCHING = (
  *mutants_of(
    WATCH,
    f"{WATCH_TEST}::test_the_process_that_has_not_arrived_is_named",
    ("the_first_to_arrive_is_late", "if key == first]", "if key == last]"),
    ("data_before_the_step", 'ORDER = ("restore", "step",', 'ORDER = ("restore", "data", "step",'),
    ("silent_processes_are_left_out", "if report is None]", "if report == {}]"),
  ),
  *mutants_of(
    WATCH,
    f"{WATCH_TEST}::test_steps_that_are_long_from_the_beginning_have_ten_times_as_long",
    ("long_steps_are_a_hang", "LONGEST * self._longest", "self._longest"),
  ),
  *mutants_of(
    WATCH,
    f"{WATCH_TEST}::test_time_in_other_phases_makes_no_step_long",
    ("a_long_save_counts_as_a_step", 'seconds["step"] + seconds["data"]', "sum(seconds.values())"),
  ),
  *mutants_of(
    WATCH,
    f"{WATCH_TEST}::test_what_is_no_step_may_take_four_times_as_long",
    ("a_save_is_a_hang", "else SLOW * base", "else base"),
  ),
  *mutants_of(
    WATCH,
    f"{WATCH_TEST}::test_the_first_steps_compile",
    ("compiling_is_a_hang", "COMPILED = 3", "COMPILED = 1"),
  ),
  *mutants_of(
    WATCH,
    f"{WATCH_TEST}::test_a_process_that_was_stopped_as_a_whole_gets_its_time_again",
    ("ctrl_z_is_a_hang", "self._sign = now  #", "pass  #"),
  ),
  *mutants_of(
    WATCH,
    f"{WATCH_TEST}::test_the_first_process_names_the_late_one_and_prints_its_stacks",
    ("reports_of_an_earlier_start", 'report.get("start") == self._start', "report"),
  ),
  *mutants_of(
    "cm3leon_jax/training/watch/boards.py",
    "tests/training/watch/boards_test.py",
    ("a_board_warns_again", "    self._instead = None\n", "    pass\n"),
    ("a_board_ends_the_run", "except Exception as error:", "except ImportError as error:"),
  ),
  *mutants_of(
    "cm3leon_jax/training/watch/monitor.py",
    "tests/training/watch/monitor_test.py",
    (
      "a_step_has_the_time_of_the_checked_one",
      "if is_checked(self._config, step) or",
      "if",
    ),
    ("a_fingerprint_has_the_time_of_a_step", " or is_checked(self._config, step + 1)", ""),
    ("a_step_that_blocks_takes_no_time", "halved=ended is not None", "halved=False"),
    ("a_printed_rate_is_that_of_one_step", "      if self._unprinted[2]:", "      if False:"),
  ),
  *mutants_of(
    "cm3leon_jax/training/watch/prometheus.py",
    "tests/training/watch/prometheus_test.py",
    ("an_evaluation_is_a_step", '    if "loss" in values:\n', "    if values:\n"),
    ("everything_is_served", '!= "/metrics"', '== "/never"'),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/fingerprint.py",
    f"{REPLAY_TEST}::test_a_digest_by_hand",
    ("a_digest_loses_the_first_word", "(hashed | 1)", "hashed"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/fingerprint.py",
    f"{REPLAY_TEST}::test_a_tolerance_lets_rounding_pass_and_nothing_that_is_not_finite",
    ("an_infinite_norm_hides_an_error", "np.minimum(a.norm", "np.maximum(a.norm"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/assignment.py",
    f"{REPLAY_TEST}::test_moved_arrays_are_the_same_on_other_devices",
    ("arrays_move_the_other_way", "(i + assignment.shift) % size", "(i - assignment.shift) % size"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/replay.py",
    f"{REPLAY_TEST}::test_a_flip_is_found_and_its_device_named",
    ("the_runs_own_state_counts", "return 2 if self.wrong == (0,) else 0", "return 0"),
    (
      "a_state_may_change",
      "before.digest != now.digest",
      "before.digest != before.digest",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/replay.py",
    f"{REPLAY_TEST}::test_a_flip_in_one_replica_is_found_at_the_next_checked_step",
    (
      "replicas_may_differ",
      'different_replicas(prints["read"], self._first_replicas, tolerance)',
      "([], [])",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/replay.py",
    f"{REPLAY_TEST}::test_different_replicas_start_again_unless_a_checkpoint_may_hold_them",
    ("the_newest_checkpoint_is_sound", "if newest < since:", "if newest < since + 1:"),
    ("every_checkpoint_may_hold_it", "self._stop(self._sound + 1, again)", "self._stop(0, again)"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/replay.py",
    f"{REPLAY_TEST}::test_all_processes_name_the_replicas_that_the_first_one_found",
    ("what_another_process_found_is_lost", "for found in findings if found[0]", "for found in ()"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/replicas.py",
    f"{REPLAY_TEST}::test_replicas_of_a_shard_by_hand",
    ("the_first_replica_is_right", "alone[replicas] |= equal", "alone[replicas] &= equal"),
    ("a_majority_is_named", "tolerance).sum(0) == 1", "tolerance).sum(0) > 1"),
    ("shards_are_replicas", "(s.start, s.stop) for s in", "s.step for s in"),
    ("half_of_four_are_named", "alone if alone.any() else concerned", "alone"),
    ("replicas_have_no_tolerance", "~equal(found, of_first, tolerance)", "~equal(found, of_first)"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/replay.py",
    f"{REPLAY_TEST}::test_on_two_devices_an_error_that_repeats_is_no_majority",
    ("an_error_confirms_itself", "self.undecided or self.unconfirmed", "self.undecided"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/replay.py",
    f"{REPLAY_TEST}::test_a_wrong_state_is_gone_when_the_right_one_is_copied",
    ("a_third_state_is_held", "x.delete()  #", "pass  #"),
  ),
  *mutants_of(
    "cm3leon_jax/training/faults/replay.py",
    f"{REPLAY_TEST}::test_all_processes_follow_the_first_one_that_found_a_difference",
    (
      "each_process_decides_alone",
      "distributed.gather(dataclasses.asdict(verdict))",
      "[dataclasses.asdict(verdict)]",
    ),
  ),
)
