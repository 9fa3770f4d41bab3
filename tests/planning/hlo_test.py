import jax
import jax.numpy as jnp
import pytest

from cm3leon_jax.mesh import spec
from cm3leon_jax.planning.hlo import Program
from tests.models.tiny import mesh_of

# Text like that of XLA:TPU: a loop of 3 iterations with a product that is fused as a convolution,
# and an asynchronous gather.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/cm3leon_jax/models/transformer.py"
2 "/somewhere/site-packages/optax/transform.py"

FunctionNames
1 "Block.__call__"
2 "update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=34 end_line=34 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused.1 (p0: bf16[4,8,16], p1: bf16[16,32]) -> bf16[4,8,32] {
  %p0 = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv.1 = bf16[4,8,32]{2,1,0} convolution(%p0, %p1), window={size=1}, dim_labels=0bf_io0->0bf
}

%start.1 (p0: bf16[4,32]) -> (bf16[4,32], bf16[16,32]) {
  %p0 = bf16[4,32]{1,0} parameter(0)
  %g = bf16[16,32]{1,0} all-gather(%p0), dimensions={0}
  ROOT %c = (bf16[4,32], bf16[16,32]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p0: bf16[4,32]) -> bf16[16,32] {
  %p0 = bf16[4,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,32]{1,0} all-gather(%p0), dimensions={0}
}

%body (p: (s32[], bf16[4,8,16])) -> (s32[], bf16[4,8,16]) {
  %p = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}) parameter(0)
  %x = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %s = (bf16[4,32]{1,0}, bf16[16,32]{1,0}) fusion(%x), kind=kCustom, calls=%start.1
  %w = bf16[16,32]{1,0} fusion(%x), calls=%async_collective_fusion.1, metadata={stack_frame_id=2}
  %f = bf16[4,8,32]{2,1,0} fusion(%x, %w), calls=%fused.1, backend_config={"estimated_cycles":"70"}
  %v = bf16[400,8,32]{2,1,0:T(8,128)(2,1)S(1)} copy(%f)
  ROOT %t = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}) tuple(%p, %x)
}

