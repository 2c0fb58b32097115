"""Checkpoints: bit for bit, safe against donation, kill -9, a full disk and damage; models for inference."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import ROOT
from nanochat_jax.checkpoint import Checkpointer, Damaged, load_model, read_done, saved_steps, store, write_done
from nanochat_jax.config import CheckpointConfig, MeshConfig, RunConfig, dump_yaml, from_dict
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text
from nanochat_jax.mesh import sharding
from nanochat_jax.training.loop import TrainState


def tiny_state(seed: int = 0, width: int = 16) -> TrainState:
    """Nested dictionaries, lists, NamedTuples without leaves, several types, values that == would not tell apart."""
    k = jax.random.split(jax.random.key(seed), 4)
    params = {
        "wte": {"embedding": jax.random.normal(k[0], (24, width))},
        "layers": [{"w": jax.random.normal(k[1], (width, 8)), "b": jax.random.normal(k[2], (8,), jnp.bfloat16)}],
        "odd": jnp.array([-0.0, 0.0, jnp.nan, -jnp.inf, 1e-42], jnp.float32),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"a": optax.adamw(1e-3), "s": optax.sgd(0.1, momentum=0.9), "0": optax.set_to_zero()},
            {"wte": {"embedding": "a"}, "layers": [{"w": "s", "b": "a"}], "odd": "0"},
        ),
    )
    return TrainState(params, optimizer.init(params), jnp.int32(seed))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(state) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.fixture
def checkpointer(tmp_path):
    with_close = Checkpointer(tmp_path / "checkpoints")
    yield with_close
    with_close.close()


# --------------------------------------------------------------------------------------------- what is saved


def test_state_and_meta_come_back_bit_for_bit(checkpointer):
    state = tiny_state(7)
    assert checkpointer.latest() is None
    checkpointer.save(7, state, {"tokenizer": "ab", "last": {"loss": 1.5, "bpb": None}})
    checkpointer.wait()
    assert checkpointer.latest() == 7
    got, meta = checkpointer.restore(abstract(state))
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert bits(got) == bits(state)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(state)]
    assert meta == {"tokenizer": "ab", "last": {"loss": 1.5, "bpb": None}}


@pytest.mark.parametrize("devices", [1, 8])
def test_buffers_may_be_donated_as_soon_as_save_returns(checkpointer, devices):
    if jax.device_count() < devices:
        pytest.skip("needs 8 simulated devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    put = NamedSharding(jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), P("x"))
    state = {"w": [jax.device_put(jnp.full((512, 512), float(i)), put) for i in range(8)], "step": jnp.int32(0)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = step(state)  # now every buffer is one that XLA made
    want, like = bits(state), abstract(state)
    checkpointer.save(1, state, {})
    for _ in range(30):
        state = step(state)
    jax.block_until_ready(state)
    got, _ = checkpointer.restore(like)
    assert bits(got) == want


def test_meta_is_copied(checkpointer):
    meta = {"last": {"loss": 1.0}}
    checkpointer.save(1, tiny_state(), meta)
    meta["last"]["loss"] = 2.0
    assert checkpointer.restore(abstract(tiny_state()))[1] == {"last": {"loss": 1.0}}


def test_meta_that_is_not_json_is_refused_before_anything_is_written(checkpointer):
    with pytest.raises(TypeError):
        checkpointer.save(1, tiny_state(), {"array": np.zeros(3)})
    assert checkpointer.latest() is None


def test_restores_onto_another_mesh(checkpointer):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    state = tiny_state(3)
    first = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    second = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(state, sharding.tree_shardings(state, first))
    assert placed.params["wte"]["embedding"].sharding.spec == P("tensor", "fsdp")
    checkpointer.save(3, placed, {})
    for mesh in (second, first, sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        wanted = sharding.abstract(state, mesh)
        got, _ = checkpointer.restore(wanted)
        assert bits(got) == bits(state)
        assert all(x.sharding == w.sharding for x, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)))


# ---------------------------------------------------------------------------------------- which ones are kept


def test_the_newest_stay(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    for step in (2, 4, 6, 8):
        checkpointer.save(step, tiny_state(step), {"step": step})
    checkpointer.close()
    assert saved_steps(tmp_path) == [6, 8]
    again = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    assert again.latest() == 8
    shutil.rmtree(tmp_path / "8")
    assert again.latest() == 6 and again.restore(abstract(tiny_state()))[1] == {"step": 6}
    shutil.rmtree(tmp_path / "6")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        again.restore(abstract(tiny_state()))
    again.close()


def test_one_for_every_so_many_hours_stays_besides(tmp_path):
    times = {}

    def save(cfg, steps):
        checkpointer = Checkpointer(tmp_path, cfg)
        for step in steps:
            checkpointer.save(step, {"step": jnp.int32(step)}, {})
            times[step] = time.time()
            time.sleep(0.4)
        checkpointer.close()
        return saved_steps(tmp_path)

    cfg = CheckpointConfig(keep=2, keep_every_hours=1 / 3600)
    kept = save(cfg, range(1, 9))
    assert kept[0] == 1 and kept[-2:] == [7, 8] and len(kept) > 3
    again = save(cfg, range(9, 13))  # the times of those before come from the disk
    assert set(kept[:-2]) <= set(again) and again[-2:] == [11, 12]
    by_time = again[:-2]
    assert all(0.8 < times[b] - times[a] < 4 for a, b in zip(by_time, by_time[1:])), times
    assert save(CheckpointConfig(keep=1), [13]) == [13]


def test_a_save_is_due_when_its_time_has_passed(tmp_path, checkpointer):
    assert not checkpointer.due()
    timed = Checkpointer(tmp_path / "timed", CheckpointConfig(save_minutes=0.1 / 60))
    time.sleep(0.11)
    assert timed.due()
    timed.save(1, {"step": jnp.int32(1)}, {})
    assert not timed.due()
    time.sleep(0.11)
    assert timed.due()
    timed.close()


def test_a_step_that_is_there_stays_as_it_is_and_none_goes_back(checkpointer):
    checkpointer.save(5, tiny_state(1), {"n": 1})
    checkpointer.save(5, tiny_state(2), {"n": 2})
    assert checkpointer.restore(abstract(tiny_state()))[1] == {"n": 1}
    with pytest.raises(ValueError, match="before the newest"):
        checkpointer.save(4, tiny_state(), {})


def test_other_settings_are_named(checkpointer):
    checkpointer.save(1, tiny_state(width=16), {})
    with pytest.raises(UserError, match=r"layers/0/w is float32\[16, 8\] there and float32\[32, 8\] here") as e:
        checkpointer.restore(abstract(tiny_state(width=32)))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no such array"):
        checkpointer.restore({"params": {"more": jax.ShapeDtypeStruct((2,), jnp.float32)}})
    assert checkpointer.latest() == 1  # nothing was put aside


def test_nothing_saved_yet(checkpointer):
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpointer.restore(abstract(tiny_state()))


# ------------------------------------------------------------------------------------------- what goes wrong


def make_two(directory: Path) -> None:
    checkpointer = Checkpointer(directory)
    for step in (1, 2):
        checkpointer.save(step, tiny_state(step), {"step": step})
    checkpointer.close()


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    middle = len(raw) // 2
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(raw[:middle])
    elif how == "zeros":
        path.write_bytes(raw[:middle] + bytes(min(16, len(raw) - middle)) + raw[middle + 16 :])
    else:  # one bit: a digit stays a digit
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])


def restored(directory: Path) -> tuple[int, list[str]]:
    """(the step whose state came back, bit for bit, what was said about it)"""
    said: list[str] = []
    checkpointer = Checkpointer(directory, say=said.append)
    state, meta = checkpointer.restore(abstract(tiny_state()))
    checkpointer.close()
    assert bits(state) == bits(tiny_state(meta["step"]))
    return meta["step"], said


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("two")
    make_two(directory)
    return directory


@pytest.mark.parametrize("how", ["missing", "cut", "flipped", "zeros"])
def test_a_damaged_newest_checkpoint_is_left_out(two, tmp_path, how, capfd):
    """Whatever file is hit, the state is that of a step as saved, and where it is the older one, a line says why."""
    files = sorted(p.relative_to(two) for p in (two / "2").rglob("*") if p.is_file())
    harmless = ("commit_success.txt", "_CHECKPOINT_METADATA")  # they hold nothing that a restore needs
    assert len(files) > 12 and sum(f.name not in harmless for f in files) >= 9
    for file in files:
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(two, bad)
        damage(bad / file, how)
        if (bad / file).exists() and (bad / file).read_bytes() == (two / file).read_bytes():
            continue  # there were zeros
        step, said = restored(bad)
        if file.name in harmless:
            assert (step, said) == (2, []), file
            continue
        assert step == 1 and len(said) == 1 and "\n" not in said[0] and "checkpoint 2" in said[0], (file, said)
        assert saved_steps(bad) == [1] and (bad / "2.damaged").is_dir()
    checkpointer = Checkpointer(bad)  # goes on from there, over what was put aside
    checkpointer.save(3, tiny_state(3), {"step": 3})
    checkpointer.close()
    assert restored(bad) == (3, [])
    err = capfd.readouterr().err
    assert "Traceback" not in err and "Exception ignored" not in err


@pytest.mark.parametrize("item", ["meta", "arrays"])
def test_no_other_record_passes_for_what_was_saved(two, tmp_path, item):
    """Every byte of it flipped in turn, in the ways that leave digits and letters what they are."""
    checkpoint = tmp_path / "2"
    shutil.copytree(two / "2", checkpoint)
    want, path = store.read_records(checkpoint), checkpoint / item / "metadata"
    raw = path.read_bytes()
    for at in range(0, len(raw), 1 if item == "meta" else 7):
        for bit in (1, 2, 32):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])
            try:
                assert store.read_records(checkpoint) == want
            except Damaged as e:
                assert "is not what was written" in str(e)


def test_an_empty_folder_with_a_number_is_no_checkpoint(two, tmp_path):
    shutil.copytree(two, tmp_path / "more")
    (tmp_path / "more" / "7").mkdir()
    step, said = restored(tmp_path / "more")
    assert step == 2 and len(said) == 1 and "checkpoint 7" in said[0]
    (tmp_path / "alone" / "7").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        restored(tmp_path / "alone")


def test_all_damaged(tmp_path):
    make_two(tmp_path)
    for step in "12":
        shutil.rmtree(tmp_path / step / "state")
    said = []
    checkpointer = Checkpointer(tmp_path, say=said.append)
    with pytest.raises(UserError, match="no checkpoint in .* can be read; put a whole one there"):
        checkpointer.restore(abstract(tiny_state()))
    checkpointer.close()
    assert len(said) == 2


@pytest.fixture
def full_disk():
    """No file of this process may grow beyond 64 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_is_noticed(tmp_path, full_disk):
    large = {"w": jnp.ones((1024, 1024)), "step": jnp.int32(2)}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, large, {})
    checkpointer.wait()
    full_disk()
    checkpointer.save(2, large, {})
    with pytest.raises(UserError, match="could not be written") as e:
        checkpointer.wait()
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert saved_steps(tmp_path) == [1]


