"""Configuration: frozen dataclasses, filled from YAML and `key=value` overrides.

`RunConfig` is what a person writes; `GPTConfig` is the architecture that `scaling.gpt_config` makes of it.
An unknown key is an error that names the nearest one. Imports nothing of ours but the error type.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from nanochat_jax.errors import UserError


@dataclass(frozen=True)
class GPTConfig:
    """The architecture, resolved: everything that `model.GPT` needs. Defaults are the `modern` recipe."""

    vocab_size: int  # entries of the tokenizer; tables are padded to a multiple of vocab_multiple
    n_layer: int
    n_head: int
    n_kv_head: int  # grouped-query attention where smaller than n_head
    n_embd: int
    sequence_len: int
    window_pattern: str = "SSSL"  # tiled over layers; S = a quarter of the context, L = all; the last layer is always L
    rope_base: float = 100_000.0
    qk_gain: float = 1.2  # multiplies q and k after their norm
    norm_eps: float = 1.1920928955078125e-07  # float32 machine epsilon
    softcap: float = 15.0  # logits = softcap * tanh(z / softcap)
    residual_scalars: bool = True
    value_embeds: bool = True
    smear: bool = True
    backout: bool = True
    vocab_multiple: int = 64
    init: str = "modern"  # modern | classic

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def windows(self) -> tuple[int, ...]:
        """Keys that a query may look back on besides itself, per layer; sequence_len means all of them."""
        short = -(-self.sequence_len // 4 // 128) * 128
        tiled = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer)]
        tiled[-1] = "L"
        return tuple(short if c == "S" else self.sequence_len for c in tiled)

    def has_value_embed(self, layer: int) -> bool:
        """Value embeddings stand in every second layer, the last one included."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2


@dataclass(frozen=True)
class ModelConfig:
    """What a person says of the model. None means: as depth or arch says."""

    arch: str = "modern"  # modern | classic (the $100 run of October 2025)
    depth: int = 4
    width: int | None = None  # 64 * depth, rounded up to whole heads
    head_dim: int = 128
    n_kv_head: int | None = None
    sequence_len: int = 2048
    window_pattern: str | None = None


@dataclass(frozen=True)
class TokenizerConfig:
    vocab_size: int = 32768
    sample_chars: int = 100_000_000  # characters that the trainer sees; it holds all of them in memory
    max_doc_chars: int = 10_000  # of any one document


@dataclass(frozen=True)
class DataConfig:
    source: str = "auto"  # auto | embedded | local | hub; auto is local where dir is set, else embedded
    dir: str | None = None  # local: pretrain/ (parquet, jsonl, txt), chat/*.jsonl.gz, tasks/*.parquet, core/, words/
    cache_dir: str | None = None  # packed rows and downloads; default: `cache` beside the run directory
    text_column: str = "text"  # of parquet and JSON lines, local or of the hub
    hub_pretrain: str = "karpathy/climbmix-400b-shuffle"  # owner/name, or climbmix, fineweb_edu, fineweb
    hub_folder: str | None = None  # take only what is below this folder of the dataset, such as sample/10BT
    hub_shards: int = 8  # training shards to download; the last shard of the dataset is always the validation shard
    max_train_tokens: int | None = None  # stop packing there
    pack_buffer: int = 1000  # documents that best-fit packing chooses from
    pack_workers: int | None = None  # processes that tokenize beside training; None: all cores but one; 0: none


@dataclass(frozen=True)
class OptimConfig:
    """Base rates at a batch of 2^19 tokens and width 768; optim.py scales them."""

    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    weight_decay: float | None = None  # of Muon's matrices; None: the scaling rule
    lr_scale: float = 1.0  # multiplies every rate
    warmup_steps: int = 40
    warmdown: float = 0.65  # share of the steps over which the rate falls
    final_lr: float = 0.05  # as a share of the peak


@dataclass(frozen=True)
class BaseConfig:
    optim: OptimConfig = field(default_factory=OptimConfig)
    ratio: float = 12.0  # training tokens per scaling parameter
    tokens: int | None = None  # overrides ratio
    fp8: bool = False  # products of the training step in 8-bit floats; for H100s and later, emulated elsewhere
    batch_tokens: int | None = None  # tokens per optimizer step; None: the scaling rule
    micro_batch: int = 8  # rows per data-parallel device and micro-step
    eval_every: int = 250  # steps between validation passes
    eval_tokens: int = 10_485_760  # of the validation shard; at most what it holds
    save_every: int = 500  # steps between checkpoints; the last step is always saved
    core_every: int = 2000  # steps between CORE evaluations, where eval_every divides them; 0: in the eval stage only


