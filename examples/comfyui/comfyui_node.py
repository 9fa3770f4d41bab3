"""Nodes of ComfyUI that generate, edit and caption images with a running `cm3leon serve`.

Copy this file to ComfyUI/custom_nodes/. Environment variables: CM3LEON_URL is the server, by
default http://127.0.0.1:8000, and CM3LEON_TOKEN its token.
"""

# B images, H height, W width.

import base64
import io
import os
from typing import Any, ClassVar

import numpy as np
from PIL import Image
import requests
import torch


def _post(path: str, **body: Any) -> dict:
  """Returns the server's response; raises RuntimeError with the message of an error."""
  url = os.environ.get("CM3LEON_URL", "http://127.0.0.1:8000")
  headers = {"Authorization": f"Bearer {os.environ.get('CM3LEON_TOKEN', '')}"}
  response = requests.post(f"{url}/v1/{path}", headers=headers, timeout=600, **body).json()
  if "error" in response:
    raise RuntimeError(f"cm3leon serve: {response['error']['message']}")
  return response


def _png(image: torch.Tensor) -> bytes:
  file = io.BytesIO()
  Image.fromarray((image.cpu().numpy() * 255).round().astype(np.uint8)).save(file, "PNG")
  return file.getvalue()


def _images(response: dict) -> tuple[torch.Tensor]:
  """Decodes the images of a response to fp32 [B, H, W, 3] in [0, 1]."""
  files = [io.BytesIO(base64.b64decode(one["b64_json"])) for one in response["data"]]
  return (torch.tensor(np.stack([np.asarray(Image.open(file)) for file in files])) / 255,)


class Generate:
  """Images for a prompt. ComfyUI passes the fields of INPUT_TYPES to the method FUNCTION."""

  CATEGORY, FUNCTION, RETURN_TYPES = "cm3leon", "generate", ("IMAGE",)
  FIELDS: ClassVar[dict] = {"prompt": ("STRING", {"multiline": True}), "n": ("INT", {"default": 1})}

  @classmethod
  def INPUT_TYPES(cls) -> dict:
    return {"required": {**cls.FIELDS, "seed": ("INT", {"default": 0, "max": 2**32 - 1})}}

  def generate(self, **fields: Any) -> tuple:
    return _images(_post("images/generations", json=fields))


class Edit(Generate):
  """The first image of a batch, edited by an instruction."""

  FUNCTION = "edit"
  FIELDS: ClassVar[dict] = {"image": ("IMAGE",), "prompt": ("STRING", {"multiline": True})}

  def edit(self, image: torch.Tensor, **fields: Any) -> tuple:
    return _images(_post("images/edits", data=fields, files={"image": ("a.png", _png(image[0]))}))


class Caption(Generate):
  """A caption of the first image of a batch, or the answer to a question about it."""

  FUNCTION, RETURN_TYPES = "caption", ("STRING",)
  FIELDS: ClassVar[dict] = {"image": ("IMAGE",), "question": ("STRING", {"default": ""})}

  def caption(self, image: torch.Tensor, question: str, seed: int) -> tuple:
    url = f"data:image/png;base64,{base64.b64encode(_png(image[0])).decode()}"
    content: list[dict] = [{"type": "image_url", "image_url": {"url": url}}]
    content += [{"type": "text", "text": question}] if question else []
    body = {"messages": [{"role": "user", "content": content}], "seed": seed}
    return (_post("chat/completions", json=body)["choices"][0]["message"]["content"],)


NODE_CLASS_MAPPINGS = {f"CM3Leon{node.__name__}": node for node in (Generate, Edit, Caption)}