def test_a_failed_save_stops_the_next_one(tmp_path, full_disk):
    large = {"w": jnp.ones((1024, 1024)), "step": jnp.int32(2)}
    checkpointer = Checkpointer(tmp_path)
    full_disk()
    checkpointer.save(2, large, {})
    with pytest.raises(UserError, match="could not be written"):
        checkpointer.save(3, large, {})
    assert saved_steps(tmp_path) == []


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written to .*file/checkpoints .*make it writable") as e:
        Checkpointer(tmp_path / "file" / "checkpoints")
    assert "\n" not in str(e.value)


# On a disk of 12 MB: fills it, saves, makes room, goes on; then the disk becomes read-only.
SMALL_DISK = """
import subprocess, sys
from pathlib import Path
import jax, jax.numpy as jnp
from nanochat_jax.checkpoint import Checkpointer, saved_steps
from nanochat_jax.errors import UserError

def state_of(step):
    return {"w": jnp.full((512, 1024), step, jnp.float32), "step": jnp.int32(step)}

def refusal(do):
    try:
        do()
    except UserError as e:
        print(e)
        return
    raise AssertionError("it was not refused")

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], check=True)
directory = disk / "checkpoints"
checkpointer = Checkpointer(directory)
checkpointer.save(1, state_of(1), {"step": 1})
checkpointer.wait()
filler = disk / "filler"
filler.write_bytes(bytes(9 << 20))
checkpointer.save(2, state_of(2), {"step": 2})
refusal(checkpointer.close)
assert saved_steps(directory) == [1], saved_steps(directory)
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(0))
filler.unlink()
for step in (2, 3):
    checkpointer = Checkpointer(directory)
    state, meta = checkpointer.restore(like)
    assert meta["step"] == step - 1 and (state["w"] == step - 1).all()
    checkpointer.save(step, state_of(step), {"step": step})
    checkpointer.close()
assert sorted(p.name for p in directory.iterdir()) == [".lock", "2", "3"]
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
refusal(lambda: Checkpointer(directory))
"""


