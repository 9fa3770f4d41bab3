"""Writes the files that `cm3leon build_neighbors` would write, from given arrays."""

import numpy as np

from cm3leon_jax.data.documents.store import group_id
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.bank import document_embeddings


def write_array(path, values):
  values = np.asarray(values)
  ArrayStore.create(path, values.shape[1:], values.dtype).append(values)


def write_bank(folder, texts, images, groups, keys):
  """Writes texts and images ([n, E] float32 of norm 1), and n groups and keys."""
  arrays = {"documents": document_embeddings(texts, images), "queries": texts, "images": images}
  for name, values in arrays.items():
    write_array(folder / name, values.astype(np.float16))
  for name, values in (("groups", groups), ("keys", keys)):
    write_array(folder / name, np.array([group_id(value) for value in values], np.uint64))


def write_neighbors(folder, **arrays):
  """Writes ids, scores, text_ids and text_scores ([n, C]) of a store; default scores are 0."""
  for name, values in arrays.items():
    write_array(folder / name, values)
    if name.endswith("ids"):
      scores = name.replace("ids", "scores")
      write_array(folder / scores, arrays.get(scores, np.zeros(values.shape, np.float32)))
