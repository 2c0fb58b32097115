"""Configuration: frozen dataclasses, filled from YAML and `key=value` overrides.

`RunConfig` is what a person writes; `GPTConfig` is the architecture that `scaling.gpt_config` derives from it.
`run_speedrun.py --settings` prints every setting with the comment that stands beside it here.
An unknown key is an error that names the nearest one. `rules.py` checks values.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import yaml

from nanochat_jax.errors import UserError
from nanochat_jax.rules import (
    STAGES,
    Arch,
    Backend,
    Count,
    Dtype,
    Matrices,
    Natural,
    Objective,
    OptimizerState,
    Positive,
    Rate,
    Remat,
    Sandbox,
    Seed,
    Share,
    Source,
    Stage,
    check_together,
)


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
    head_values: bool = False  # the last layer's value embeddings are the head's rows
    smear: bool = True
    bigram_rows: int = 0  # of the table of pairs of tokens; 0: none
    key_offset: bool = False  # half of each key is that of the position before
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

    def has_value_table(self, layer: int) -> bool:
        """A table of value embeddings stands in every second layer, the last one included unless it reads the head."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2 and not self.reads_head(layer)

    def reads_head(self, layer: int) -> bool:
        """Whether the head's rows are the layer's value embeddings."""
        return self.head_values and layer == self.n_layer - 1

    def has_value_embed(self, layer: int) -> bool:
        return self.has_value_table(layer) or self.reads_head(layer)


@dataclass(frozen=True)
class ModelConfig:
    """The model's size. None: derived from depth or arch."""

    arch: Arch = "modern"  # modern | classic (the $100 run of October 2025) | next (modern, and what with_next sets)
    depth: Count = 4  # transformer layers; by default everything else follows from it
    width: Count | None = None  # of the residual stream; None: 64 * depth, rounded up to whole heads
    head_dim: Count = 128  # of each attention head; even
    n_kv_head: Count | None = None  # heads of keys and values, for grouped-query attention; None: as many as queries
    sequence_len: Count = 2048  # tokens of a training row, and the longest context
    window_pattern: str | None = None  # tiled over layers; S: a quarter of the context, L: all; None: SSSL, classic L
    # rows of a table that a hash of every two tokens looks up: it lowers bits per byte more than it helps on tasks
    bigram_rows: Natural = 0
    # half of each key is that of the position before; in the last layer that half is initialised as the queries are
    key_offset: bool = False
    head_values: bool = False  # the last layer's value embeddings are the output head's rows


@dataclass(frozen=True)
class TokenizerConfig:
    """How the tokenizer is trained."""

    vocab_size: Count = 32768  # entries, the control symbols included; at most 65536
    sample_chars: Count = 100_000_000  # characters that the trainer sees; it holds all of them in memory
    max_doc_chars: Count = 10_000  # of any one document
    apart: bool = False  # a piece holds letters or marks, never both, so that words are cut alike beside a mark