def test_a_full_disk_and_one_that_is_read_only(tmp_path):
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own (unshare --user --mount)")
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [*inside, sys.executable, "-c", SMALL_DISK, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr[-3000:]
    full, read_only = out.stdout.splitlines()
    assert "could not be written" in full and "make room" in full and "Read-only file system" in read_only


def test_one_process_at_a_time(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    code = (
        "import sys; from nanochat_jax.files import claim; from nanochat_jax.errors import UserError\n"
        "try: claim(sys.argv[1])\nexcept UserError as e: print(e); sys.exit(2)"
    )
    other = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "another process" in refused.stdout
    checkpointer.close()
    assert subprocess.run(other, cwd=ROOT).returncode == 0


# Each round is a child forked before JAX has started, which resumes, saves step after step and kills itself.
KILLED = """
import os, random, signal, sys, threading, time, traceback
from pathlib import Path
import jax, jax.numpy as jnp
from nanochat_jax.checkpoint import Checkpointer, saved_steps

def state_of(step):
    return {"w": jnp.full((1024, 1024), step, jnp.float32), "step": jnp.int32(step)}

def child(directory, seed):
    chance = random.Random(seed)
    before = saved_steps(directory)
    def killer():
        if seed % 2:  # as soon as a save is under way, and a little later
            while not any("tmp" in p.name for p in directory.iterdir()):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
        else:  # some time after a save of its own is whole, however slow the machine is
            while saved_steps(directory) == before:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.3))
        os.kill(os.getpid(), signal.SIGKILL)
    checkpointer = Checkpointer(directory)
    step = checkpointer.latest() or 0
    if step:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(0))
        state, meta = checkpointer.restore(like)
        assert meta["step"] == step == int(state["step"]), (meta, step)
        assert (state["w"] == step).all()
    threading.Thread(target=killer, daemon=True).start()
    while True:
        step += 1
        checkpointer.save(step, state_of(step), {"step": step})

directory = Path(sys.argv[1])
for seed in range(8):
    pid = os.fork()
    if pid == 0:
        try:
            child(directory, seed)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (seed, status)
    names = sorted(p.name for p in directory.iterdir())
    assert sum("tmp" in n for n in names) <= 1, f"what an earlier round left is still there: {names}"
    print(saved_steps(directory), names)
"""


def test_kill_9_while_saving_leaves_whole_checkpoints(tmp_path):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    out = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert "damaged" not in out.stderr
    assert max(saved_steps(directory)) >= 4, out.stdout  # the four even rounds saved one step each, at least


# ------------------------------------------------------------------------------------------ done marks, models


def test_done_marks(tmp_path):
    assert read_done(tmp_path / "base") is None
    write_done(tmp_path / "base", {"seconds": 1.5, "metrics": {"loss": 2.0}, "steps": 3})
    assert read_done(tmp_path / "base") == {"seconds": 1.5, "metrics": {"loss": 2.0}, "steps": 3}
    assert os.listdir(tmp_path / "base") == ["done.json"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with a tokenizer, a base stage that has ended and a mid stage that is under way."""
    from nanochat_jax.config import TokenizerConfig
    from nanochat_jax.model import scaling
    from nanochat_jax.model.gpt import init_params
    from tokenizer import load_tokenizer
    from tokenizer.train import train_tokenizer

    run = tmp_path_factory.mktemp("runs") / "tiny"
    texts = [p.read_text() for p in sorted((ROOT / "nanochat_jax").glob("*.py"))]
    train_tokenizer(iter(texts), run / "tokenizer", TokenizerConfig(vocab_size=512), log=lambda _: None)
    config = from_dict(
        RunConfig,
        {"model": {"depth": 2, "width": 32, "head_dim": 16, "sequence_len": 64}, "data": {"dir": str(run / "gone")}},
    )
    atomic_write_text(run / "config.yaml", dump_yaml(config))
    tokenizer = load_tokenizer(run / "tokenizer")
    cfg = scaling.gpt_config(config.model, tokenizer.vocab_size)
    for seed, stage in enumerate(("base", "mid")):
        params = init_params(cfg, seed)
        state = TrainState(params, optax.adam(1e-3).init(params), jnp.int32(9))
        checkpointer = Checkpointer(run / stage / "checkpoints")
        checkpointer.save(9, state, {"tokenizer": tokenizer.hash, "stage": stage})
        checkpointer.close()
    write_done(run / "base", {"seconds": 1.0})
    return run


def params_of(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.split(model)[1])


def test_load_model(run_dir):
    from nanochat_jax.model.gpt import init_params

    loaded = load_model(run_dir)  # though its data folder is gone
    assert (loaded.stage, loaded.step, loaded.meta["stage"]) == ("base", 9, "base")
    assert loaded.tokenizer.vocab_size == loaded.model.cfg.vocab_size
    assert bits(params_of(loaded.model)) == bits(init_params(loaded.model.cfg, 0))
    logits = loaded.model(jnp.asarray([loaded.tokenizer.encode("def main")], jnp.int32))
    assert logits.shape[-1] == loaded.model.cfg.vocab_size and bool(jnp.isfinite(logits).all())
    under_way = load_model(run_dir, "mid")
    assert bits(params_of(under_way.model)) == bits(init_params(loaded.model.cfg, 1))


def test_loaded_parameters_join_any_mesh(run_dir):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    plain, placed = params_of(load_model(run_dir).model), params_of(load_model(run_dir, mesh=mesh).model)
    assert bits(plain) == bits(placed)
    assert jax.tree.leaves(placed)[0].sharding.mesh == mesh
    both = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))(plain, placed)  # uncommitted ones go where they must
    assert jax.tree.leaves(both)[0].sharding.device_set == set(mesh.devices.flat)


def test_load_model_from_a_relative_path(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    assert bits(params_of(load_model("tiny").model)) == bits(params_of(load_model(run_dir).model))


def test_load_model_says_what_is_wrong(run_dir, tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no trained stage rl; it has base, mid"):
        load_model(run_dir, "rl")
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    (other / "base" / "done.json").unlink()
    with pytest.raises(UserError, match="no stage of .* has ended yet; .* or take stage mid"):
        load_model(other)
    meta = other / "mid" / "checkpoints" / "9" / "meta" / "metadata"
    meta.write_text(json.dumps({"tokenizer": "0" * 16}))  # as records were before they had a seal
    with pytest.raises(UserError, match="not the tokenizer that stage mid was trained with"):
        load_model(other, "mid")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("width: 32", "width: 48"))
    with pytest.raises(UserError, match="made with other settings"):
        load_model(other, "mid")
    shutil.rmtree(other / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer"):
        load_model(other, "mid")
    for stage in ("base", "mid"):
        shutil.rmtree(other / stage)
    with pytest.raises(UserError, match="no trained stage base; it has none yet"):
        load_model(other, "base")
