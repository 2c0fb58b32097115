"""What several tests share: reference figures, and a simulated mesh of eight CPU devices."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# The same examples in every run; `pytest --hypothesis-profile default` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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

        from nanochat_jax.weights.names import from_reference
        from nanochat_jax.model import GPT

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
