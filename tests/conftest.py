"""What several tests share: reference figures, and a simulated mesh of eight CPU devices."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings

# The same examples in every run; `pytest --hypothesis-profile default` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


def fuzzed(few):
    """The parameters of a fuzz test: settings for a few examples, the same in every run, and, slow, for --fuzz many."""
    fast = settings(max_examples=few, deadline=None, database=None)
    many = settings(max_examples=FUZZ, deadline=None, database=None, derandomize=False)
    return [pytest.param(fast, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]


FUZZ = int(os.environ.get("FUZZ", "300"))  # examples of a slow fuzz test, new ones in every run

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices; LLVM's optimizations would take longer than what they make faster here.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled programs are shared by workers, child processes and later runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(autouse=True, scope="session")
def the_same_type_on_every_machine():
    """Figures are compared: training runs in float32 also where the cores have bfloat16."""
    from nanochat_jax import devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "cpu_has_bfloat16", lambda: False)
        yield


LONGEST = ("test_docs", "test_speedrun", "test_meshes", "test_kills", "test_sweep", "test_train", "test_engine")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("NANOCHAT_GOLDEN") or Path(__file__).parent / "golden")


def golden_files(pattern: str) -> list[Path]:
    """Every reference file of a kind, so that the same tests run on other figures of the format."""
    return sorted(GOLDEN.glob(pattern))


class Golden:
    """One `modern_*` or `classic_*` pair of .npz and .json, as a configuration, parameters and arrays."""

    def __init__(self, path: Path):
        from nanochat_jax.config import GPTConfig

        self.arrays = dict(np.load(path))
        self.meta = json.loads(path.with_suffix(".json").read_text())
        self.arch = "modern" if path.name.startswith("modern") else "classic"
        if self.arch == "modern":
            self.cfg = GPTConfig(**self.meta["config"])
        else:
            m = self.meta
            self.cfg = GPTConfig(
                vocab_size=m["vocab_size"],
                n_layer=m["num_hidden_layers"],
                n_head=m["num_attention_heads"],
                n_kv_head=m["num_key_value_heads"],
                n_embd=m["hidden_size"],
                sequence_len=m["max_position_embeddings"],
                window_pattern="L",
                rope_base=m["rope_parameters"]["rope_theta"],
                qk_gain=1.0,
                norm_eps=m["rms_norm_eps"],
                softcap=m["final_logit_softcapping"],
                residual_scalars=False,
                value_embeds=False,
                smear=False,
                backout=False,
                vocab_multiple=1,
                init="classic",
            )

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """{name: array} of the arrays stored as prefix/name."""
        return {k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")}

    def model(self):
        """The GPT with the stored weights."""
        from flax import nnx

        from nanochat_jax.model.gpt import GPT
        from nanochat_jax.weights.names import from_reference

        graph, params = nnx.split(GPT(self.cfg, rngs=nnx.Rngs(0)))
        weights = from_reference(self.tensors("w"), nnx.to_pure_dict(params), self.cfg)
        nnx.replace_by_pure_dict(params, weights)
        return nnx.merge(graph, params)


def write_own_sources(folder: Path) -> None:
    """The project's own sources as documents: folder/pretrain with a shard to train on and one for validation."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "pretrain").mkdir(parents=True)
    texts = [p.read_text() for p in sorted((Path(__file__).parent.parent / "nanochat_jax").rglob("*.py"))]
    for i, part in enumerate((texts[:-4], texts[-4:])):
        pq.write_table(pa.table({"text": part}), folder / "pretrain" / f"shard_{i}.parquet")


@pytest.fixture
def own_sources(tmp_path, monkeypatch):
    """(text of a configuration with %s for the folder of the data) -> its path; runs then see one device."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def write(text: str) -> Path:
        write_own_sources(tmp_path / "data")
        path = tmp_path / "tiny.yaml"
        path.write_text(text % (tmp_path / "data"))
        return path

    return write


def kill_when(holds, *command: str) -> None:
    """Starts Python with these arguments and kills it when `holds()`."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    give_up = time.monotonic() + 300
    while not holds() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


@pytest.fixture(params=golden_files("modern_*.npz"), ids=lambda p: p.stem)
def golden_modern(request):
    return Golden(request.param)


@pytest.fixture(params=golden_files("modern_*.npz") + golden_files("classic_*.npz"), ids=lambda p: p.stem)
def golden(request):
    return Golden(request.param)


# --------------------------------------------------------------------------------- a run of the whole pipeline

TINY_RUN = """
model: {depth: 2, width: 32, head_dim: 16, sequence_len: 128}
tokenizer: {vocab_size: 600, sample_chars: 400000}
data: {dir: %s, cache_dir: %s, max_train_tokens: 100000, pack_buffer: 20}
base: {tokens: 61440, batch_tokens: 512, micro_batch: 2, eval_every: 60, eval_tokens: 1024, save_every: 25}
mid: {max_rows: 320, micro_batch: 4, eval_every: 40, save_every: 25}
sft: {max_rows: 320, micro_batch: 4, eval_every: 40, save_every: 25}
rl: {task: arithmetic, questions: 2, samples: 4, steps: 30, max_new_tokens: 16, micro_batch: 4, eval_every: 15,
     eval_questions: 2, eval_samples: 2, save_every: 10}
evals: {max_per_task: 4, max_new_tokens: 16, batch: 8, chat_tasks: [facts, spellingbee]}
price_per_hour: 2.0
"""


def speedrun_command(place, run_dir, *more):
    return [sys.executable, "run_speedrun.py", "--config", str(place / "tiny.yaml"), "--run-dir", str(run_dir), *more]


def speedrun_environment():
    """One device, as on a plain machine."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


@pytest.fixture(scope="session")
def place(tmp_path_factory, worker_id):
    """A folder with data (this project's own sources) and a configuration, which all workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "speedrun"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            write_own_sources(folder / "data")
            (folder / "tiny.yaml").write_text(TINY_RUN % (folder / "data", folder / "cache"))
    return folder


@pytest.fixture(scope="session")
def whole(place):
    """A run from beginning to end without a stop: (its folder, the finished process)."""
    run_dir = place / "whole"
    with FileLock(place / "whole.lock"):  # the first worker runs it, the others wait
        if not (place / "whole.out").is_file():
            command = speedrun_command(place, run_dir)
            done = subprocess.run(command, cwd=ROOT, env=speedrun_environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            (place / "whole.err").write_text(done.stderr)
            (place / "whole.out").write_text(done.stdout)
    return run_dir, SimpleNamespace(stdout=(place / "whole.out").read_text(), stderr=(place / "whole.err").read_text())