@dataclass(frozen=True)
class FinetuneConfig:
    """mid and sft."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            embedding_lr=0.2,
            unembedding_lr=0.004,
            weight_decay=0.0,
            warmup_steps=0,
            warmdown=0.2,
            final_lr=0.0,
        )
    )
    all_targets: bool = False  # learn every token, and not the assistant's alone
    epochs: float = 1.0
    max_rows: int | None = None  # cap on packed rows, for small machines
    mixture: dict[str, int] | None = None  # task name -> how many times it is repeated (or, negative, rows taken)
    lora_rank: int | None = None  # train low-rank changes of the blocks' matrices alone (lora.py); None: everything
    lora_lr: float = 2e-4  # their peak rate, before optim.lr_scale; of optim, the schedule alone applies besides
    batch_tokens: int | None = None  # None: as in base
    micro_batch: int = 8
    eval_every: int = 200
    save_every: int = 500


@dataclass(frozen=True)
class RLConfig:
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            embedding_lr=0.2,
            unembedding_lr=0.004,
            weight_decay=0.0,
            lr_scale=0.05,
            warmup_steps=0,
            warmdown=1.0,
            final_lr=0.0,
        )
    )
    # a name, or names with their shares of the questions, {gsm8k: 3, spellingbee: 1}; None: gsm8k, or arithmetic with
    # the embedded data
    task: str | dict[str, int] | None = None
    questions: int = 16  # per step
    samples: int = 16  # per question
    objective: str = "grpo"  # grpo | dpo
    beta: float = 0.1  # of DPO: how strongly its preferences hold to the model that RL began with
    zscore: bool = False  # divide a question's advantages by their standard deviation
    kl: float | None = None  # weight of the KL to the model that RL began with; 0 only measures it; None: neither
    clip: float | None = None  # the ratio to the policy that sampled is kept within 1 - clip .. 1 + clip; None: free
    clip_high: float | None = None  # within 1 - clip .. 1 + clip_high; None: as clip
    epochs: int = 1  # passes over a step's samples; beyond the first update the ratio is not 1
    minibatches: int = 1  # updates in a pass, each on its part of the questions
    steps: int | None = None  # None: one epoch over the questions
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 50
    micro_batch: int = 16  # sequences per data-parallel device and micro-step
    eval_every: int = 60
    eval_questions: int = 400  # of each task
    eval_samples: int = 8  # pass@k for k up to this
    save_every: int = 60


@dataclass(frozen=True)
class EvalConfig:
    chat_tasks: tuple[str, ...] | None = None  # None: all that the data source has
    core: bool = True  # CORE on the base model, where the bundle is at hand
    core_dir: str | None = None  # default: data.dir/core, or the one downloaded
    max_per_task: int | None = None  # examples per task; None: all
    max_new_tokens: int = 512
    samples: int = 0  # answers to every generative question, drawn beside the greedy one, for pass@k
    temperature: float = 0.8  # of these
    batch: int = 32  # slots of the engine, and rows of a scoring batch
    stages: tuple[str, ...] = ("base", "mid", "sft", "rl")
    sandbox: str = "auto"  # of HumanEval's programs. auto: what the machine allows; required: namespaces and seccomp


@dataclass(frozen=True)
class CheckpointConfig:
    """Of every stage. The stages' save_every says after how many steps one is saved."""

    save_minutes: float | None = None  # saved after so long in any case; None: by save_every alone
    keep: int = 2  # the newest
    keep_every_hours: float | None = None  # and the first, and one for every so many hours after it; None: no others


@dataclass(frozen=True)
class TrackingConfig:
    """What is recorded of training, where beside metrics.jsonl, and what an alarm does."""

    tensorboard: bool = False  # event files in RUN_DIR/tensorboard; needs the extra of that name
    wandb: str | None = None  # a project of Weights & Biases; needs the extra of that name
    samples: int = 3  # prompts that the model goes on from at each of base's evaluations; 0: none
    trace_at: int | None = None  # a step of every stage: it and the next two are profiled into <stage>/trace
    stop_on_spike: bool = False  # save and stop where the loss leaps up (alarms.py says when); else it is only said


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class RunConfig:
    seed: int = 1337
    dtype: str = "auto"  # of the products: float32 | bfloat16; auto: bfloat16, but on a CPU for training alone, if fast
    attention: str = "auto"  # auto | cudnn | flash | blocks; auto is the fastest, measured before the first step
    price_per_hour: float | None = None  # of the whole machine, in dollars; for the report
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    mid: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(all_targets=True))
    sft: FinetuneConfig = field(default_factory=FinetuneConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True)
class SweepConfig:
    """Either budgets of FLOPs, which give iso-FLOP curves, or ratios of tokens to parameters."""

    depths: tuple[int, ...] = ()
    flops: tuple[float, ...] = ()  # of training a model, by scaling.flops_per_token
    ratios: tuple[float, ...] = ()  # tokens per scaling parameter
    aspect_ratio: int | None = None  # width per layer, rounded up to whole heads; None: as depth says, 64


