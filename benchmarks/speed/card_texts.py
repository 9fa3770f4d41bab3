"""Texts of the pages in docs/cards/, which `benchmarks.speed.cards` writes."""

HEADER = """# {config} on a slice
Memory and FLOPs of the shipped config's programs per device, as the TPU compiler plans them.
None of the programs has run. `python -m benchmarks.speed.cards` compiles missing cards and writes
this page. [scaling.md](../scaling.md) explains the numbers. v5e-256 and v6e-256 have 256 chips.
v5p-256 and tpu7x-256 have 128 chips, because these names count cores, and a chip has two. A core of
tpu7x is a device with half of the memory.

The number in bold must be less than the memory of a device, which follows `of`. A second number
must fit, too: evaluation with the rest of the state in memory, or the prefill before decoding.

- **train**: a step with the config's batch, in as many passes as `train.rows_per_device` requires.
  Memory is arguments (parameters, moments, rows) + temporaries.
- **evaluate**: the held-out loss of the rows of one pass. The rest of the state also stays in
  memory.
- **decode**: one token for each of {prompts} prompts per replica, with two guidance streams each
  and a full cache of {positions:,} positions.
"""
MUON = """\
- **muon**: the train step with `--config.optimizer.name=muon`.
"""
ADAPTERS = """\
- **adapters**: a train step of [adapters](../tuning.md#with-adapters) of rank {rank}, one row per
  device. Memory is arguments (frozen parameters, adapters, moments, rows) + temporaries. v5e-16 has
  16 chips, v5p-8 has 4.
"""
SHARED = """\
- **gqa**: decode of `cm3leon_7b:gqa`, whose heads share 8 key heads.
"""
OF_GPUS = """
## On GPUs
XLA's compiler for GPUs planned these programs on a machine without one. `of` is the memory that
the launchers give JAX, 92% (`XLA_PYTHON_CLIENT_MEM_FRACTION`); its default is 75%. Hosts have 8
GPUs: `data` spans hosts, `fsdp` (decoding: `tensor`) the GPUs of a host. Nothing was autotuned, the
compiler knows no links, and at run time sorts may use scratch memory of CUB.
"""
WITHOUT_KERNEL = """
- **plain**: a train step without the Triton kernel of attention, which all others of this size use.
  The 760M is always plain: its heads have 96 values, and the kernel needs a power of two.
"""
TABLE = """
| devices | program | GiB per device | FLOPs per device | collectives: number, GiB | compiled |
|---|---|---|---|---|---|
"""
COMMANDS = """
The commands in this order, to be written after `cm3leon aot_compile`:
```
{commands}
```
"""
