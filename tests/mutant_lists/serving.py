"""Mutants of the HTTP server: batches, clients that leave, limits, what is shown."""

from tests.mutant_lists.mutant import mutants_of

ENGINE = "tests/serving/engine_test.py"
APP = "tests/serving/web/app_test.py"
REFUSALS = "tests/serving/refusals_test.py"
LOG = "tests/serving/web/request_log_test.py"
BODIES = "tests/serving/open_bodies_test.py"
DECODING = "tests/serving/decoding_test.py"
CACHE = "tests/serving/program_cache_test.py"

SERVING = (
  *mutants_of(
    "cm3leon_jax/serving/engine.py",
    ENGINE,
    (
      "who_left_keeps_slots",
      "if opened.job.cancelled or opened.failed:\n        self._generator.remove(ticket)",
      "if opened.failed:\n        self._generator.remove(ticket)",
    ),
    (
      "queue_one_more",
      "if self.waiting >= self.queue_limit:",
      "if self.waiting > self.queue_limit:",
    ),
    (
      "who_has_begun_waits_no_more",
      "sum(o.waits for o in list(self._open))",
      "sum(not o.begun for o in list(self._open))",
    ),
    ("one_spoils_all", "      if len(parts) > 1:", "      if len(parts) > 2:"),
    ("one_job_first", "self._open.append(opened)", "self._open.appendleft(opened)"),
    ("folders_in_answers", 'message.replace(str(bank), "the bank")', "message"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/engine.py",
    f"{APP}::test_images_are_those_of_the_python_call",
    (
      "samples_of_one_seed",
      "seed = sample_seed(job.task.seed, index)",
      "seed = sample_seed(job.task.seed, 0)",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/serving/web/streams.py",
    f"{ENGINE}::test_a_client_that_leaves_before_its_answer_frees_its_slots",
    ("nobody_looks_who_left", "await asyncio.wait({task, gone}", "await asyncio.wait({task}"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/web/limits.py",
    REFUSALS,
    ("any_host", "not is_loopback(_name_of(host)):", "not _name_of(host):"),
    ("any_account", r"([\w.-]+))", r"(?:[\w.-]+@)?([\w.-]+))"),
    ("any_port", "> 65_535", "> 99_999"),
    ("any_origin", "is not None and origin not in (", "is not None and origin in ("),
    ("any_scheme", 'f"https://{host}",', 'f"https://{host}", f"evil://{host}",'),
    ("any_token", 'if kind.lower() != "bearer" or not right:', 'if kind.lower() != "bearer":'),
    ("bodies_without_end", "if received > self._limits.most_bytes:", "if received < 0:"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/web/limits.py",
    BODIES,
    ("bodies_of_all_without_end", "if held and self._held >", "if False and self._held >"),
    ("bodies_are_held_for_ever", "self._held -= held", "self._held -= 0"),
    ("small_bodies_count", "max(received - SMALL, 0)", "received"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/web/server.py",
    BODIES,
    ("any_number_of_chunks", "if self.small > MOST_SMALL:", "if self.small < 0:"),
    ("chunks_of_all_requests", "self.small = 0\n    elif", "pass\n    elif"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/engine.py",
    DECODING,
    (
      "places_take_no_room",
      "len(self._places) + len(self._incoming) + sum(",
      "len(self._incoming) + sum(",
    ),
  ),
  *mutants_of(
    "cm3leon_jax/serving/web/app.py",
    DECODING,
    ("decoders_of_all", "run_in_executor(self._decoders,", "run_in_executor(None,"),
    ("who_left_is_decoded", "unless_gone(request, decoding)", "decoding"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/web/request_log.py",
    f"{LOG}::test_a_line_has_what_a_request_cost",
    ("a_path_begins_a_line", "quote(path)[:LONGEST_PATH]", "path[:LONGEST_PATH]"),
    ("any_request_id", r'r"[\w.:/+=-]{1,128}"', '".*"'),
  ),
  *mutants_of(
    "cm3leon_jax/serving/program_cache.py",
    CACHE,
    (
      "small_programs_are_compiled_again",
      'jax_persistent_cache_min_compile_time_secs", 0.0',
      'jax_persistent_cache_min_compile_time_secs", 1.0',
    ),
    ("one_folder_for_all_machines", "features[2].split()", "features[1].split()"),
    ("programs_of_others", "mode=0o700", "mode=0o777"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/uploads.py",
    REFUSALS,
    ("only_width_counts", "if width * height > most_pixels:", "if width > most_pixels:"),
    ("addresses_are_data", "_DATA_URL.match(url)", '_DATA_URL.match(url) or re.match("", url)'),
  ),
  *mutants_of(
    "cm3leon_jax/serving/schemas.py",
    REFUSALS,
    ("nan_is_a_number", "from_json(text, allow_inf_nan=False)", "from_json(text)"),
    ("bodies_of_many_values", "if marks > MOST_MARKS:", "if marks < 0:"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/partial.py",
    f"{APP}::test_a_box_fills_row_by_row_within_the_given_image",
    ("half_a_row_is_shown", "done = rows * (right - left)", "done = len(codes)"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/partial.py",
    f"{APP}::test_masks_in_a_text_are_filled_in",
    ("one_hole_is_the_text", "isinstance(task, InfillText)", "isinstance(task, Caption)"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/tasks.py",
    f"{REFUSALS}::test_wrong_fields_of_chats",
    ("more_than_there_is_room_for", "(length or 1) > most", "(length or 1) > most + 1"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/web/server.py",
    f"{ENGINE}::test_a_client_that_reads_nothing_loses_its_connection",
    ("who_reads_nothing_stays", "int(1000 * unread_seconds)", "0"),
  ),
  *mutants_of(
    "cm3leon_jax/serving/web/answers.py",
    f"{APP}::test_rows_stream_before_the_image",
    ("first_rows_only", " and event.rows >= next_rows", ""),
  ),
)
