"""Tests the schemas and restart rules of the manifests that `cm3leon plan` writes."""

import re

from kubernetes import client
import pydantic
import pytest
import yaml

from cm3leon_jax.errors import INTERRUPTED
from cm3leon_jax.planning import hardware, launchers
from tests.recorders import FLAGS, MISTAKE

IMAGE = "us-docker.pkg.dev/project/repository/cm3leon:tpu"
# Some tools read manifests as YAML 1.1, where `yes` without quotes is true.
AWKWARD = [*FLAGS, "--config.train.wandb=yes: no # {x}", "--config.raw.text=a\\nb"]

# Types of the custom resource jobset.x-k8s.io/v1alpha2, as defined in kubernetes-sigs/jobset 0.13.
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
  JobSet.model_validate(manifest, strict=True, by_alias=True, by_name=False)


def written(topology="v5e-256", slices=1, flags=FLAGS, **options):
  job = launchers.PodJob(
    "run", hardware.load(topology, slices), tuple(flags), **{"image": IMAGE, **options}
  )
  return launchers.files(job)


def jobset(*args, **options) -> dict:
  (text,) = [text for name, text in written(*args, **options).items() if "jobset" in name]
  return yaml.safe_load(text)


def job(manifest):
  return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(manifest):
  return job(manifest)["template"]["spec"]


@pytest.fixture
def manifest():
  return jobset(spot=True, queue="tpus")


ALL = {
  "queue": "tpus",
  "service_account": "trainer",
  "reservation": "yes",  # Without quotes, this is true in YAML 1.1.
  "priority": "high",
  "cpus": 40,
  "memory_gib": 100,
  "metrics_port": 9464,
}
HARDWARE = [("v5e-256", 1), ("v5p-256", 2), ("v6e-8", 1), ("v5p:4x4x8", 1), ("h100-64", 1)]


@pytest.mark.parametrize(("topology", "slices"), HARDWARE)
@pytest.mark.parametrize("options", [{}, {"spot": True, "queue": "tpus"}, ALL])
def test_manifests_are_valid(topology, slices, options):
  validate(jobset(topology, slices, AWKWARD, **options))


def test_the_schema_refuses_another_type_and_an_unknown_field(manifest):
  """Negative control."""
  for path, wrong in (("metadata", "name"), ("spec", "failurePolicy")):
    with pytest.raises(pydantic.ValidationError, match=wrong):
      validate({**manifest, path: {**manifest[path], wrong: 1.5}})
  with pytest.raises(pydantic.ValidationError, match="typo"):
    validate({**manifest, "typo": "x"})


def test_the_hardware_and_the_limits_of_a_job_are_in_its_manifests():
  manifest = jobset("v5p-256", 2, max_restarts=7, grace_seconds=1200, queue="tpus")
  assert manifest["metadata"]["name"] == "run"
  assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
  assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
  assert job(manifest)["parallelism"] == job(manifest)["completions"] == 32
  assert pod(manifest)["terminationGracePeriodSeconds"] == 1200
  labels = {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "4x4x8",
  }
  assert pod(manifest)["nodeSelector"] == labels
  assert pod(manifest)["containers"][0]["image"] == IMAGE
  assert pod(manifest)["containers"][0]["imagePullPolicy"] == "Always"  # A tag may move.
  resources = pod(manifest)["containers"][0]["resources"]
  assert resources["requests"] == {"cpu": "104", "memory": "224Gi"}  # Half of a ct5p-hightpu-4t.


def test_the_processes_of_gpu_hosts_find_each_other_and_use_all_gpus():
  """JobSet names a pod RUN-hosts-0-INDEX.RUN; PROCESS_ID is the index of the pod."""
  manifest = jobset("h100-64", flags=AWKWARD, queue="gpus")
  (replicated,) = manifest["spec"]["replicatedJobs"]
  assert (replicated["name"], replicated["replicas"]) == ("hosts", 1)
  assert job(manifest)["parallelism"] == job(manifest)["completions"] == 8
  container = pod(manifest)["containers"][0]
  address, count, process, *flags = container["args"]
  assert address == "--coordinator_address=run-hosts-0-0.run:8476"
  assert (count, process) == ("--num_processes=8", "--process_id=$(PROCESS_ID)")
  assert [flag.replace("$$(", "$(") for flag in flags] == AWKWARD
  fraction, index, _ = container["env"]
  assert float(fraction["value"]) == hardware.GPU_FRACTION
  path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert index == {"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": path}}}
  assert container["resources"] == {"requests": {"cpu": "64"}, "limits": {"nvidia.com/gpu": "8"}}
  assert not {"nodeSelector", "priorityClassName"} & pod(manifest).keys()
  assert "annotations" not in manifest["metadata"]


