"""Checks the JobSet of launch/pod: the schemas of JobSet and Kubernetes, and its restarts."""

import copy
import os
import pathlib
import re
import subprocess
import sys

from kubernetes import client
import pydantic
import pytest
import yaml

from cm3leon_jax.config import INTERRUPTED
from launch.pod import gke_jobset

ROOT = pathlib.Path(__file__).parents[2]
MISTAKE = 2  # Exit code of every command for a user's mistake.
FLAGS = [
  "--config=ml_configs/cm3leon_7b.py:paper",
  "--workdir=gs://bucket/7b",
  "--config.raw.source=a b/$(id)*: 'x' #\"$HOME",
]
GKE = {
  "NAME": "run",
  "IMAGE": "image:tpu",
  "ACCELERATOR": "tpu-v5-lite-podslice",
  "TOPOLOGY": "16x16",
}

# Types of the custom resource jobset.x-k8s.io/v1alpha2, kubernetes-sigs/jobset 0.13.
RESTART_JOB = "RestartJob|RestartJobAndIgnoreMaxRestarts"


class Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid")


class Metadata(Strict):
  name: str
  namespace: str | None = None
  labels: dict[str, str] | None = None
  annotations: dict[str, str] | None = None


class Rule(Strict):
  name: str
  action: str = pydantic.Field(
    pattern=f"^(FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts|{RESTART_JOB})$"
  )
  onJobFailureReasons: list[str] | None = None
  onJobFailureMessagePatterns: list[str] | None = None
  targetReplicatedJobs: list[str] | None = None


class FailurePolicy(Strict):
  maxRestarts: int = 0
  restartStrategy: str = pydantic.Field(
    "Recreate", pattern="^(Recreate|BlockingRecreate|InPlaceRestart)$"
  )
  rules: list[Rule] | None = None


class ReplicatedJob(Strict):
  name: str
  groupName: str | None = None
  replicas: int = pydantic.Field(1, ge=0)
  template: client.V1JobTemplateSpec


class Spec(Strict):
  replicatedJobs: list[ReplicatedJob]
  failurePolicy: FailurePolicy | None = None
  suspend: bool | None = None
  ttlSecondsAfterFinished: int | None = pydantic.Field(None, ge=0)


class JobSet(Strict):
  apiVersion: str = pydantic.Field(pattern="^jobset.x-k8s.io/v1alpha2$")
  kind: str = pydantic.Field(pattern="^JobSet$")
  metadata: Metadata
  spec: Spec


def validate(manifest):
  return JobSet.model_validate(manifest, strict=True, by_alias=True, by_name=False)


def job(manifest):
  return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(manifest):
  return job(manifest)["template"]["spec"]


@pytest.fixture
def manifest():
  return yaml.safe_load(gke_jobset.MANIFEST.read_text())


def test_manifest_is_valid_as_it_stands_and_rendered(manifest):
  validate(manifest)
  validate(gke_jobset.jobset(GKE, FLAGS))


