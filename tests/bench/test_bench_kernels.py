"""What a program costs is read from its text: bytes, FLOPs, loops and slices, against sums made by hand."""

import pytest

from nanochat_jax.bench import kernels
from nanochat_jax.planning import program

HLO = """
%fused_square (p.0: f32[64,32]) -> bf16[64,32] {
  %p.0 = f32[64,32]{1,0} parameter(0)
  %m = f32[64,32]{1,0} multiply(%p.0, %p.0)
  ROOT %c = bf16[64,32]{1,0} convert(%m)
}

%fused_slice (p.1: f32[1000,32], p.2: s32[]) -> f32[8,32] {
  %p.1 = f32[1000,32]{1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  ROOT %s = f32[8,32]{1,0} dynamic-slice(%p.1, %p.2, %p.2), dynamic_slice_sizes={8,32}
}

%fused_update (p.3: f32[1000,32], p.4: f32[8,32], p.5: s32[]) -> f32[1000,32] {
  %p.3 = f32[1000,32]{1,0} parameter(0)
  %p.4 = f32[8,32]{1,0} parameter(1)
  %p.5 = s32[] parameter(2)
  ROOT %u = f32[1000,32]{1,0} dynamic-update-slice(%p.3, %p.4, %p.5, %p.5)
}

%gemm (p.6: bf16[64,32], p.7: bf16[16,32]) -> bf16[64,16] {
  %p.6 = bf16[64,32]{1,0} parameter(0)
  %p.7 = bf16[16,32]{1,0} parameter(1)
  ROOT %d = bf16[64,16]{1,0} dot(%p.6, %p.7), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (a: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %a = (s32[], f32[64,32]{1,0}) parameter(0)
  %x = f32[64,32]{1,0} get-tuple-element(%a), index=1
  %square = bf16[64,32]{1,0} fusion(%x), kind=kLoop, calls=%fused_square, metadata={op_name="jit(step)/jvp(loss)/mul"}
  ROOT %t = (s32[], f32[64,32]{1,0}) tuple(%x, %x)
}


ENTRY %main (e.0: f32[64,32], e.1: bf16[64,32], e.2: bf16[16,32], e.3: f32[1000,32], e.4: s32[]) -> bf16[64,16] {
  %e.0 = f32[64,32]{1,0} parameter(0)
  %e.1 = bf16[64,32]{1,0} parameter(1)
  %e.2 = bf16[16,32]{1,0} parameter(2)
  %e.3 = f32[1000,32]{1,0} parameter(3)
  %e.4 = s32[] parameter(4)
  %start = (s32[], f32[64,32]{1,0}) tuple(%e.4, %e.0)
  %loop = (s32[], f32[64,32]{1,0}) while(%start), body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %slice = f32[8,32]{1,0} fusion(%e.3, %e.4), kind=kLoop, calls=%fused_slice
  %update = f32[1000,32]{1,0} fusion(%e.3, %slice, %e.4), calls=%fused_update, metadata={op_name="jit/optimizer/add"}
  %fmha = (bf16[2,4,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %product = bf16[64,16]{1,0} fusion(%e.1, %e.2), kind=kCustom, calls=%gemm
}
"""

BACKWARD = (
    "  %back = (bf16[2,128,4,64]{3,2,1,0}, bf16[2,128,4,64]{3,2,1,0}) custom-call(%q, %q, %q, /*index=3*/%q), "
    'custom_call_target="__cudnn$fmhaSoftmaxBackward", '
    'backend_config={"cudnn_fmha_backend_config":{"mask_type":"CAUSAL","sliding_window_length":32}}\n'
)


@pytest.fixture(scope="module")
def found():
    text = HLO.replace("  ROOT %product", BACKWARD + "  ROOT %product")
    text = text.replace("  %fmha", "  %q = bf16[2,128,4,64]{3,2,1,0} bitcast(%e.1)\n  %fmha")
    return {k.name: k for k in program.Program(text).kernels()}


def test_loops_run_as_often_as_they_say(found):
    k = found["square"]
    assert (k.times, k.part, k.flops) == (2, "loss", 0)
    assert k.bytes == 64 * 32 * (4 + 2)


def test_a_slice_moves_what_it_takes(found):
    assert found["slice"].bytes == 2 * 8 * 32 * 4 + 4
    assert found["update"].bytes == 2 * 8 * 32 * 4 + 8 * 32 * 4 + 4
    assert found["update"].part == "optimizer"


def test_products_and_attention_have_flops(found):
    k = found["product"]
    assert (k.part, k.flops, k.operand, k.bytes) == (
        "products",
        2 * 64 * 16 * 32,
        "bf16",
        2 * (64 * 32 + 16 * 32 + 64 * 16),
    )
    attention = found["fmha"]
    assert attention.part == "attention" and attention.flops == 4 * 2 * 4 * 64 * (128 * 129 / 2)
    windowed = found["back"]  # 5 products over the 32 pairs of a row, but for the first rows
    assert windowed.part == "attention" and windowed.flops == 10 * 2 * 4 * 64 * (32 * 128 - 32 * 31 / 2)


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    few = program.Kernel("a", "products", 1, bytes=10**9, flops=1e9, operand="bf16")
    many = program.Kernel("b", "products", 1, bytes=10**6, flops=1e12, operand="bf16")
    assert few.floor("h100") == pytest.approx(1e9 / (0.9 * 3.35e12) + program.LAUNCH)
    assert many.floor("h100") == pytest.approx(1e12 / 700e12 + program.LAUNCH)
    eight = program.Kernel("c", "products", 1, bytes=10**6, flops=1e12, operand="f8e4m3fn")
    assert eight.floor("h100") < many.floor("h100")
    rows = kernels.by_part([few, many], "h100")
    assert rows["products"]["launches"] == 2 and rows["products"]["tflop"] == pytest.approx(1.001)
