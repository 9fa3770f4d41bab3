"""Lists mutants of the HTTP server: batching, disconnected clients, limits, displayed values."""

from tests.mutant_lists.mutant import mutants_of

ENGINE = "tests/serving/engine_test.py"
APP = "tests/serving/web/app_test.py"
REFUSALS = "tests/serving/refusals_test.py"
CACHE = "tests/serving/program_cache_test.py"

SERVING = mutants_of(
  "cm3leon_jax/serving/engine.py",
  f"{ENGINE}::test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_slots",
  (
    "who_left_keeps_slots",
    "if opened.job.cancelled or opened.failed:\n        self._generator.remove(ticket)",
    "if opened.failed:\n        self._generator.remove(ticket)",
  ),
  f"{ENGINE}::test_too_many_waiting_requests_are_refused_with_a_time_to_come_again",
  ("queue_one_more", "if self.waiting >= self.queue_limit:", "if self.waiting > self.queue_limit:"),
  f"{APP}::test_images_are_those_of_the_python_call",
  (
    "samples_of_one_seed",
    "seed = sample_seed(job.task.seed, index)",
    "seed = sample_seed(job.task.seed, 0)",
  ),
  "cm3leon_jax/serving/web/limits.py",
  REFUSALS,
  ("any_host", "not is_loopback(_name_of(host)):", "not _name_of(host):"),
  ("any_token", 'if kind.lower() != "bearer" or not right:', 'if kind.lower() != "bearer":'),
  "tests/serving/open_bodies_test.py",
  ("bodies_of_all_without_end", "if held and self._held >", "if False and self._held >"),
  "cm3leon_jax/serving/engine.py",
  "tests/serving/decoding_test.py",
  (
    "places_take_no_space",
    "len(self._places) + len(self._incoming) + sum(",
    "len(self._incoming) + sum(",
  ),
  "cm3leon_jax/serving/web/request_log.py",
  "tests/serving/web/request_log_test.py::test_a_line_has_what_a_request_cost",
  ("any_request_id", r'r"[\w.:/+=-]{1,128}"', '".*"'),
  "cm3leon_jax/serving/program_cache.py",
  ("one_folder_for_all_machines", "features[2].split()", "features[1].split()"),
  "cm3leon_jax/serving/uploads.py",
  REFUSALS,
  ("only_width_counts", "if width * height > most_pixels:", "if width > most_pixels:"),
  "cm3leon_jax/serving/partial.py",
  f"{APP}::test_a_box_fills_row_by_row_within_the_given_image",
  ("half_a_row_is_shown", "done = rows * (right - left)", "done = len(codes)"),
)
