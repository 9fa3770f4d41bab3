"""Lists mutants of monitoring: hang watchdog, metric dashboards, Prometheus, checks of steps."""

from tests.mutant_lists.mutant import mutants_of

WATCH, WATCH_TEST = (
  "cm3leon_jax/training/faults/hang_watch.py",
  "tests/training/faults/hang_watch_test.py",
)
REPLAY_TEST = "tests/training/faults/replay_test.py"

WATCHING = mutants_of(
  WATCH,
  f"{WATCH_TEST}::test_the_process_that_has_not_arrived_is_named",
  ("the_first_to_arrive_is_late", "if key == first]", "if key == last]"),
  f"{WATCH_TEST}::test_a_process_that_was_stopped_as_a_whole_gets_its_time_again",
  ("ctrl_z_is_a_hang", "self._sign = now  #", "pass  #"),
  "cm3leon_jax/training/watch/boards.py",
  ("a_board_ends_the_run", "except Exception as error:", "except ImportError as error:"),
  "cm3leon_jax/training/watch/monitor.py",
  ("a_fingerprint_has_the_time_of_a_step", " or is_checked(self._config, step + 1)", ""),
  "cm3leon_jax/training/watch/prometheus.py",
  ("everything_is_served", '!= "/metrics"', '== "/never"'),
  "cm3leon_jax/training/faults/fingerprint.py",
  f"{REPLAY_TEST}::test_a_tolerance_lets_rounding_pass_and_nothing_that_is_not_finite",
  ("an_infinite_norm_hides_an_error", "np.minimum(a.norm", "np.maximum(a.norm"),
  "cm3leon_jax/training/faults/assignment.py",
  f"{REPLAY_TEST}::test_moved_arrays_are_the_same_on_other_devices",
  ("arrays_move_the_other_way", "(i + assignment.shift) % size", "(i - assignment.shift) % size"),
  "cm3leon_jax/training/faults/replay.py",
  f"{REPLAY_TEST}::test_a_flip_in_one_replica_is_found_at_the_next_checked_step",
  (
    "replicas_may_differ",
    'different_replicas(prints["read"], self._first_replicas, tolerance)',
    "([], [])",
  ),
  f"{REPLAY_TEST}::test_different_replicas_start_again_unless_a_checkpoint_may_hold_them",
  ("the_newest_checkpoint_is_sound", "if newest < since:", "if newest < since + 1:"),
  "cm3leon_jax/training/faults/fingerprint.py",
  f"{REPLAY_TEST}::test_replicas_of_a_shard_by_hand",
  ("the_first_replica_is_right", "alone[replicas] |= equal", "alone[replicas] &= equal"),
  "cm3leon_jax/training/faults/replay.py",
  f"{REPLAY_TEST}::test_all_processes_follow_the_first_one_that_found_a_difference",
  (
    "each_process_decides_alone",
    "distributed.gather(dataclasses.asdict(verdict))",
    "[dataclasses.asdict(verdict)]",
  ),
)
