"""The micro-batch that fits: chosen by the compiler's analysis, which grows with the rows as the choice assumes."""

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.errors import UserError
from nanochat_jax.training import memory


def test_the_largest_divisor_that_fits_and_few_compilations():
    sizes, asked = memory.micro_batches(48, 32), []
    assert sizes == [24, 16, 12, 8, 6, 4, 3, 2, 1]

    def needed(rows):
        asked.append(rows)
        return 100 + 10 * rows

    for limit, want in ((1000, 24), (340, 24), (339, 16), (259, 12), (115, 1)):
        asked.clear()
        assert memory.largest_that_fits(sizes, needed, limit, "base") == want and len(asked) <= 5
    with pytest.raises(UserError, match="base: a step needs .* even with 1 rows"):
        memory.largest_that_fits(sizes, needed, 109, "base")


def test_no_straight_line_is_assumed():
    need = {8: 800, 4: 210, 2: 200, 1: 200}  # the optimizer's memory, until that of the activations outgrows it
    assert memory.largest_that_fits([8, 4, 2, 1], need.__getitem__, 250, "base") == 4


def test_needed_bytes_are_what_a_program_holds():
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    kept = jax.jit(lambda x: x * 2).lower(x).compile()
    donated = jax.jit(lambda x: x * 2, donate_argnums=0).lower(x).compile()
    size = 4 * 1024 * 256
    assert 2 * size <= memory.needed_bytes(kept) < 2.5 * size
    assert size <= memory.needed_bytes(donated) < 1.5 * size


def test_the_device_at_hand_has_memory():
    assert 1e7 < memory.device_bytes() < 1e13
