"""Defines strict types of the manifests that `cm3leon plan` writes, following their tools."""

from kubernetes import client
import pydantic

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


STRICT = {"strict": True, "by_alias": True, "by_name": False}


def validate(manifest):
  return JobSet.model_validate(manifest, **STRICT)
