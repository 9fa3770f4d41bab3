"""Types of the manifests that `cm3leon plan` writes, as their tools define them."""

from kubernetes import client
import pydantic

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


class Flavor(Strict):
  """Spec of a ResourceFlavor of kueue.x-k8s.io/v1beta2."""

  nodeLabels: dict[str, str] | None = None
  nodeTaints: list[client.V1Taint] | None = None
  tolerations: list[client.V1Toleration] | None = None
  topologyName: str | None = None


class Quota(Strict):
  name: str
  nominalQuota: int | str
  borrowingLimit: int | str | None = None
  lendingLimit: int | str | None = None


class FlavorQuotas(Strict):
  name: str
  resources: list[Quota] = pydantic.Field(min_length=1)


class ResourceGroup(Strict):
  coveredResources: list[str] = pydantic.Field(min_length=1)
  flavors: list[FlavorQuotas] = pydantic.Field(min_length=1)


class ClusterQueue(Strict):
  namespaceSelector: client.V1LabelSelector | None = None
  resourceGroups: list[ResourceGroup] | None = None
  queueingStrategy: str = pydantic.Field("BestEffortFIFO", pattern="^(StrictFIFO|BestEffortFIFO)$")
  cohortName: str | None = None
  stopPolicy: str = pydantic.Field("None", pattern="^(None|Hold|HoldAndDrain)$")


class LocalQueue(Strict):
  clusterQueue: str
  stopPolicy: str = pydantic.Field("None", pattern="^(None|Hold|HoldAndDrain)$")


class Kueue(Strict):
  apiVersion: str = pydantic.Field(pattern="^kueue.x-k8s.io/v1beta2$")
  kind: str
  metadata: Metadata
  spec: Flavor | ClusterQueue | LocalQueue


class Endpoint(Strict):
  port: int | str
  path: str = "/metrics"
  interval: str = pydantic.Field(pattern=r"^[0-9]+(ms|s|m|h)$")


class Scraped(Strict):
  selector: client.V1LabelSelector
  endpoints: list[Endpoint] = pydantic.Field(min_length=1)


class PodMonitoring(Strict):
  """Of monitoring.googleapis.com/v1, GoogleCloudPlatform/prometheus-engine 0.15."""

  apiVersion: str = pydantic.Field(pattern="^monitoring.googleapis.com/v1$")
  kind: str = pydantic.Field(pattern="^PodMonitoring$")
  metadata: Metadata
  spec: Scraped


class AcceleratorArgs(Strict):
  runtime_version: str
  tpu_vm: bool = True


class Resources(Strict):
  """Of a task of SkyPilot 0.14."""

  infra: str | None = None
  accelerators: str
  accelerator_args: AcceleratorArgs | None = None
  network_tier: str | None = pydantic.Field(None, pattern="^(standard|best)$")
  use_spot: bool = False
  image_id: str | None = None
  disk_size: int | None = None


class SkyPilot(Strict):
  name: str
  workdir: str | None = None
  num_nodes: int = pydantic.Field(1, ge=1)
  resources: Resources
  envs: dict[str, str | None] | None = None
  secrets: dict[str, str | None] | None = None
  setup: str | None = None
  run: str


STRICT = {"strict": True, "by_alias": True, "by_name": False}


def validate(manifest):
  return JobSet.model_validate(manifest, **STRICT)


def validate_queue(objects):
  """Checks each object of Kueue against the type of its kind."""
  types = {"ResourceFlavor": Flavor, "ClusterQueue": ClusterQueue, "LocalQueue": LocalQueue}
  for x in objects:
    Kueue.model_validate({**x, "spec": {}} if x["kind"] != "LocalQueue" else x, **STRICT)
    types[x["kind"]].model_validate(x["spec"], **STRICT)
