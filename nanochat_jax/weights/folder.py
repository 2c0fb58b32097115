"""A folder of weights: what an export writes, and what an import reads. README.md lists the files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, atomic_write_text, read_json
from nanochat_jax.weights import configs, pickles
from nanochat_jax.weights.names import to_reference
from nanochat_jax.weights.tensors import read_tensors, write_tensors
from nanochat_jax.weights.tokenizer_json import TEMPLATE, from_tiktoken, tokenizer_json
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.bytelevel import JSON_FILE, ByteLevelTokenizer
from tokenizer.tokenizer import MODEL_FILE

TENSORS = "model.safetensors"
README = Path(__file__).with_name("README.md.jinja")


def write_folder(
    folder: Path, params: Mapping, cfg: GPTConfig, tok: Tokenizer, notes: dict[str, str], dtype: str = "float32"
) -> None:
    """Fills an empty folder, with arrays of `dtype`. UserError for an architecture or a vocabulary that the format
    cannot hold."""
    classic = cfg.init == "classic"
    config = configs.transformers_config(cfg) if classic else configs.reference_config(cfg)
    special = {"bos_token_id": tok.bos, "eos_token_id": tok.assistant_end}
    # no padding token in config.json: PyTorch would take its row of the table to be without a gradient
    atomic_write_json(folder / "config.json", {**config, **special, "pad_token_id": None, "dtype": dtype})
    ends = {"eos_token_id": [tok.assistant_end, tok.bos], "pad_token_id": tok.assistant_end}
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 50, "max_new_tokens": 256}
    atomic_write_json(folder / "generation_config.json", {"bos_token_id": tok.bos, **ends, **sampling})
    _write_tokenizer(folder, tok, cfg.sequence_len)
    tensors = {name: array.astype(dtype, copy=False) for name, array in to_reference(params, cfg).items()}
    write_tensors(folder / TENSORS, tensors, notes)
    card = jinja2.Template(README.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    atomic_write_text(folder / "README.md", card.render(cfg=cfg, notes=notes))


def _write_tokenizer(folder: Path, tok: Tokenizer, length: int) -> None:
    if isinstance(tok, ByteLevelTokenizer):
        atomic_write_text(folder / JSON_FILE, tok.text)
    else:
        atomic_write_text(folder / JSON_FILE, tokenizer_json(tok))
        (folder / MODEL_FILE).write_bytes(tok.model)
    names = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "pad_token": "<|assistant_end|>"}
    kept = {"clean_up_tokenization_spaces": False, "model_max_length": length}
    atomic_write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names, **kept})
    atomic_write_text(folder / TEMPLATE.name, TEMPLATE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Weights:
    """What a folder holds. `naming`: whose parameter names; `notes`: where it says that it came from."""

    tensors: dict[str, np.ndarray]
    model: ModelConfig
    vocab_size: int
    naming: str
    tokenizer: Tokenizer
    notes: dict[str, str]


def read_folder(folder: Path, tokenizer_dir: Path | None = None) -> Weights:
    """The weights of a folder that `write_folder` filled, of transformers' `nanochat`, or of karpathy/nanochat.

    tokenizer_dir: where the tokenizer is, if elsewhere. UserError, in one line, for anything else.
    """
    config: Any = read_json(folder / "config.json")
    classic = isinstance(config, dict) and config.get("model_type") == "nanochat"
    try:
        if classic or (isinstance(config, dict) and "model_config" in config):
            tensors, notes = _arrays(folder)
        elif metas := sorted(folder.glob("meta_*.json")):
            tensors, notes, config = _newest_torch(metas[-1])
        else:
            raise UserError(
                f"{folder} holds no weights that this project knows: config.json of model type nanochat beside "
                "safetensors, or meta_<step>.json and model_<step>.pt of karpathy/nanochat"
            )
        if classic:
            model, vocab_size = configs.from_transformers(config)
        else:
            model, vocab_size = configs.from_reference_config(config["model_config"], tensors)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"the configuration in {folder} does not describe a model ({type(e).__name__}: {e})") from None
    tok = _tokenizer(tokenizer_dir or folder)
    if not vocab_size - 64 < tok.vocab_size <= vocab_size:  # a table may have been padded
        raise UserError(
            f"the tokenizer in {tokenizer_dir or folder} has {tok.vocab_size} tokens and the weights {vocab_size}; "
            "name the folder of theirs with --tokenizer"
        )
    return Weights(tensors, model, tok.vocab_size, "classic" if classic else "modern", tok, notes)


def _arrays(folder: Path) -> tuple[dict, dict]:
    """The arrays of model.safetensors or, where they are in several files, of those that its index names."""
    index = read_json(folder / f"{TENSORS}.index.json")
    names = sorted(set(index["weight_map"].values())) if index else [TENSORS]
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}")
        more, notes = read_tensors(folder / name)
        tensors |= more
    return tensors, notes


def _newest_torch(meta: Path) -> tuple[dict, dict, dict]:
    path = meta.with_name(meta.name.replace("meta_", "model_")).with_suffix(".pt")
    described = read_json(meta) or {}
    if not path.is_file():
        raise UserError(f"{meta} describes {path.name}, which is not there")
    return pickles.read_torch(path), {"step": str(described.get("step", 0))}, described


def _tokenizer(folder: Path) -> Tokenizer:
    pickled = folder / "tokenizer.pkl"
    if pickled.is_file() and not any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE)):
        return ByteLevelTokenizer(from_tiktoken(*pickles.read_tiktoken(pickled)))
    return load_tokenizer(folder)
