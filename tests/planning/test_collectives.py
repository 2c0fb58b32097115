"""What waits for links, against sums made by hand on small programs."""

import pytest

from nanochat_jax.planning import collectives, targets
from nanochat_jax.planning.collectives import Links
from nanochat_jax.planning.program import RATES, Program

# Two kernels of 335 MB: one beside the gather of 8 x 100 MB, one behind; then a reduction beside nothing, in a loop.
HLO = """
%body (a: f32[100000000]) -> f32[100000000] {
  %a = f32[100000000]{0} parameter(0)
  ROOT %sum = f32[100000000]{0} all-reduce(%a), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}

%wrapped (b: f32[8000000]) -> f32[1000000] {
  %b = f32[8000000]{0} parameter(0)
  ROOT %rs = f32[1000000]{0} reduce-scatter(%b), replica_groups={}, dimensions={0}
}

ENTRY %main (e.0: bf16[50000000], e.1: f32[100000000], e.2: f32[8000000]) -> f32[100000000] {
  %e.0 = bf16[50000000]{0} parameter(0)
  %e.1 = f32[100000000]{0} parameter(1)
  %e.2 = f32[8000000]{0} parameter(2)
  %gather = (bf16[50000000]{0}, bf16[400000000]{0}) all-gather-start(%e.0), replica_groups={{0,1,2,3,4,5,6,7}}
  %first = f32[100000000]{0} copy(%e.1), metadata={op_name="jit(step)/optimizer/mul"}
  %done = bf16[400000000]{0} all-gather-done(%gather)
  %scatter = ((f32[8000000]{0}), f32[1000000]{0}) async-start(%e.2), calls=%wrapped
  %second = f32[100000000]{0} copy(%e.1)
  %scattered = f32[1000000]{0} async-done(%scatter)
  ROOT %loop = f32[100000000]{0} while(%second), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_what_no_kernel_hides_is_exposed():
    links = Links.of("h100", 8)
    busy, found = collectives.play(Program(HLO), "h100", links)
    gather, scatter, reduction = found
    kernel = 8e8 / (0.9 * 3.35e12) + 2e-6
    assert busy == pytest.approx(2 * kernel)
    assert (gather.bytes, gather.seconds) == (8e8, pytest.approx(10e-6 + 7e8 / (0.8 * 450e9)))
    assert gather.exposed == pytest.approx(gather.seconds - kernel) and dict(gather.beside) == {"optimizer": kernel}
    assert (scatter.op, scatter.exposed, scatter.seconds) == ("reduce-scatter", 0, pytest.approx(10e-6 + 28e6 / 360e9))
    assert (reduction.times, reduction.exposed) == (3, pytest.approx(10e-6 + 2 * 4e8 * 3 / 4 / 360e9))
    assert collectives.exposed(found) == gather.exposed + 3 * reduction.exposed
    kinds = collectives.by_kind(found)
    assert list(kinds) == [
        "all-reduce beside nothing",
        "all-gather beside optimizer",
        "reduce-scatter beside elementwise",
    ]
    assert kinds["all-reduce beside nothing"]["number"] == 3


def test_the_slower_of_the_links_counts():
    """Each card between two hosts of eight brings an eighth of the half that its host lacks, NVLink the rest."""
    everyone, size = list(range(16)), 16e9
    inside = 10e-6 + size * (15 / 16 - 1 / 2 / 8) / (0.8 * 450e9)
    assert Links.of("h100", 16).seconds("all-gather", everyone, size) == pytest.approx(inside)
    across = 10e-6 + size / 2 / (0.8 * 50e9)
    assert Links.of("h100", 16).seconds("reduce-scatter", [3, 11], size) == pytest.approx(across)
    swapped = Links.of("h100", 16).seconds("all-to-all", everyone, size)
    assert swapped == pytest.approx(10e-6 + size / 2 / (0.8 * 50e9))
    within = Links.of("h100", 16).seconds("all-gather", everyone[8:], size)
    assert within == pytest.approx(10e-6 + size * 7 / 8 / (0.8 * targets.GPUS["h100"].link))
    assert Links.of("h100", 16, pcie=True).seconds("all-gather", everyone[8:], size) > 10 * within


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{4,5,6,7},{0,1,2,3}}", [4, 5, 6, 7]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=[1,8]<=[2,2,2]T(2,1,0)", [0, 4, 2, 6, 1, 5, 3, 7]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups_are_read_in_each_notation(text, group):
    (body,) = Program(f"ENTRY %m (p: f32[]) -> f32[] {{\n  %r = f32[] all-reduce(%p), {text}\n}}").computations.values()
    assert collectives.first_group(body[0], 8) == group


def test_each_described_gpu_has_rates():
    assert set(RATES) == set(targets.GPUS)
