"""Lints the files of launch/pod, and tests the scripts that run on a TPU VM host."""

import configparser
import re
import shutil
import subprocess

import pytest

from cm3leon_jax.errors import INTERRUPTED
from tests.recorders import FLAGS, MISTAKE, POD, PROGRAMS, ROOT, Recorders, run_script

PATTERNS = (".ci/*", "launch/**/*.sh", "tools/*.sh")
SCRIPTS = sorted(
  p for pattern in PATTERNS for p in ROOT.glob(pattern) if p.is_file() and p.suffix != ".py"
)


@pytest.fixture
def recorders(tmp_path):
  return Recorders(tmp_path)


# Lint.


def lint(program, *arguments) -> subprocess.CompletedProcess:
  command = [PROGRAMS / program, *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(script):
  assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
  found = lint("shellcheck", "--external-sources", script)
  assert found.returncode == 0, found.stdout


def test_dockerfile_is_clean():
  found = lint("hadolint", POD / "Dockerfile")
  assert found.returncode == 0, found.stdout


def test_dockerfile_copies_what_the_context_holds_and_installs_extras_that_exist():
  text = (POD / "Dockerfile").read_text()
  ignored = (ROOT / ".dockerignore").read_text().splitlines()
  lines = re.findall(r"^COPY (.+)$", text, re.MULTILINE)
  copied = [source for line in lines for source in line.split()[:-1]]
  assert copied
  assert all((ROOT / source).exists() for source in copied)
  assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied)
  assert 'case "$EXTRA" in tpu | cuda12 | cuda13)' in text
  assert '".[$EXTRA,data,monitoring]"' in text


# Tests of scripts that run on a TPU VM host.


def test_tpu_vm_host_that_trains_is_left_alone(recorders):
  recorders.add("systemctl")
  result = run_script(recorders, POD / "tpu_host.sh", *FLAGS)
  assert result.returncode == MISTAKE
  assert result.stderr.endswith(" is already training: run 'bash tpu_vm.sh stop' first.\n")


def test_tpu_vm_service_restarts_an_interrupted_run_but_not_after_a_mistake():
  unit = configparser.ConfigParser(interpolation=None)
  unit.optionxform = str
  unit.read(POD / "cm3leon-train@.service")
  service = unit["Service"]
  assert service["Restart"] == "on-failure"
  assert service["RestartForceExitStatus"] == service["SuccessExitStatus"] == str(INTERRUPTED)
  assert service["RestartPreventExitStatus"] == str(MISTAKE)
  assert unit["Unit"]["StartLimitBurst"] == "20"
  assert service["LimitMEMLOCK"] == "infinity"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_knows_every_line_of_the_service(tmp_path):
  def analyze(path):
    command = ["systemd-analyze", "verify", path]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr

  good, wrong = tmp_path / "cm3leon-train@good.service", tmp_path / "cm3leon-train@wrong.service"
  text = (POD / "cm3leon-train@.service").read_text().replace("User=%i", "User=root")
  good.write_text(text)
  wrong.write_text(text.replace("RestartPreventExitStatus", "RestartPreventsExitStatus"))
  assert good.name not in analyze(good)
  assert "RestartPreventsExitStatus" in analyze(wrong)
