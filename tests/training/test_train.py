"""The step and the loop: accumulation, meshes, metrics, stops. Bit-exact resuming is in test_speedrun.py."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import relative_error
from nanochat_jax.config import GPTConfig, MeshConfig, OptimConfig
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import graph_of, init_params
from nanochat_jax.model.loss import sampler
from nanochat_jax.stages.common import permutation
from nanochat_jax.stages.step import place
from nanochat_jax.training import loop, memory, optim

CFG = GPTConfig(vocab_size=250, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, sequence_len=32)
STEPS = 3


def optimizer(mesh=None, dtype=jnp.float32, gpt=CFG):
    cfg = OptimConfig(warmup_steps=0, centred_head=gpt.head_values)
    schedules = optim.make_schedules(cfg, STEPS, 0.1, "modern")
    return optim.make_optimizer(gpt, cfg, schedules, 2**19, dtype, mesh)


def batches(rows=16, masked=False):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        # every token follows from the one before it: gradients stand clear of rounding, for Adam takes even the sign
        ids = (rng.integers(0, 250, (rows, 1)) + np.arange(33)).astype(np.int32) % 250
        targets = ids[:, 1:].copy()
        if masked:
            targets[rng.random(targets.shape) < 0.7] = -1
        yield {"tokens": ids[:, :-1], "targets": targets}


def start(cfg=CFG):
    """Parameters whose every part matters: what starts at zero gets values."""
    rng = np.random.default_rng(1)

    def filled(p):
        return p if np.any(p) else jnp.asarray(0.02 * rng.normal(size=p.shape), jnp.float32)

    return jax.tree.map(filled, init_params(cfg, 0))


def run(mesh_config, accumulation, masked=False, dtype=jnp.float32, sample=None, cfg=CFG):
    """(losses, parameters) of three steps on the mesh."""
    count = int(np.prod([n for n in (mesh_config.data, mesh_config.fsdp, mesh_config.tensor)]))
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:count])
    opt = optimizer(mesh, dtype, cfg)
    state = loop.init_state(cfg, opt, 0, mesh, start(cfg))
    step, losses = loop.make_step(graph_of(cfg, dtype), opt, dtype, mesh, draw=sampler(CFG.vocab_size, sample)), []
    for batch in batches(masked=masked):
        state, metrics = step(state, place(batch, accumulation, mesh))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def differing(got, want) -> list[str]:
    """Names of the parameters that are not the same to rounding.

    backout_lambda is left to the losses: its gradient here is a small difference of large terms, and Adam, which
    divides it by its own size, makes a step of 0.2 of whatever rounding leaves.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(want)
    pairs = zip((jax.tree_util.keystr(path) for path, _ in named), jax.tree.leaves(got), jax.tree.leaves(want))
    return [name for name, a, b in pairs if "backout" not in name and relative_error(a, b) > 2e-3]


@pytest.fixture(scope="module")
def one_device():
    return run(MeshConfig(1, 1, 1), 1)


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        (MeshConfig(8, 1, 1), 2),
        (MeshConfig(4, 2, 1), 1),
        (MeshConfig(2, 2, 2), 1),
    ],
    ids=["data", "data-fsdp", "data-fsdp-tensor"],
)
def test_eight_devices_equal_one(one_device, mesh, accumulation):
    losses, params = run(mesh, accumulation)
    assert relative_error(losses, one_device[0]) < 1e-5
    assert differing(params, one_device[1]) == []


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)], ids=["data", "data-fsdp-tensor"])
def test_eight_devices_equal_one_with_every_addition(mesh):
    """Also the sample of the vocabulary, which is the whole batch's however it is split."""
    cfg = dataclasses.replace(CFG, key_offset=True, head_values=True, bigram_rows=40)
    (losses, params), (want, wanted) = run(mesh, 1, sample=96, cfg=cfg), run(MeshConfig(1, 1, 1), 4, sample=96, cfg=cfg)
    assert relative_error(losses, want) < 1e-5
    assert differing(params, wanted) == []
    assert relative_error(losses[:1], run(MeshConfig(1, 1, 1), 1)[0][:1]) > 1e-5


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=1), pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow)]
)
def test_bfloat16_on_a_cpu_runs_and_is_as_close_as_its_rounding(one_device, mesh, accumulation):
    """Runs: XLA compiles products of 16 bits in forms that it cannot run, and says so at the first step."""
    np.testing.assert_allclose(run(mesh, accumulation, dtype=jnp.bfloat16)[0], one_device[0], rtol=0.01)


def test_accumulation_weighs_every_target_alike():
    """Micro-batches with different numbers of targets give the mean over all targets, not the mean of means."""
    whole, split = run(MeshConfig(1, 1, 1), 1, masked=True), run(MeshConfig(1, 1, 1), 4, masked=True)
    assert relative_error(split[0], whole[0]) < 1e-5
    assert differing(split[1], whole[1]) == []