@dataclass(frozen=True)
class DataConfig:
    """Where documents, conversations and questions come from, and how documents are packed into rows."""

    source: Source = "auto"  # auto | embedded | local | hub; auto is local where dir is set, else embedded
    dir: str | None = None  # local: pretrain/ (parquet, jsonl, txt), chat/ (json, parquet), tasks/, core/, words/
    cache_dir: str | None = None  # packed rows and downloads; default: `cache` beside the run directory
    text_column: str = "text"  # of parquet and JSON lines, local or of the hub
    hub_pretrain: str = "karpathy/climbmix-400b-shuffle"  # owner/name, or climbmix, fineweb_edu, fineweb
    hub_folder: str | None = None  # take only what is below this folder of the dataset, such as sample/10BT
    hub_shards: Count = 8  # training shards to download; the last shard of the dataset is always the validation shard
    max_train_tokens: Count | None = None  # stop packing after so many; None: all the text
    pack_buffer: Count = 1000  # documents that best-fit packing chooses from
    pack_workers: Natural | None = None  # threads that tokenize beside training; None: cores but one; 0: pack first


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates at a batch of 2^19 tokens and width 768 (optim.py scales them), and their schedule."""

    matrices: Matrices = "muon"  # muon | adamw: the optimizer of the blocks' matrices
    matrix_lr: Rate = 0.02  # of the blocks' matrices; AdamW's wants to be some tenth of Muon's
    embedding_lr: Rate = 0.3  # AdamW: the token and value embeddings
    unembedding_lr: Rate = 0.008  # AdamW: the output head
    scalar_lr: Rate = 0.5  # AdamW: the scalars of the residual stream; of smear and backout 0.4 times as much
    centred_head: bool = False  # the mean of the output head's rows stays where it began
    weight_decay: Rate | None = None  # of the blocks' matrices; None: the scaling rule, with AdamW 0.1
    lr_scale: Rate = 1.0  # multiplies every rate
    batch_power: Rate = 0.5  # rates are proportional to the batch to this power; 0: the same for every batch
    warmup_steps: Natural = 40  # over which the rate rises
    warmdown: Share = 0.65  # share of the steps over which the rate falls
    final_lr: Rate = 0.05  # as a share of the peak


@dataclass(frozen=True)
class BaseConfig:
    """Pretraining."""

    optim: OptimConfig = OptimConfig()
    ratio: Positive = 12.0  # training tokens per scaling parameter
    tokens: Count | None = None  # overrides ratio
    fp8: bool = False  # products of the training step in 8-bit floats; for H100s and later, emulated elsewhere
    # entries of the vocabulary that stand for all in the training loss: the batch's own and others at random. Their
    # products are never in 8 bits. None: all
    vocab_sample: Count | None = None
    batch_tokens: Count | None = None  # tokens per optimizer step; None: the scaling rule
    micro_batch: Count = 8  # rows per data-parallel device and micro-step
    eval_every: Natural = 250  # steps between validation passes; 0: at the end alone
    eval_tokens: Count = 10_485_760  # of the validation shard; at most what it holds
    save_every: Count = 500  # steps between checkpoints; the last step is always saved
    core_every: Natural = 2000  # steps between CORE evaluations, if eval_every divides them; 0: in the eval stage only


@dataclass(frozen=True)
class FinetuneConfig:
    """Training on conversations: mid and sft."""

    optim: OptimConfig = OptimConfig(
        embedding_lr=0.2, unembedding_lr=0.004, weight_decay=0.0, warmup_steps=0, warmdown=0.2, final_lr=0.0
    )
    all_targets: bool = False  # learn every token, and not the assistant's alone
    epochs: Positive = 1.0  # passes over the packed rows
    max_rows: Count | None = None  # cap on packed rows, for small machines
    mixture: dict[str, int] | None = None  # task name -> how often it is repeated; negative: take so many conversations
    lora_rank: Count | None = None  # train LoRA adapters of the blocks' matrices only; None: train everything
    lora_lr: Rate = 2e-4  # the adapters' peak rate; of optim, only lr_scale and the schedule apply
    batch_tokens: Count | None = None  # tokens per optimizer step; None: as base
    micro_batch: Count = 8  # rows per data-parallel device and micro-step
    eval_every: Natural = 200  # steps between validation passes; 0: at the end alone
    save_every: Count = 500  # steps between checkpoints; the last step is always saved


@dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning on questions with answers that can be checked."""

    optim: OptimConfig = replace(FinetuneConfig.optim, lr_scale=0.05, warmdown=1.0)
    # a name, or names with their shares of the questions, {gsm8k: 3, spellingbee: 1}; None: gsm8k, or arithmetic with
    # the embedded data
    task: str | dict[str, int] | None = None
    questions: Count = 16  # per step
    samples: Count = 16  # per question
    objective: Objective = "grpo"  # grpo | dpo
    beta: Positive = 0.1  # of DPO: strength of the pull towards the model that RL began with
    zscore: bool = False  # divide a question's advantages by their standard deviation
    kl: Rate | None = None  # weight of the KL to the model that RL began with; 0: recorded only; None: not computed
    clip: float | None = None  # keeps the ratio to the policy that sampled in 1 - clip .. 1 + clip; None: no clipping
    clip_high: float | None = None  # the ratio's upper bound is then 1 + clip_high; None: as clip
    epochs: Count = 1  # passes over a step's samples; beyond the first update the ratio is not 1
    minibatches: Count = 1  # updates in a pass, each on its part of the questions
    steps: Count | None = None  # None: one epoch over the questions
    max_new_tokens: Count = 256  # of a sample
    temperature: Positive = 1.0  # of sampling, and of the probabilities that are learned
    top_k: Natural = 50  # tokens that sampling chooses from; 0: all, which kl, clip, epochs and minibatches need
    micro_batch: Count = 16  # sequences per data-parallel device and micro-step
    eval_every: Natural = 60  # steps between evaluations; 0: at the end alone
    eval_questions: Count = 400  # of each task
    eval_samples: Count = 8  # pass@k for k up to this
    save_every: Count = 60  # steps between checkpoints; the last step is always saved


