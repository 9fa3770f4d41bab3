"""Lists the worlds of this package; `evaluation.world` imports a world by its name.

A world draws its images itself, so it knows exactly what they show. A config can name a world in
`raw.source`, or as the format of an instruction-tuning task.
"""

# World name -> module with the world in its constant WORLD; it is imported at its first use.
MODULES = {"scenes": "cm3leon_jax.scenes.interface"}


def world_of_format(name: str) -> str:
  """Returns the name of the world that draws a format's records, or "" if they come from files.

  world_of_format("scenes/count") = "scenes", world_of_format("jsonl") = ""
  """
  world, slash, _ = name.partition("/")
  return world if slash and world in MODULES else ""