def test_parameters_and_moments_are_split_as_the_rules_say():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices())
    state = loop.init_state(CFG, optimizer(mesh), 0, mesh)
    head = state.params["lm_head"]["weight"]
    assert head.sharding.spec == jax.P("tensor", ("fsdp", "data"))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == head.shape]
    assert moments and all(x.addressable_shards[0].data.shape == (128, 16) for x in (head, *moments))


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(8, 1, 1), MeshConfig(4, 2, 1), MeshConfig(1, 8, 1), MeshConfig(2, 2, 2)],
    ids=["data", "data-fsdp", "fsdp", "data-fsdp-tensor"],
)
def test_large_gradients_are_reduce_scattered_over_rows(mesh):
    """In the compiled step. Along tensor, activations are summed: XLA's all-reduces of another size."""
    mesh = sharding.make_mesh(mesh, jax.devices())
    opt = optimizer(mesh)
    state = jax.eval_shape(lambda: loop.init_state(CFG, opt, 0, mesh))
    rows = jax.ShapeDtypeStruct((1, 16, 32), jnp.int32, sharding=sharding.rows(mesh, leading=1))
    step = loop.make_step(graph_of(CFG, jnp.float32), opt, jnp.float32, mesh)
    text = step.lower(sharding.abstract(state, mesh), {"tokens": rows, "targets": rows}).compile().as_text()

    def sizes(operation):
        """Elements of the results of the operations of that name; one that was combined has several."""
        results = re.findall(rf" = (.*?) {operation}(?:-start)?\(", text)
        shapes = [shape for result in results for shape in re.findall(r"f32\[([0-9,]*)\]", result)]
        return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]

    large = [p for p in jax.tree.leaves(state.params) if p.size >= sharding.SMALL]
    scattered = sizes("reduce-scatter")
    assert len(scattered) >= len(large)
    if mesh.shape["tensor"] == 1:
        assert max(sizes("all-reduce")) < sharding.SMALL


def test_rows_and_meshes_that_do_not_fit_say_what_does():
    mesh = sharding.make_mesh(MeshConfig(8, 1, 1), jax.devices())
    with pytest.raises(UserError, match="set base.batch_tokens to a multiple of 256"):
        memory.rows_per_device("base", 12 * 32, 32, mesh)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(MeshConfig(3, 1, 1), jax.devices())
    with pytest.raises(UserError, match="at most one of them -1"):
        sharding.make_mesh(MeshConfig(-1, -1, 1), jax.devices())


class Recorder:
    """Stands for the checkpointer and the tracker."""

    def __init__(self):
        self.saved, self.records = [], []

    def save(self, step, state, meta):
        self.saved.append((step, meta))

    def wait(self):
        pass

    def due(self):
        return False

    def record(self, step, **metrics):
        self.records.append((step, metrics))


class StopAt:
    def __init__(self, step):
        self.step, self.seen = step, 0

    why = "SIGTERM"

    def agreed(self, due):
        return self.seen >= self.step, due


def fit(stop_at=99, loss=1.0, begin=0):
    recorder, stop = Recorder(), StopAt(stop_at)

    def step_fn(state, batch):
        stop.seen += 1
        return state._replace(step=state.step + 1), {"loss": jnp.float32(loss), "grad_norm": jnp.float32(0)}

    def go():
        return loop.fit(
            loop.TrainState({}, (), jnp.int32(begin)),
            step_fn=step_fn,
            next_batch=lambda step, params: ({}, {"reward": step / 10}),
            steps=7,
            save_every=3,
            checkpointer=recorder,
            tracker=recorder,
            rates=lambda seconds: {},
            meta={},
            stop=stop,
            evaluate=lambda step, params: {"val_bpb": 2.0 - step / 10},
            eval_every=4,
        )

    return recorder, go


def test_fit_records_saves_and_evaluates_when_it_should():
    recorder, go = fit()
    state, last = go()
    assert int(state.step) == 7 and [step for step, _ in recorder.saved] == [3, 6, 7]
    assert [s for s, m in recorder.records if "loss" in m] == list(range(1, 8))
    assert [s for s, m in recorder.records if "val_bpb" in m] == [0, 4, 7]
    assert last["val_bpb"] == pytest.approx(1.3) and last["reward"] == 0.6
    assert recorder.saved[1][1]["last"]["reward"] == 0.5 and recorder.saved[1][1]["step"] == 6


def test_a_stop_saves_first_and_says_where():
    recorder, go = fit(stop_at=2)
    with pytest.raises(loop.Interrupted, match="saved at step 2 of 7"):
        go()
    assert [step for step, _ in recorder.saved] == [2]


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved():
    recorder, go = fit(loss=float("nan"))
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        go()
    assert recorder.saved == []


def test_rates():
    assert loop.rates(100, 6.0, 3000.0, seconds=2.0) == {"tokens_per_second": 50.0, "mfu": 0.1}
    assert loop.rates(100, 6.0, 0.0, seconds=1.0)["mfu"] is None


def test_permutation_is_a_function_of_seed_and_epoch():
    assert np.array_equal(permutation(1, 2, 50), permutation(1, 2, 50))
    assert not np.array_equal(permutation(1, 2, 50), permutation(1, 3, 50))
    assert sorted(permutation(1, 2, 50)) == list(range(50))