# ---------------------------------------------------------------------------------------------- building


def _convert(value, hint, where: str):
    """`value` from YAML as the annotated type `hint`; a UserError that names `where` if it does not fit."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hints = [a for a in typing.get_args(hint) if a is not type(None)]
        hint = next((a for a in hints if (typing.get_origin(a) or a) is type(value)), hints[0])
        return _convert(value, hint, where)
    if dataclasses.is_dataclass(hint):
        raise UserError(f"{where} is a section of settings; write {where}.<key>=<value>, not {where}={value!r}")
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise UserError(f"{where} takes a list such as a,b and not {value!r}")
        return tuple(_convert(v, typing.get_args(hint)[0], where) for v in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} takes a mapping such as {{name: 1}} and not {value!r}")
        return {str(k): _convert(v, typing.get_args(hint)[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not hint:
        raise UserError(f"{where} takes {'an' if hint is int else 'a'} {hint.__name__} and not {value!r}")
    return value


def from_dict(cls, values: dict, where: str = "", default=None):
    """A dataclass from nested dictionaries; what they leave out is as in `default`, an instance, where one is given.

    UserError for an unknown key (it names the nearest) or a wrong type.
    """
    default = cls() if default is None else default
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    kwargs = {}
    for key, value in (values or {}).items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
            raise UserError(f"unknown setting {path}: {hint}")
        section = getattr(default, key)
        if dataclasses.is_dataclass(section) and isinstance(value, dict):
            kwargs[key] = from_dict(type(section), value, path, section)
        else:
            kwargs[key] = _convert(value, hints[key], path)
    return dataclasses.replace(default, **kwargs)


def to_dict(config) -> dict:
    """Nested plain dictionaries and lists, as YAML and JSON take them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _merge(into: dict, other: dict) -> dict:
    out = dict(into)
    for key, value in other.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if nested else value
    return out


def _read_yaml(path: str | Path) -> dict:
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        near = ", ".join(sorted(str(p) for p in folder.glob("*.yaml"))) or "none"
        raise UserError(f"no configuration file {path}; at hand: {near}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of settings")
    return values


def _parse_override(text: str) -> dict:
    key, sep, value = text.partition("=")
    if not sep or not key:
        raise UserError(f"cannot read {text!r}: settings are written key=value, for example model.depth=6")
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        parsed = value
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def load_config(
    path: str | Path | None = None, mesh: str | Path | None = None, overrides: typing.Sequence[str] = ()
) -> RunConfig:
    """The run's configuration: defaults, then the file, then the mesh file, then `key=value` overrides.

    Keys that later parts share with earlier ones win. Raises UserError with a line that says what to change.
    """
    return checked(read_settings(path, mesh, overrides))


def read_settings(path: str | Path | None, mesh: str | Path | None, overrides: typing.Sequence[str]) -> dict:
    """What the file, the mesh file and the overrides say together, nested. UserError."""
    values: dict = _read_yaml(path) if path else {}
    if mesh:
        values = _merge(values, {"mesh": _read_yaml(mesh)})
    for text in overrides:
        values = _merge(values, _parse_override(text))
    return values


def checked(values: dict) -> RunConfig:
    """The configuration of nested settings. UserError."""
    config = from_dict(RunConfig, values)
    check(config)
    return config


