"""Reads event files as TensorBoard does: a restart hides older events of the same steps."""

import struct

import numpy as np
from tensorboardX.proto import event_pb2


def read(folder):
  """Returns {tag: {step: [values]}} from all event files in `folder`, in the order written."""
  found = {}
  for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
    for event in _events(path.read_bytes()):
      if event.HasField("session_log"):
        for values in found.values():
          for step in [s for s in values if s >= event.step]:
            del values[step]
      for value in event.summary.value:
        found.setdefault(value.tag, {}).setdefault(event.step, []).append(_plain(value))
  return found


def _plain(value):
  if value.HasField("image"):
    return value.image
  if value.HasField("tensor"):
    return value.tensor.string_val[0].decode()
  return np.float32(value.simple_value)


def _events(data):
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    yield event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]