@dataclass(frozen=True)
class EvalConfig:
    """The eval stage. The settings of CORE also apply while base trains (base.core_every)."""

    chat_tasks: tuple[str, ...] | None = None  # None: all that the data source has
    core: bool = True  # CORE on the base model, where the bundle is at hand
    core_dir: str | None = None  # default: data.dir/core, or the one downloaded
    max_per_task: Count | None = None  # examples per task; None: all
    max_new_tokens: Count = 512  # of an answer
    samples: Natural = 0  # answers to every generative question, drawn beside the greedy one, for pass@k
    temperature: Positive = 0.8  # of the samples
    batch: Count = 32  # slots of the engine, and rows of a scoring batch
    stages: tuple[Stage, ...] = STAGES  # whose models are evaluated
    sandbox: Sandbox = "auto"  # of HumanEval's programs. auto: as far as the machine allows; required: all of it


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of every training stage, in addition to its save_every."""

    save_minutes: Positive | None = None  # save also after so many minutes; None: by save_every alone
    keep: Count = 2  # how many of the newest are kept
    keep_every_hours: Positive | None = None  # keep also the first, and then one every so many hours; None: no others


@dataclass(frozen=True)
class TrackingConfig:
    """What is recorded of training, where in addition to metrics.jsonl, and what an alarm does."""

    tensorboard: bool = False  # event files in RUN_DIR/tensorboard; needs the extra of that name
    wandb: str | None = None  # a project of Weights & Biases; needs the extra of that name
    samples: Natural = 3  # prompts that the model continues at each of base's evaluations, on one host; 0: none
    trace_at: Natural | None = None  # a step of every stage: it and the next two are profiled into <stage>/trace
    stop_on_spike: bool = False  # save and stop when the loss spikes (alarms.py says when); false: only log it


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1  # data parallelism: each has its own rows, and a part of what training holds
    fsdp: int = 1  # the same, with what evaluations and RL hold split as well
    tensor: int = 1  # tensor parallelism: each has a part of every layer


@dataclass(frozen=True)
class RunConfig:
    """The whole run."""

    seed: Seed = 1337  # of the weights, of the order of rows and of sampling
    dtype: Dtype = "auto"  # float32 | bfloat16; auto: bfloat16, on a CPU only to train, if its cores are fast at it
    attention: Backend = "auto"  # auto | cudnn | flash | blocks; auto is the fastest, measured before the first step
    # what training keeps of a layer for its backward pass: none (all) | block | full (see model/remat.py); auto: the
    # first of these with which micro_batch rows fit the device
    remat: Remat = "auto"
    # float32 | light: first moments in bfloat16, AdamW's second by row and column; 40 % less
    optimizer_state: OptimizerState = "float32"
    price_per_hour: Rate | None = None  # of the whole machine, in dollars; for the report
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    base: BaseConfig = BaseConfig()
    mid: FinetuneConfig = FinetuneConfig(all_targets=True)
    sft: FinetuneConfig = FinetuneConfig()
    rl: RLConfig = RLConfig()
    evals: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class SweepConfig:
    """Either budgets of FLOPs, which give iso-FLOP curves, or ratios of tokens to parameters."""

    depths: tuple[int, ...] = ()
    flops: tuple[float, ...] = ()  # of training a model, by scaling.flops_per_token
    ratios: tuple[float, ...] = ()  # tokens per scaling parameter
    aspect_ratio: int | None = None  # width per layer, rounded up to whole heads; None: as depth says, 64


@dataclass(frozen=True)
class ExperimentConfig:
    """Variants of a base, which is the file's other settings; each run is a base model."""

    variants: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # name -> its key=value settings
    seeds: Count = 3  # runs of each; counted from the setting `seed`, so that the same data come in the same order
    lengths: tuple[float, ...] = (1.0, 1.4)  # times the budget: the base is trained at each, for its curve
    minutes: Positive | None = None  # the budget, of each one's own steps; None: base.tokens, or what base.ratio gives