@pytest.mark.parametrize(
  ("change", "place"),
  [
    (
      lambda m: m["spec"].update(failurePolice=m["spec"].pop("failurePolicy")),
      "spec.failurePolice",
    ),
    (
      lambda m: m["spec"]["failurePolicy"].update(maxRestarts="20"),
      "spec.failurePolicy.maxRestarts",
    ),
    (
      lambda m: m["spec"]["failurePolicy"]["rules"][0].pop("name"),
      "spec.failurePolicy.rules.0.name",
    ),
    (
      lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
      "spec.failurePolicy.rules.0.action",
    ),
    (lambda m: m["spec"]["replicatedJobs"][0].pop("template"), "spec.replicatedJobs.0.template"),
    (lambda m: job(m).update(backoff_limit=0), "template.spec.backoff_limit"),
    (
      lambda m: job(m)["podFailurePolicy"]["rules"][0].pop("action"),
      "podFailurePolicy.rules.0.action",
    ),
    (
      lambda m: job(m)["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=["2"]),
      "onExitCodes.values.0",
    ),
    (lambda m: pod(m).update(terminationGracePeriod=900), "spec.terminationGracePeriod"),
    (lambda m: pod(m)["containers"][0].pop("name"), "containers.0.name"),
    (lambda m: pod(m)["containers"][0].update(args="--config=x"), "containers.0.args"),
    (
      lambda m: pod(m)["containers"][0]["securityContext"].update(priviledged=True),
      "securityContext.priviledged",
    ),
  ],
)
def test_a_wrong_manifest_is_refused(manifest, change, place):
  change(manifest)
  with pytest.raises(pydantic.ValidationError, match=re.escape(place)) as error:
    validate(manifest)
  assert error.value.error_count() <= 2


def test_rendering_changes_the_run_and_nothing_else(manifest):
  environment = {
    **GKE,
    "TOPOLOGY": "4x4x8",
    "SLICES": "3",
    "MAX_RESTARTS": "7",
    "GRACE_SECONDS": "1200",
  }
  rendered = gke_jobset.jobset(environment, FLAGS)
  validate(rendered)
  assert rendered["metadata"]["name"] == "run"
  assert rendered["spec"]["replicatedJobs"][0]["replicas"] == 3
  assert rendered["spec"]["failurePolicy"]["maxRestarts"] == 7
  assert job(rendered)["parallelism"] == job(rendered)["completions"] == 32
  assert pod(rendered)["terminationGracePeriodSeconds"] == 1200
  assert pod(rendered)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
  restored = copy.deepcopy(rendered)
  restored["metadata"]["name"] = manifest["metadata"]["name"]
  for part, names in (
    (lambda m: m["spec"]["failurePolicy"], ["maxRestarts"]),
    (lambda m: m["spec"]["replicatedJobs"][0], ["replicas"]),
    (job, ["parallelism", "completions"]),
    (pod, ["terminationGracePeriodSeconds", "nodeSelector"]),
    (lambda m: pod(m)["containers"][0], ["image", "args"]),
  ):
    part(restored).update({name: part(manifest)[name] for name in names})
  assert restored == manifest


def test_kubernetes_gives_the_flags_unchanged():
  container = pod(gke_jobset.jobset(GKE, FLAGS))["containers"][0]
  assert container["command"] == ["python", "-m", "launch.train"]
  assert [arg.replace("$$(", "$(") for arg in container["args"]] == ["--distributed", *FLAGS]
  assert not any(
    re.search(r"(?<!\$)\$\(", arg) for arg in container["args"]
  )  # What it would take for a variable.


def test_the_command_prints_the_manifest():
  argv = [sys.executable, "-m", "launch.pod.gke_jobset", *FLAGS]
  printed = subprocess.run(
    argv, cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, **GKE}
  ).stdout
  assert yaml.safe_load(printed) == gke_jobset.jobset(GKE, FLAGS)


def jobset_action(manifest, exit_code=None, condition=None):
  """Returns the action of JobSet for a failed pod: of the first rule that fits."""
  reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
  for index, rule in enumerate(job(manifest)["podFailurePolicy"]["rules"]):
    codes = rule.get("onExitCodes")
    if (codes and exit_code in codes["values"]) or (
      condition in [c["type"] for c in rule.get("onPodConditions", [])]
    ):
      failure = f"Pod a/b has condition {condition}"
      if codes:
        failure = f"Container trainer for pod a/b failed with exit code {exit_code}"
      reason, message = "PodFailurePolicy", f"{failure} matching FailJob rule at index {index}"
      break
  for rule in manifest["spec"]["failurePolicy"]["rules"]:
    patterns = rule.get("onJobFailureMessagePatterns", [""])
    if reason in rule["onJobFailureReasons"] and any(
      re.search(pattern, message) for pattern in patterns
    ):
      return rule["action"]
  return "RestartJobSet"


def test_gke_restarts_a_preempted_run_but_not_after_a_mistake(manifest):
  assert jobset_action(manifest, MISTAKE) == "FailJobSet"
  assert jobset_action(manifest, INTERRUPTED) == "RestartJobSetAndIgnoreMaxRestarts"
  assert jobset_action(manifest, 137, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
  assert {jobset_action(manifest, code) for code in (1, 12, 22, 134, 137, 139)} == {"RestartJobSet"}
  assert job(manifest)["backoffLimit"] == 0
  assert pod(manifest)["restartPolicy"] == "Never"
