"""Defines the Python API: `CM3Leon` generates and scores images and texts, and retrieves documents.

  from cm3leon_jax import CM3Leon
  model = CM3Leon.load("workdir/scenes")
  model.generate("a green bell")[0].image.save("bell.png")

In the examples below, `workdir` is the folder of a run, `model` is loaded from it, `image` is a PIL
image, and `folder` is a path. JAX is imported only when a run is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import os
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, overload

from PIL import Image

from cm3leon_jax import accelerators
from cm3leon_jax.files import buckets

if TYPE_CHECKING:
  import jax
  import numpy as np

  from cm3leon_jax.config import sampling as kw
  from cm3leon_jax.decoding.generator import LoadOptions
  from cm3leon_jax.decoding.request import Request
  from cm3leon_jax.evaluation.likelihood.pairs import PairScore
  from cm3leon_jax.generation.pipeline import Pipeline
  from cm3leon_jax.generation.retrieved import Retrieved
  from cm3leon_jax.generation.sample import Sample
  from cm3leon_jax.generation.tasks import Task
  from cm3leon_jax.run.run import Run

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CM3Leon:
  """A trained run: decoder, tokenizers, CLIP, and the bank of documents that can be retrieved.

  Every method takes one input or a list of inputs, for which it returns a list: result i is that of
  a single call with the seed `seed + i`. Two lists are paired by index. If one of two inputs is no
  list, it is used for each element of the other.

  An image is given as a path, a PIL image or an array uint8[H, W, 3] of any size. It is cropped to
  the centered square and resized to the model's resolution. Returned images are PIL images.

  Several methods take the same arguments. `retrieve` is the largest number of documents that are
  retrieved and placed before the prompt. `length` is the largest number of text tokens. Sampling
  settings are fields of `config.sampling`. A method rejects settings that it does not use.

  Wrong arguments raise `UserError`. `pipeline` needs `jax.set_mesh(model.mesh)`.
  """

  run: Run
  pipeline: Pipeline
  mesh: jax.sharding.Mesh
  step: int
  show_progress: bool = False

  @classmethod
  def load(
    cls,
    workdir: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    devices: Sequence[jax.Device] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    clip: str | os.PathLike[str] | None = None,
    show_progress: bool | None = None,
    **options: Unpack[LoadOptions],
  ) -> CM3Leon:
    """Loads a bundle, an export or a run's newest checkpoint onto the devices of this machine.

    >>> model = CM3Leon.load(workdir)
    >>> model.step
    7

    Args:
      workdir: the folder of a run, local or in a GCS bucket, even while the run trains; or a bundle
        that `cm3leon export --bundle` wrote, or one of this package: "scenes", "scenes-instruct",
        "illustrations"; or an export in the format hf or orbax, without CLIP model and bank.
      adapter: workdir of a run that trained adapters of this model, to add them.
      dtype: compute dtype, `float32` or `bfloat16`; default: the run's.
      devices: devices that share the model or the batches; default: `jax.devices()`.
      mesh: a mesh from `mesh.create_mesh`, instead of `devices`.
      clip: folder of the Hugging Face CLIP model; default: the path in the run's config.
      show_progress: whether to show a progress bar; default: only in a terminal or notebook.
      **options: `batch_size`, `weight_dtype`, `cache_dtype`, see `GeneratorConfig`.

    Raises:
      UserError: nothing was trained there, a file is damaged, or an option is wrong.
    """
    accelerators.use_cpu_if_alone()
    buckets.prepare_access()
    import jax

    from cm3leon_jax.config.settings import decoding_mesh
    from cm3leon_jax.errors import UserError
    from cm3leon_jax.files import progress
    from cm3leon_jax.generation.pipeline import Pipeline
    from cm3leon_jax.mesh import create_mesh
    from cm3leon_jax.run.run import Run

    if mesh is not None and devices is not None:
      raise UserError("both mesh and devices are given: give only one of them.")
    buckets.check_path(workdir := os.path.expanduser(workdir))
    adapter = adapter and os.path.expanduser(adapter)
    run = Run.open(workdir, exports=True, adapter=adapter, dtype=dtype)
    if mesh is None:
      devices = list(jax.devices() if devices is None else devices)
      mesh = create_mesh(decoding_mesh(run.settings.model, devices), devices)
    with jax.set_mesh(mesh):
      pipeline, step = Pipeline.open(run, clip and os.path.expanduser(clip), **options)
    shown = progress.is_interactive() if show_progress is None else show_progress
    return cls(run, pipeline, mesh, step, shown)

  @classmethod
  def finetune(
    cls,
    data: Any,
    workdir: str | os.PathLike[str],
    base: str | os.PathLike[str] = "scenes",
    **options: Any,
  ) -> CM3Leon:
    """Tunes a model on your images and loads it. After Ctrl-C, the same call continues.

    `data` is a folder or a list of pairs (image, caption); for the options see `finetune.run`.
    """
    from cm3leon_jax import finetune

    finetune.run(data, workdir, base, **options)
    return cls.load(workdir)

  @property
  def workdir(self) -> str:
    """Folder of the run, bundle or export."""
    return str(self.run.folder)

  def __repr__(self) -> str:
    import jax

    from cm3leon_jax.weights import placed

    config, side = self.pipeline.settings.model, self.pipeline.layout.resolution
    with self._in_mesh():
      count = sum(x.size for x in jax.tree.leaves(placed.types_of(config)))
    return (
      f"CM3Leon({self.workdir!r}, step {self.step}, {count:,} parameters, images of {side} x "
      f"{side}, {config.dtype} on {self.mesh.size} {self.mesh.devices.flat[0].device_kind})"
    )

  def sample(
    self, tasks: Sequence[Task], num_samples: int = 1, rank: bool = False
  ) -> list[list[Sample]]:
    """Generates samples for tasks of any kind. The other methods call this method.

    >>> from cm3leon_jax.generation.text_tasks import InfillText
    >>> [[sample]] = model.sample([InfillText("a <mask> apple", length=4)])
    >>> sample.text.startswith("a"), len(sample.tokens) == len(sample.log_probs)
    (True, True)

    For each task, returns a list of `num_samples` samples, with `rank` sorted by CLIP score.
    """
    shown = self.show_progress
    with self._in_mesh():
      return self.pipeline.generate(tasks, num_samples, rank, show_progress=shown) if tasks else []

  def requests(self, tasks: Sequence[Task]) -> list[Request]:
    """Returns the token prompts of tasks, with retrieved documents, for another engine.

    >>> from cm3leon_jax.generation.text_tasks import Caption
    >>> [request] = model.requests([Caption(image=image)])
    >>> [prompt] = request.streams  # int32 ids; guided tasks also have an unconditional stream.
    """
    with self._in_mesh():
      given = self.pipeline.check(tasks)
      return self.pipeline.requests(tasks, given, self.pipeline.retrieve(tasks))

  @overload
  def generate(self, prompt: str, **options: Unpack[kw.GenerateOptions]) -> list[Sample]: ...
  @overload
  def generate(
    self, prompt: list[str], **options: Unpack[kw.GenerateOptions]
  ) -> list[list[Sample]]: ...
  def generate(
    self, prompt: Any, *, num_samples: int = 1, retrieve: int | None = None, seed: int = 0,
    rank: bool = False, **sampling: Any,
  ) -> Any:  # fmt: skip
    """Generates images from a caption.

    >>> samples = model.generate("a green bell", num_samples=4, guidance=1.5, retrieve=2, seed=0)
    >>> len(samples), samples[0].image.mode, len(samples[0].neighbors)
    (4, 'RGB', 2)

    Args:
      num_samples: number of samples per caption.
      retrieve: number of documents to retrieve with the caption as query; default: as many as in
        training, or 0 if the run has no documents.
      rank: whether to sort the samples of a caption by CLIP score, best first.
      **sampling: `guidance`, `guidance_schedule`, `temperature`, `top_k`, `top_p`, `method`, ...

    Returns:
      A list of `Sample`s, with `image` (PIL), `clip_score`, `neighbors`, ...; for a list of
      captions, a list of such lists.
    """
    retrieve = self.pipeline.usual_retrieve if retrieve is None else retrieve
    inputs = {"prompt": prompt}
    single, tasks = self._tasks("text_to_image", seed, sampling, inputs, retrieve=retrieve)
    samples = self.sample(tasks, num_samples, rank)
    return samples[0] if single else samples

  @overload
  def caption(self, image: ImageLike, **options: Unpack[kw.TextOptions]) -> str: ...
  @overload
  def caption(self, image: list[Any], **options: Unpack[kw.TextOptions]) -> list[str]: ...
  def caption(
    self, image: Any, *, length: int = 64, retrieve: int = 0, seed: int = 0, **sampling: Any
  ) -> Any:
    """Describes an image. Returns a text, or a list of texts.

    >>> isinstance(model.caption(image, length=8), str)
    True

    Args:
      retrieve: the query is the image.
      **sampling: `text_temperature`, `text_top_k`, `text_top_p`.
    """
    inputs = {"image": image}
    return self._first("text", "caption", seed, sampling, inputs, length=length, retrieve=retrieve)

  @overload
  def answer(self, image: ImageLike, question: str, **options: Unpack[kw.TextOptions]) -> str: ...
  @overload
  def answer(
    self, image: Any, question: Any, **options: Unpack[kw.TextOptions]
  ) -> str | list[str]: ...
  def answer(
    self, image: Any, question: Any, *, length: int = 64, retrieve: int = 0, seed: int = 0,
    **sampling: Any,
  ) -> Any:  # fmt: skip
    """Answers a question about an image. Returns a text, or a list of texts. See `caption`.

    >>> len(model.answer(image, ["What color is it?", "What is it?"], length=8))
    2
    """
    inputs = {"image": image, "prompt": question}
    return self._first("text", "question", seed, sampling, inputs, length=length, retrieve=retrieve)

  def infill(
    self, image: Any, box: Any, prompt: str | list[str] = "", *, retrieve: int = 0, seed: int = 0,
    **sampling: Unpack[kw.ImageSampling],
  ) -> Any:  # fmt: skip
    """Generates new contents for a box of an image. Returns a PIL image, or a list of PIL images.

    >>> model.infill(image, box=(2, 2, 6, 6)).size == image.size
    True

    Args:
      box: (left, top, right, bottom) in pixels at the model's resolution. Right and bottom are
        exclusive. The box is enlarged to whole codes.
      prompt: a caption of the whole image, which guides the generated codes.
      retrieve: the query is the prompt, or the image if the prompt is empty.
      **sampling: see `generate`; guidance needs a prompt.
    """
    inputs = {"image": image, "box": box, "prompt": prompt}
    return self._first("image", "infill_image", seed, sampling, inputs, retrieve=retrieve)

  def edit(
    self, image: Any, instruction: Any, *, seed: int = 0, **sampling: Unpack[kw.EditSampling]
  ) -> Any:
    """Edits an image according to an instruction. Returns a PIL image, or a list of PIL images.

    >>> model.edit(image, "make it blue").size == image.size
    True

    Args:
      **sampling: `image_guidance`, `edit_guidance`, `guidance_schedule`, `temperature`, ...
    """
    inputs = {"image": image, "prompt": instruction}
    return self._first("image", "edit", seed, sampling, inputs)

  def interleave(
    self, prompt: Any = "", *, length: int | None = None, seed: int = 0,
    **sampling: Unpack[kw.DocumentSampling],
  ) -> Any:  # fmt: skip
    """Continues a document. Returns a list of its texts and PIL images, or a list of such lists.

    >>> document = model.interleave("Step 1:", length=40)
    >>> document[0].startswith("Step 1:")
    True

    Args:
      prompt: beginning of the first text, or a list of beginnings; "" starts an empty document.
      length: largest number of tokens, image codes included; default: as many as fit after the
        prompt into the longest sample of the training.
      **sampling: `temperature`, `top_k`, `top_p`, and the settings of `caption`.
    """
    return self._first("parts", "interleaved", seed, sampling, {"prompt": prompt}, length=length)

  @overload
  def score(self, text: str, image: ImageLike, *, retrieve: int = 0) -> PairScore: ...
  @overload
  def score(self, text: Any, image: Any, *, retrieve: int = 0) -> PairScore | list[PairScore]: ...
  def score(self, text: Any, image: Any, *, retrieve: int = 0) -> Any:
    """Computes log-probabilities of a text and an image. Returns one or several `PairScore`s.

    >>> score = model.score(text="a green bell", image=image)
    >>> score.text < 0, score.image_given_text < 0, score.text_given_image < 0
    (True, True, True)

    The fields are log p(text), log p(image | text) and log p(text | image) in nats, without
    `<break>`, `</s>` and the tokens of retrieved documents.

    Args:
      retrieve: the query is the text. Documents that do not fit into the row are skipped.
    """
    from cm3leon_jax.evaluation.likelihood import pairs
    from cm3leon_jax.generation import calls

    single, rows = calls.rows(text=text, image=image)
    asked = [(row["text"], row["image"]) for row in rows]
    with self._in_mesh():
      scores = pairs.score(self.pipeline, self._trained, asked, retrieve) if rows else []
    return scores[0] if single else scores

  @overload
  def retrieve(self, query: str, k: int = 2) -> list[Retrieved]: ...
  @overload
  def retrieve(self, query: Any, k: int = 2) -> list[Retrieved] | list[list[Retrieved]]: ...
  def retrieve(self, query: Any, k: int = 2) -> Any:
    """Retrieves the documents of the bank that match a text or an image best, as `generate` does.

    >>> [first, second] = model.retrieve("a green bell", k=2)
    >>> first.similarity >= second.similarity, first.image.size == image.size
    (True, True)

    Args:
      query: a text, a PIL image or an array, or a list of queries. A string is always a text.
      k: largest number of documents; `retrieval` of the config excludes some.

    Returns:
      A list of `Retrieved`, best first; for a list of queries, a list of such lists.
    """
    from cm3leon_jax.generation import calls, retrieved

    single = not isinstance(query, list)
    queries = [
      ("text", value) if isinstance(value, str) else ("image", calls.expanded(value))
      for value in ([query] if single else query)
    ]
    with self._in_mesh():
      result = retrieved.search(self.pipeline, queries, k) if queries else []
    return result[0] if single else result

  @functools.cached_property
  def _trained(self) -> dict[str, Any]:
    """Parameters in the training dtype, which the first `score` loads."""
    return self.run.params(self.step, dtype=self.run.settings.model.dtype)[0]

  def _in_mesh(self) -> Any:
    import jax

    return jax.set_mesh(self.mesh)

  def _tasks(self, name: str, *arguments: Any, **fields: Any) -> Any:
    from cm3leon_jax.generation import calls

    return calls.tasks(name, self.pipeline.settings.sampling, *arguments, **fields)

  def _first(self, attribute: str, *task: Any, **fields: Any) -> Any:
    """Generates one sample per task. Returns one attribute of each sample, such as its text."""
    single, tasks = self._tasks(*task, **fields)
    result = [getattr(sample, attribute) for [sample] in self.sample(tasks)]
    return result[0] if single else result
