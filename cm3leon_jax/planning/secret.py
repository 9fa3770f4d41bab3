"""Prints a secret of Google Cloud's Secret Manager, for launchers that cannot store secrets.

  export WANDB_API_KEY="$(python -m cm3leon_jax.planning.secret projects/PROJECT/secrets/NAME)"

The command uses the service account of the machine, so it works only on Google Cloud.
"""

import base64
import json
import sys
import urllib.request

METADATA = "http://metadata.google.internal"
SECRET_MANAGER = "https://secretmanager.googleapis.com"
TOKEN = "computeMetadata/v1/instance/service-accounts/default/token"


def _get(url: str, headers: dict[str, str]) -> dict:
  request = urllib.request.Request(url, headers=headers)
  with urllib.request.urlopen(request, timeout=30) as response:
    return json.load(response)


def read(name: str, metadata: str = METADATA, secret_manager: str = SECRET_MANAGER) -> str:
  """Returns the newest value of a secret.

  `name` is projects/PROJECT/secrets/NAME.

  Raises:
    OSError: a server does not answer, or denies access.
  """
  token = _get(f"{metadata}/{TOKEN}", {"Metadata-Flavor": "Google"})["access_token"]
  url = f"{secret_manager}/v1/{name}/versions/latest:access"
  answer = _get(url, {"Authorization": f"Bearer {token}"})
  return base64.b64decode(answer["payload"]["data"]).decode()


def main() -> None:
  try:
    print(read(*sys.argv[1:]), end="")
  except OSError as error:
    print(f"error: the secret {sys.argv[1]} cannot be read: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  main()