def check(config: RunConfig) -> None:
    """Sizes that cannot be. Raises UserError."""
    m = config.model
    one_of = {
        "model.arch": (m.arch, ("modern", "classic")),
        "data.source": (config.data.source, ("auto", "embedded", "local", "hub")),
        "dtype": (config.dtype, ("auto", "float32", "bfloat16")),
        "attention": (config.attention, ("auto", "cudnn", "flash", "blocks")),
        "rl.objective": (config.rl.objective, ("grpo", "dpo")),
        "evals.sandbox": (config.evals.sandbox, ("auto", "required")),
    }
    for name, (value, allowed) in one_of.items():
        if value not in allowed:
            raise UserError(f"{name}={value} is not one of {', '.join(allowed)}")
    positive = {
        "model.depth": m.depth,
        "model.sequence_len": m.sequence_len,
        "model.head_dim": m.head_dim,
        "base.micro_batch": config.base.micro_batch,
        "mid.micro_batch": config.mid.micro_batch,
        "sft.micro_batch": config.sft.micro_batch,
        "rl.micro_batch": config.rl.micro_batch,
        "rl.questions": config.rl.questions,
        "rl.samples": config.rl.samples,
        "rl.epochs": config.rl.epochs,
        "rl.minibatches": config.rl.minibatches,
        "evals.batch": config.evals.batch,
        "checkpoints.keep": config.checkpoints.keep,
    }
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    for name in ("save_minutes", "keep_every_hours"):
        value = getattr(config.checkpoints, name)
        if value is not None and not value > 0:
            raise UserError(f"checkpoints.{name}={value} must be more than 0; leave it out for none")
    if config.tracking.samples < 0:
        raise UserError(f"tracking.samples={config.tracking.samples} must not be negative; 0 takes none")
    if m.head_dim % 2:
        raise UserError(f"model.head_dim={m.head_dim} must be even: rotary embeddings rotate pairs")
    if m.width is not None and m.width < 24:
        raise UserError(f"model.width={m.width} is too small; take 24 or more: the smear's gate looks at 24 channels")
    if m.width is not None and m.width % m.head_dim:
        raise UserError(f"model.width={m.width} must be a multiple of model.head_dim={m.head_dim}")
    if m.sequence_len < 16:
        raise UserError(f"model.sequence_len={m.sequence_len} is too short for a conversation; take 16 or more")
    if m.window_pattern is not None and (not m.window_pattern or set(m.window_pattern) - set("SL")):
        raise UserError(f"model.window_pattern={m.window_pattern} may hold only the letters S and L")
    _check_rl(config.rl)
    check_evals(config.evals)
    if config.tokenizer.vocab_size < 512:
        raise UserError(
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} is too small: 256 bytes, 9 control symbols and the "
            "characters of the text need 512 or more"
        )
    if config.tokenizer.vocab_size > 65536:
        raise UserError(f"tokenizer.vocab_size={config.tokenizer.vocab_size} does not fit 16 bits; take 65536 or less")
    if config.data.source == "local" and not config.data.dir:
        raise UserError("data.source=local needs data.dir=<folder>")
    if config.data.dir and not Path(config.data.dir).is_dir():
        raise UserError(f"data.dir={config.data.dir} is not a folder; leave it out for the embedded data")
    for name, s in (("base", config.base), ("mid", config.mid), ("sft", config.sft)):
        if s.batch_tokens is not None and s.batch_tokens % m.sequence_len:
            raise UserError(
                f"{name}.batch_tokens={s.batch_tokens} must be a multiple of model.sequence_len={m.sequence_len}"
            )
    for name, s in (("mid", config.mid), ("sft", config.sft)):
        if s.lora_rank is not None and s.lora_rank < 1:
            raise UserError(f"{name}.lora_rank={s.lora_rank} must be at least 1; leave it out to train everything")


def _check_rl(rl: RLConfig) -> None:
    if rl.questions % rl.minibatches:
        raise UserError(f"rl.questions={rl.questions} must be a multiple of rl.minibatches={rl.minibatches}")
    if rl.kl is not None and rl.kl < 0:
        raise UserError(f"rl.kl={rl.kl} must not be negative")
    if rl.clip is not None and not 0 < rl.clip < 1:
        raise UserError(f"rl.clip={rl.clip} must lie between 0 and 1, such as 0.2; leave it out for no clipping")
    if rl.clip_high is not None and (rl.clip is None or rl.clip_high < rl.clip):
        raise UserError(f"rl.clip_high={rl.clip_high} must be at least rl.clip, which is {rl.clip}")
    if rl.objective == "dpo" and (rl.kl or rl.clip or rl.zscore):
        raise UserError("rl.objective=dpo has neither rl.kl nor rl.clip nor rl.zscore; leave them out")
    if isinstance(rl.task, dict) and (not rl.task or min(rl.task.values()) < 1):
        raise UserError(f"rl.task={rl.task} needs a name at least, and shares of 1 or more")


def check_evals(evals: EvalConfig) -> None:
    """Raises UserError."""
    if evals.samples < 0:
        raise UserError(f"evals.samples={evals.samples} must not be negative; 0 draws none")
    if not evals.temperature > 0:
        raise UserError(f"evals.temperature={evals.temperature} must be more than 0: greedy answers are all alike")


def dump_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def fingerprint(value) -> str:
    """12 hex digits of a stable hash of a dataclass or of plain JSON data."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


# settings that a finished stage does not depend on
MAY_DIFFER = ("attention", "evals", "mesh", "checkpoints", "tracking", "price_per_hour")


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`key: old, now new` for every setting that differs and that a stage depends on."""
    out = []
    for key in {**old, **new}:
        a, b, path = old.get(key), new.get(key), f"{prefix}{key}"
        if path in MAY_DIFFER or a == b:
            continue
        nested = isinstance(a, dict) and isinstance(b, dict)
        out += differences(a, b, f"{path}.") if nested else [f"{path}: {a}, now {b}"]
    return out
