"""Measures the CPU time of each test; with --fail-seconds, a slow test fails the session.

Includes all threads of the test's process, child processes that it waited for, and commands of
`tests.launched`. The setup of a module or session fixture counts for the fixture, not for the first
test that uses it.
"""

from collections.abc import Iterable
import os
import re

import psutil
import pytest

from tests import launched

SHOWN = 15  # Number of tests in the printed table.
PROPERTY = "processor seconds"  # Field of a test report: (seconds of the test, fixture -> seconds).


def now() -> float:
  """Returns the CPU seconds of this process, its finished children, and `launched` servers."""
  times = os.times()
  total = times.user + times.system + times.children_user + times.children_system
  for server in launched.Server.running:
    spent = psutil.Process(server.pid).cpu_times()
    total += spent.user + spent.system + spent.children_user + spent.children_system
  return total


class Counter:
  """Measures CPU seconds in the process that runs the tests; adds them to each test's report."""

  def __init__(self):
    self._start = 0.0
    self._shared: dict[str, float] = {}  # Fixture that this test set up -> seconds.

  @pytest.hookimpl(wrapper=True)
  def pytest_fixture_setup(self, fixturedef):
    if fixturedef.scope == "function":
      return (yield)
    start, inner = now(), sum(self._shared.values())
    try:
      return (yield)
    finally:
      inner = sum(self._shared.values()) - inner
      name = f"{fixturedef.baseid}::{fixturedef.argname}"
      self._shared[name] = self._shared.get(name, 0.0) + now() - start - inner

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_setup(self):
    self._start, self._shared = now(), {}

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_makereport(self, item, call):
    report = yield
    if call.when == "teardown":
      own = now() - self._start - sum(self._shared.values())
      report.user_properties.append((PROPERTY, (max(0.0, own), self._shared)))
    return report


class Judge:
  """Collects CPU seconds, prints the slowest tests, and fails the session after a too slow test."""

  def __init__(self, warn: float, fail: float):
    self.warn, self.fail = warn, fail
    self.tests: dict[str, float] = {}
    self.fixtures: dict[str, float] = {}

  def pytest_runtest_logreport(self, report):
    for name, value in report.user_properties:
      if name == PROPERTY:
        # Removes the group that --dist=loadgroup appends.
        test = re.sub(r"@[^]@]*$", "", report.nodeid)
        self.tests[test], shared = value
        for fixture, seconds in shared.items():
          self.fixtures[fixture] = self.fixtures.get(fixture, 0.0) + seconds

  def over(self, limit: float) -> list[str]:
    """Returns the tests that take more than `limit` CPU seconds, slowest first."""
    found = [name for name, seconds in self.tests.items() if seconds > limit]
    return sorted(found, key=lambda name: -self.tests[name])

  @pytest.hookimpl(tryfirst=True)
  def pytest_sessionfinish(self, session):
    if session.exitstatus == 0 and self.over(self.fail):
      session.exitstatus = pytest.ExitCode.TESTS_FAILED

  def pytest_terminal_summary(self, terminalreporter):
    write = terminalreporter.write_line
    total = sum(self.tests.values()) + sum(self.fixtures.values())
    write(f"processor seconds: {total:.0f}, of them {sum(self.fixtures.values()):.0f} of fixtures")
    for seconds, name in _dearest(self.fixtures.items()):
      write(f"  {seconds:5.1f}  {name}")
    for name in self.over(self.warn):
      word = "too many" if self.tests[name] > self.fail else "many"
      write(f"  {self.tests[name]:5.1f}  {word}: {name}")


def _dearest(items: Iterable[tuple[str, float]]) -> list[tuple[float, str]]:
  return sorted(((seconds, name) for name, seconds in items), reverse=True)[:SHOWN]


def pytest_addoption(parser):
  group = parser.getgroup("processor seconds")
  group.addoption("--warn-seconds", type=float, default=5.0, help="named in the summary")
  group.addoption("--fail-seconds", type=float, default=float("inf"), help="fails the session")


def pytest_configure(config):
  config.pluginmanager.register(Counter(), "processor-counter")
  if not hasattr(config, "workerinput"):
    limits = config.getoption("warn_seconds"), config.getoption("fail_seconds")
    config.pluginmanager.register(Judge(*limits), "processor-judge")
