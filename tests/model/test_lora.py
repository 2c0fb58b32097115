"""Adapters: what they change and what not, their gradients, meshes, and a stage that trains them alone."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from conftest import ROOT, relative_error, speedrun_command, speedrun_environment
from nanochat_jax.checkpoint import adapters_of, load_model, saved_steps
from nanochat_jax.config import GPTConfig, MeshConfig
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.model import lora
from nanochat_jax.model.gpt import cast_matrices, graph_of, init_params
from nanochat_jax.stages.step import place as placed
from nanochat_jax.training import loop, optim

CFG = GPTConfig(vocab_size=250, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, sequence_len=32)
RANK, STEPS, RATE = 4, 8, 1e-2


def leaves(tree) -> dict:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def same(one, other) -> bool:
    one, other = leaves(one), leaves(other)
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def start():
    """Parameters whose every part matters: what starts at zero gets values, and the head, which stays, larger ones."""
    rng = np.random.default_rng(1)
    filled = lambda p: p if np.any(p) else jnp.asarray(0.02 * rng.normal(size=p.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(filled, init_params(CFG, 0))
    return params | {"lm_head": {"weight": 200 * params["lm_head"]["weight"]}}


@pytest.fixture(scope="module")
def changed():
    """Adapters that are no longer at their start."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), lora.init(CFG, RANK, 0))


def batch(rows=8):
    """Every token follows from the one before it."""
    ids = (np.random.default_rng(0).integers(0, 250, (rows, 1)) + np.arange(33)).astype(np.int32) % 250
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}


def descent(rate):
    return optim.adamw(rate, lora.BETAS, 0.0, lambda step: 1.0)