# ---------------------------------------------------------------------------------------------- building


NOTHING = ("", "null", "~")  # as text
OFF = (*NOTHING, "0", "0.0", "false")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _number(text: str, kind: type):
    with contextlib.suppress(ValueError):
        return kind(text)  # int takes 010 and 1_000
    value = float(text)
    return int(value) if kind is int and value.is_integer() else None


def _convert(value, hint, where: str, default=None):
    """`value` as the annotated type `hint`, which decides how text is read; a UserError that names `where` if it does
    not fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _convert(value, args[0], where, default)
        if refusal := args[1].refusal(value):
            raise UserError(f"{where}={value} {refusal}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in NOTHING):
            return None
        fitting = [a for a in args if (typing.get_origin(a) or a) is type(value)]
        try:
            return _convert(value, [*fitting, *args][0], where)
        except UserError as e:
            raise UserError(f"{e}; leave it out for the default") from None
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where} is a section of settings; write {where}.<key>=<value>, not {where}={value!r}")
        return from_dict(hint, value, where, default)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) and value else value
        if not isinstance(items, (list, tuple)):
            raise UserError(f"{where} takes a list such as a,b and not {value!r}")
        return tuple(_convert(v, args[0], where) for v in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} takes a mapping such as {{name: 1}} and not {value!r}")
        return {str(k): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    read = value
    if isinstance(value, str) and hint is not str:
        with contextlib.suppress(ValueError):
            read = _TRUTH.get(value.lower(), value) if hint is bool else _number(value, hint)
    elif hint in (int, float) and type(value) in (int, float) and hint(value) == value:
        read = hint(value)
    if type(read) is not hint:
        raise UserError(f"{where} takes {'an' if hint is int else 'a'} {hint.__name__} and not {value!r}")
    return read


def from_dict(cls, values: dict, where: str = "", default=None):
    """A dataclass from nested dictionaries; what they leave out is as in `default`, an instance, where one is given.

    UserError for an unknown key (it names the nearest) or a wrong type.
    """
    default = cls() if default is None else default
    hints = typing.get_type_hints(cls, include_extras=True)
    kwargs = {}
    for key, value in (values or {}).items():
        path = f"{where}.{key}".lstrip(".")
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise UserError(f"unknown setting {path}: {hint}")
        kwargs[key] = _convert(value, hints[key], path, getattr(default, key))
    return replace(default, **kwargs)


def to_dict(config) -> dict:
    """Nested plain dictionaries and lists, as YAML and JSON take them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def fingerprint(value) -> str:
    """12 hex digits of a stable hash of a dataclass or of plain JSON data."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------- reading


class _Dotted(dict):
    """What a.b=c says."""


def _merge(into: dict, other: dict, of: typing.Any = RunConfig) -> dict:
    """Sections are merged, and mappings with what is written with dots; a whole mapping takes the place of another."""
    hints = typing.get_type_hints(of) if dataclasses.is_dataclass(of) else {}
    out = dict(into)
    for key, value in other.items():
        merged = isinstance(value, _Dotted) or dataclasses.is_dataclass(hints.get(key))
        nested = merged and isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value, hints.get(key)) if nested else value
    return out


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        near = ", ".join(sorted(str(p) for p in folder.glob("*.yaml"))) or "none"
        raise UserError(f"no configuration file {path}; at hand: {near}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of settings")
    return values


def _parse_override(text: str) -> dict:
    key, sep, value = text.partition("=")
    if not sep or not key:
        raise UserError(f"cannot read {text!r}: settings are written key=value, for example model.depth=6")
    parsed: typing.Any = value
    if value.startswith(("{", "[")):
        with contextlib.suppress(yaml.YAMLError):
            parsed = yaml.load(value, yaml.BaseLoader)
    for part in reversed(key.split(".")):
        parsed = _Dotted({part: parsed})
    return parsed


def check(config: RunConfig) -> None:
    """UserError for the first setting that breaks a rule: a bound, a choice, or one that concerns several."""
    from_dict(RunConfig, to_dict(config))
    check_together(config)


def read_settings(path: str | Path | None, mesh: str | Path | None, overrides: Sequence[str]) -> dict:
    """What the file, the mesh file and the `key=value` overrides say together, nested; the later win. UserError.

    Where they ask for `next`, it says what they leave open.
    """
    values = _read_yaml(Path(path)) if path else {}
    if mesh:
        values = _merge(values, {"mesh": _read_yaml(Path(mesh))})
    for text in overrides:
        values = _merge(values, _parse_override(text))
    model = values.get("model")
    return with_next(values) if isinstance(model, dict) and model.get("arch") == "next" else values


RATES = {"matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr"}
LARGE_VOCABULARY = 32768  # of which a quarter is enough for a batch of no more tokens than that quarter


def with_next(values: dict) -> dict:
    """Nested settings, and where they say nothing what was measured to help (planning/README.md). Rates that they set
    are for the default `batch_power`, which then stays."""
    ours = {"key_offset": True, "head_values": True}
    values = _merge({"model": ours, "base": {"optim": {"centred_head": True}}}, values)
    tokenizer, base = values.get("tokenizer", {}), values["base"]
    if isinstance(base, dict) and isinstance(base["optim"], dict) and RATES.isdisjoint(base["optim"]):
        base["optim"].setdefault("batch_power", 0)
    if isinstance(tokenizer, dict) and isinstance(base, dict) and base.get("batch_tokens"):
        vocabulary = _convert(tokenizer.get("vocab_size", TokenizerConfig.vocab_size), Count, "tokenizer.vocab_size")
        batch = _convert(base["batch_tokens"], Count | None, "base.batch_tokens")
        if vocabulary >= LARGE_VOCABULARY and batch and batch <= vocabulary // 4:
            base.setdefault("vocab_sample", vocabulary // 4)
    return values


def load_config(
    path: str | Path | None = None, mesh: str | Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The run's configuration: the defaults, changed by `read_settings`. UserError, a line that says what to change."""
    config = from_dict(RunConfig, read_settings(path, mesh, overrides))
    check(config)
    return config