%condition (p: (s32[], bf16[4,8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%n, %n), direction=LT
}

ENTRY %main (a: bf16[4,8,16]) -> bf16[4,8,16] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %while.1 = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}) while(%a), condition=%condition, body=%body
  %sum.1 = f32[64]{0} all-reduce(%a), to_apply=%add
  ROOT %r = bf16[4,8,16]{2,1,0} get-tuple-element(%while.1), index=1
}
"""


@pytest.fixture(scope="module")
def program():
  return Program(TEXT)


def test_a_loop_counts_as_often_as_it_runs(program):
  assert program.flops() == 3 * 2 * 4 * 8 * 16 * 32
  assert program.cycles() == 3 * 70


@pytest.mark.parametrize(("start", "runs"), [("constant(1)", 2), ("add(%a, %a)", 3)])
def test_an_iteration_that_xla_took_out_of_a_loop_does_not_count_twice(start, runs):
  """The remaining loop starts at 1. A start that is not constant is taken as 0."""
  head, loop = "ENTRY %main (a: bf16[4,8,16]) -> bf16[4,8,16] {\n", "while(%a), "
  before = f"  %one = s32[]{{:T(128)}} {start}\n  %first = s32[] copy(%one)\n"
  before += "  %all = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}) tuple(%first, /*index=1*/%a)\n"
  compared = "  %p = (s32[], bf16[4,8,16]) parameter(0)\n"
  compared += "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0\n"
  text = TEXT.replace(head, head + before).replace(loop, "while(%all), ")
  text = text.replace("-> pred[] {\n", "-> pred[] {\n" + compared).replace("(%n, %n)", "(%i, %n)")
  assert Program(text).flops() == runs * 2 * 4 * 8 * 16 * 32
  assert Program(text).collectives()["all-gather"][0] == runs


def test_parts_of_a_collective_count_once(program):
  assert program.collectives() == {"all-gather": (3, 3 * 16 * 32 * 2), "all-reduce": (1, 64 * 4)}


def test_largest_lists_arrays_in_main_memory_with_their_source_line(program):
  top = program.largest(4)
  assert top[0] == {"array": "bf16[4,8,32]", "bytes": 2048, "source": "fusion"}
  source = "cm3leon_jax/models/transformer.py:12 Block.__call__"
  assert {"array": "bf16[16,32]", "bytes": 1024, "source": source} in top


def test_padding_of_a_convolution_does_not_count():
  """XLA pads a window for 32 heads by 31; each output reads only one position of the window."""
  window = "window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"
  line = f"  %c = bf16[4,16,32,8]{{3,2,1,0}} convolution(%l, %r), {window}"
  head = "ENTRY %m (l: bf16[4,16,64,1], r: bf16[64,32,8,1]) -> bf16[4,16,32,8] {\n"
  operands = (
    "  %l = bf16[4,16,64,1]{3,2,1,0} parameter(0)\n  %r = bf16[64,32,8,1]{3,2,1,0} parameter(1)\n"
  )
  assert Program(f"{head}{operands}{line}\n}}\n").flops() == 2 * 4 * 16 * 32 * 8 * 64


@pytest.mark.parametrize("rows", ["2,", ""])
def test_attention_kernels_count_half_a_square_for_each_product(rows):
  """Covers two forward products, 8 heads of width 64, 512 tokens; one row has no batch axis."""
  arrays = (
    f"(f32[{rows}512,128]{{1,0}}, bf16[{rows}8,512,64]{{2,1,0}}, f32[{rows}8,512,128]{{2,1,0}})"
  )
  line = f'%splash_mha_fwd_x.1 = {arrays} custom-call(%q), custom_call_target="t"'
  text = f"ENTRY %m (q: bf16[8]) -> bf16[8] {{\n  {line}\n}}\n"
  assert Program(text).flops() == 2 * (2 * 8 * 512 * 512 * 64 / 2) * (2 if rows else 1)


def test_a_cpu_program_is_read():
  """Reads XLA:CPU's text of a program: 5 products of sharded rows, and an all-reduce."""

  def loop(x, w):
    def step(_, x):
      return jnp.einsum("BD,DE->BE", x, w, out_sharding=spec("batch", None))

    return jax.lax.fori_loop(0, 5, step, x).sum()

  with jax.set_mesh(mesh_of(1, 4, 1)):
    rows = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch", None))
    x = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    program = Program(jax.jit(loop).lower(x, w).compile().as_text())
  assert program.collectives()["all-reduce"] == (1, 4)
  assert program.flops() == pytest.approx(5 * 2 * 64 * 128 * 128)


def test_traffic_counts_only_parts_that_are_read_or_replaced_in_main_memory():
  """Covers a cache updated in place, a row read from a table, and prefetched weights."""
  text = """%put (p0: bf16[8,64,4], p1: bf16[8,1,4], p2: s32[]) -> bf16[8,64,4] {
  %p0 = bf16[8,64,4]{2,1,0} parameter(0)
  %p1 = bf16[8,1,4]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %d = bf16[8,64,4]{2,1,0} dynamic-update-slice(%p0, %p1, %p2, %p2, %p2)
}

%take (p0: f32[1000,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[1000,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %s = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,4}
}

ENTRY %main (c: bf16[8,64,4], k: bf16[8,1,4], t: f32[1000,4], i: s32[]) -> bf16[8,64,4] {
  %c = bf16[8,64,4]{2,1,0} parameter(0)
  %k = bf16[8,1,4]{2,1,0} parameter(1)
  %t = f32[1000,4]{1,0} parameter(2)
  %i = s32[]{S(1)} parameter(3)
  %w = f32[16,16]{1,0} parameter(4)
  %cs = (f32[16,16]{1,0}, f32[16,16]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%w)
  %cd = f32[16,16]{1,0:S(1)} copy-done(%cs)
  %n = f32[16,16]{1,0:S(1)} negate(%cd)
  %f = f32[1,4]{1,0} fusion(%t, %i), kind=kLoop, calls=%take
  ROOT %u = bf16[8,64,4]{2,1,0} fusion(%c, %k, %i), kind=kLoop, calls=%put
}
"""
  column, row, weights = 8 * 1 * 4 * 2, 4 * 4, 16 * 16 * 4
  assert Program(text).traffic() == 2 * column + 2 * row + weights