def trained(start, mesh_config=MeshConfig(1, 1, 1), accumulation=1, dtype=jnp.float32):  # noqa: B008
    """(losses, adapters, the frozen parameters afterwards)."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor])
    frozen = jax.device_put(cast_matrices(start, dtype), sharding.tree_shardings(start, mesh))
    optimizer = descent(RATE)
    state = loop.init_state(CFG, optimizer, 0, mesh, lora.init(CFG, RANK, 0))
    step, losses = loop.make_step(graph_of(CFG, dtype), optimizer, dtype, mesh, lora.merged), []
    for _ in range(STEPS):
        state, metrics = step(state, placed(batch(), accumulation, mesh), frozen)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params), frozen


def test_every_matrix_of_the_blocks_has_an_adapter_and_nothing_else():
    adapters, params = lora.init(CFG, RANK, 0), init_params(CFG, 0)
    for layer, block in params["blocks"].items():
        for part, matrices in block.items():
            for name, matrix in matrices.items():
                if name == "ve_gate":
                    assert name not in adapters["blocks"][layer][part]
                    continue
                (out, inner), found = matrix["weight"].shape, adapters["blocks"][layer][part][name]
                assert found["a"].shape == (RANK, inner) and found["b"].shape == (out, RANK)
                assert float(found["a"].std()) == pytest.approx(inner**-0.5, rel=0.25)
    everything = [x for k, x in leaves(adapters).items() if k.endswith("['a']")]
    assert len({x.tobytes() for x in everything}) == len(everything)
    assert not same(adapters, lora.init(CFG, RANK, 1)) and same(adapters, lora.init(CFG, RANK, 0))


def test_fresh_adapters_change_nothing(start):
    fresh = lora.init(CFG, RANK, 0)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = cast_matrices(start, dtype)
        assert same(lora.merged(params, fresh), params)
    mesh, optimizer = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), descent(0.0)
    rows = placed(batch(), 1, mesh)
    state = loop.init_state(CFG, optimizer, 0, mesh, start)
    _, plain = loop.make_step(graph_of(CFG, jnp.float32), optimizer, jnp.float32, mesh)(state, rows)
    assert trained(start)[0][0] == pytest.approx(float(plain["loss"]), rel=1e-6)


def test_gradients_are_those_of_the_matrices_projected(start, changed):
    """d a = 2 b^T dW, d b = 2 dW a^T, seen in the mean of the gradients that AdamW's first step keeps."""
    mesh, first = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 1 - lora.BETAS[0]
    rows, graph, optimizer = placed(batch(), 2, mesh), graph_of(CFG, jnp.float32), descent(0.0)
    full = loop.init_state(CFG, optimizer, 0, mesh, lora.merged(start, changed))
    full, plain = loop.make_step(graph, optimizer, jnp.float32, mesh)(full, rows)
    state = loop.init_state(CFG, optimizer, 0, mesh, changed)
    state, metrics = loop.make_step(graph, optimizer, jnp.float32, mesh, lora.merged)(state, rows, start)
    assert float(metrics["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6)
    for layer, parts in changed["blocks"].items():
        for part, names in parts.items():
            for name, ab in names.items():
                whole = full.opt_state.m["blocks"][layer][part][name]["weight"] / first
                got = jax.tree.map(lambda m: m / first, state.opt_state.m["blocks"][layer][part][name])
                assert relative_error(got["a"], 2 * ab["b"].T @ whole) < 1e-4, (layer, part, name)
                assert relative_error(got["b"], 2 * whole @ ab["a"].T) < 1e-4, (layer, part, name)


def test_the_loss_falls_and_what_is_frozen_stays(start):
    losses, adapters, frozen = trained(start, dtype=jnp.bfloat16)
    assert losses[-1] < losses[0] - 0.2 and same(frozen, cast_matrices(start, jnp.bfloat16))
    assert adapters.keys() == {"blocks"} and {x.dtype for x in jax.tree.leaves(adapters)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [(MeshConfig(1, 1, 1), 4), (MeshConfig(2, 2, 1), 2), (MeshConfig(2, 1, 2), 1)],
    ids=["accumulated", "data-fsdp", "data-tensor"],
)
def test_meshes_equal_one_device(start, mesh, accumulation):
    one, many = trained(start), trained(start, mesh, accumulation)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    assert same(many[2], start)


# ------------------------------------------------------------------------------------------------ a whole stage

CALLED = "sft.lora_rank=4", "sft.lora_lr=0.003", "remat=full", "--stages"


@pytest.fixture(scope="module")
def trunk(whole, tmp_path_factory):
    """A run that has its stages up to mid, and is to train adapters in sft."""
    folder = tmp_path_factory.mktemp("lora") / "trunk"
    shutil.copytree(whole[0], folder, ignore=shutil.ignore_patterns("sft", "rl", "eval", "evals", "report*"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["sft"] |= {"lora_rank": 4, "lora_lr": 0.003}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def records(run_dir) -> list[dict]:
    path = run_dir / "sft" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def go(place, run_dir, stages, kill=False):
    """Runs the stages to their end, or until sft has saved once."""
    process = subprocess.Popen(
        speedrun_command(place, run_dir, *CALLED, stages), cwd=ROOT, env=speedrun_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    give_up = time.monotonic() + 300
    saved = run_dir / "sft" / "checkpoints"
    while kill and not saved_steps(saved) and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.005)
    if kill:
        process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == (-signal.SIGKILL if kill else 0), said[-3000:]


@pytest.fixture(scope="module")
def adapted(trunk, place):
    run_dir = trunk.parent / "adapted"
    shutil.copytree(trunk, run_dir)
    go(place, run_dir, "sft,eval")
    return run_dir


def params_of(loaded) -> dict:
    return nnx.to_pure_dict(nnx.split(loaded.model)[1])


def size(folder) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def newest(run_dir, stage):
    folder = run_dir / stage / "checkpoints"
    return folder / str(saved_steps(folder)[-1])


@pytest.mark.slow
def test_a_stage_of_adapters_is_small_and_loads_as_any_other(adapted):
    assert size(newest(adapted, "sft") / "state") < size(newest(adapted, "mid") / "state") / 2
    assert adapters_of(adapted / "sft")["from"] == "mid" and adapters_of(adapted / "mid") is None
    before, after = load_model(adapted, "mid"), load_model(adapted)
    assert after.stage == "sft" and after.identity != before.identity
    old, new = leaves(params_of(before)), leaves(params_of(after))
    moved = {k for k in old if not np.array_equal(old[k], new[k])}
    assert moved == {k for k in old if "blocks" in k and "ve_gate" not in k}
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1), jax.devices())
    on_mesh = params_of(load_model(adapted, "sft", mesh=mesh))
    assert all(relative_error(x, new[k]) < 1e-6 for k, x in leaves(on_mesh).items())
    losses = [r["loss"] for r in records(adapted) if "loss" in r]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert "facts" in json.loads((adapted / "evals" / "sft.json").read_text())["chat"]
    said = subprocess.run(
        [sys.executable, "-m", "nanochat_jax.chat", "--run-dir", str(adapted), "--stage", "sft", "-p", "Hi"],
        cwd=ROOT, env=speedrun_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_bits(adapted, trunk, place):
    run_dir = trunk.parent / "killed"
    shutil.copytree(trunk, run_dir)
    go(place, run_dir, "sft", kill=True)
    assert not (run_dir / "sft" / "done.json").is_file()
    (run_dir / "mid" / "done.json").unlink()  # it goes on from the stage that it began from, not from what is done
    go(place, run_dir, "sft")
    assert "sft: resumes from step" in (run_dir / "log.txt").read_text()
    arrays = [json.loads((newest(d, "sft") / "arrays" / "metadata").read_text()) for d in (run_dir, adapted)]
    assert arrays[0] == arrays[1] and len(saved_steps(run_dir / "sft" / "checkpoints")) == 2
    assert same(params_of(load_model(run_dir, "sft")), params_of(load_model(adapted, "sft")))


@pytest.mark.slow
def test_adapters_of_another_model_are_refused(adapted, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(adapted, run_dir)
    shutil.rmtree(run_dir / "mid" / "checkpoints")
    with pytest.raises(UserError, match="has no trained stage mid"):
        load_model(run_dir, "sft")
    shutil.copytree(run_dir / "base" / "checkpoints", run_dir / "mid" / "checkpoints")
    with pytest.raises(UserError, match="mid is not the model that stage sft was trained on"):
        load_model(run_dir, "sft")