def test_a_shared_folder_of_gpu_hosts_is_mounted():
  flags = ["--config=c", "--workdir=/scratch/runs/7b"]
  image = IMAGE.replace("/", "#", 1)  # As SLURM's enroot wants it.
  spec = pod(jobset("h100-16", flags=flags, memory_gib=900, cpus=96, image=image))
  container = spec["containers"][0]
  assert container["image"] == IMAGE
  assert container["volumeMounts"][1] == {"name": "shared", "mountPath": "/scratch"}
  assert spec["volumes"][1] == {"name": "shared", "hostPath": {"path": "/scratch"}}
  assert container["resources"]["requests"] == {"cpu": "96", "memory": "900Gi"}
  assert len(pod(jobset("h100-16"))["volumes"]) == 1


def test_the_key_comes_from_a_secret_that_may_be_absent():
  (variable,) = pod(jobset(secret="own"))["containers"][0]["env"]
  reference = {"name": "own", "key": "WANDB_API_KEY", "optional": True}
  assert variable == {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": reference}}


def test_kubernetes_gives_the_flags_unchanged():
  container = pod(jobset(flags=AWKWARD))["containers"][0]
  assert container["command"] == ["cm3leon", "train"]
  assert [arg.replace("$$(", "$(") for arg in container["args"]] == ["--distributed", *AWKWARD]
  # Kubernetes would expand `$(NAME)` in an argument, so `$` must be doubled.
  assert not any(re.search(r"(?<!\$)\$\(", arg) for arg in container["args"])


def test_what_is_not_asked_for_is_not_in_the_manifest():
  found = pod(jobset(**ALL))
  labels = found["nodeSelector"]
  assert (found["serviceAccountName"], found["priorityClassName"]) == ("trainer", "high")
  assert labels.pop("cloud.google.com/reservation-name") == "yes"
  requests = {"cpu": "40", "memory": "100Gi"}
  assert found["containers"][0]["resources"]["requests"] == requests
  plain = pod(jobset())
  assert not {"serviceAccountName", "priorityClassName"} & plain.keys()
  assert plain["nodeSelector"] == labels
  assert pod(jobset(service_account="a@p.iam.gserviceaccount.com")) == plain


def test_the_metrics_of_process_0_are_scraped_if_it_serves_any():
  template = job(jobset(metrics_port=9464))["template"]
  assert template["metadata"]["annotations"] == {
    "prometheus.io/scrape": "true", "prometheus.io/port": "9464", "prometheus.io/path": "/metrics"
  }  # fmt: skip
  port = {"name": "metrics", "containerPort": 9464, "hostPort": 9464}
  assert template["spec"]["containers"][0]["ports"] == [port]
  plain = jobset()
  assert "metadata" not in job(plain)["template"]
  assert "ports" not in pod(plain)["containers"][0]


def jobset_action(manifest, exit_code=None, condition=None):
  """Returns what JobSet does after a pod failed: the action of the first matching rule."""
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


@pytest.mark.parametrize("topology", ["v5e-256", "h100-64"])
def test_kubernetes_restarts_a_preempted_run_but_not_after_a_mistake(topology):
  manifest = jobset(topology)
  assert jobset_action(manifest, MISTAKE) == "FailJobSet"
  assert jobset_action(manifest, INTERRUPTED) == "RestartJobSetAndIgnoreMaxRestarts"
  assert jobset_action(manifest, 137, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
  assert {jobset_action(manifest, code) for code in (1, 12, 22, 134, 137, 139)} == {"RestartJobSet"}
  assert job(manifest)["backoffLimit"] == 0
  assert pod(manifest)["restartPolicy"] == "Never"