# ------------------------------------------------------------------------------- a run directory's settings

# settings that no result of training depends on: they may change when a run is resumed
MAY_DIFFER = (
    *("attention", "remat", "evals", "mesh", "checkpoints", "tracking"),
    *("price_per_hour", "data.pack_workers", "data.cache_dir"),
    *(f"{stage}.{name}" for stage in ("base", "mid", "sft", "rl") for name in ("save_every", "eval_every")),
    *("base.core_every", "rl.eval_questions", "rl.eval_samples"),
)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`key: old, now new` for every setting that differs and that a stage depends on."""
    out = []
    for key in {**old, **new}:
        a, b, path = old.get(key), new.get(key), f"{prefix}{key}"
        if path in MAY_DIFFER or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{path}.")
        else:
            out.append(f"{path}: {a}, now {b}")
    return out


def config_file(run_dir: str | Path) -> Path:
    """The settings' file of a run directory. UserError where there is none."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory (it has no config.yaml); train one with run_speedrun.py")
    return path


def read_run_config(run_dir: str | Path) -> RunConfig:
    """The settings of a run directory, unchecked: its data may be elsewhere by now. UserError if there is none."""
    return from_dict(RunConfig, _without_gone(_read_yaml(config_file(run_dir)), RunConfig))


def _without_gone(values: dict, of: typing.Any) -> dict:
    """Without the settings that an earlier version had, where they were off: the run is what it would be without."""
    hints = typing.get_type_hints(of) if dataclasses.is_dataclass(of) else values
    kept = {k: v for k, v in values.items() if k in hints or v not in OFF}
    return {k: _without_gone(v, hints.get(k)) if isinstance(v, dict) else v for k, v in kept.items()}


def check_same(run_dir: Path, config: RunConfig, option: str) -> None:
    """UserError where `run_dir` was made with other settings than `config`; `option` is the one that names it."""
    if differing := differences(to_dict(read_run_config(run_dir)), to_dict(config)):
        raise UserError(
            f"{run_dir} was made with other settings ({'; '.join(differing[:3])}); take the same ones, or another "
            f"{option}"
        )
