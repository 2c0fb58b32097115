"""What a run will take, before anything is paid for: tokens, steps, FLOPs, memory, disk, hours and dollars.

Nothing is written, nothing downloaded, and no GPU is needed. Work is counted as the stages count it; its speed is the
share of a chip's peak (MFU) that the reference reached in published runs, or what was measured. Compiling, waiting for
downloads and restarts are not counted. A time, rate or price that is not known is NaN.
"""

import argparse
import contextlib
import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from evals.tasks import available, load_task
from evals.tasks.mixtures import mixture
from nanochat_jax import devices, rules
from nanochat_jax.config import FinetuneConfig, ModelConfig, RunConfig, read_run_config
from nanochat_jax.data.sources import source_of
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from nanochat_jax.model import lora, remat, scaling
from nanochat_jax.planning import collectives, footprint, targets
from nanochat_jax.planning.footprint import Job, Machine, Memory
from nanochat_jax.planning.published import EVAL_BASE, EVAL_CHAT, tabled_mfu
from nanochat_jax.tracking.tracking import read_records
from nanochat_jax.words import count, duration

STAGES = ("tokenizer", *rules.STAGES, "eval")
SERIES = range(4, 41, 2)  # depths that a budget is tried with

# Rows of the hub's tasks, and tokens of a conversation: of those made here as counted with 4096 entries, of SmolTalk so
# that the mixture of the published $100 run gives its 765 steps of mid.
TRAIN_ROWS = {"chat": 460_341, "mmlu": 99_842, "gsm8k": 7_473, "arc_easy": 2_251, "arc_challenge": 1_119}
TEST_ROWS = {"arc_easy": 2_376, "arc_challenge": 1_172, "mmlu": 14_042, "gsm8k": 1_319, "humaneval": 164}
TEST_ROWS |= {"spellingbee": 256}
CONVERSATION = {"chat": 820, "mmlu": 130, "gsm8k": 200, "arc_easy": 90, "arc_challenge": 100, "identity": 40}
CONVERSATION |= {"spellingbee": 101, "spelling": 30, "talk": 107, "text": 120, "story": 133, "reading": 71, "facts": 99}
CONVERSATION |= {"sums": 38, "arithmetic": 56, "letters": 44, "spell": 32, "self": 39}
OTHERS = 100  # tokens of a conversation of any other task

SHARD_BYTES, SHARD_CHARS = 1e8, 2.5e8  # of a file of climbmix or fineweb_edu, says the reference's runs/speedrun.sh
CHARS_A_TOKEN, KEPT = 4.7, 0.92  # of English; the share of tokens that packing does not crop
CORE_BYTES = 1.62e8  # its bundle
TOKENIZER_CHARS = 4.1e5  # a second, trained on two cores
CORE_IN_TRAINING = 0.12  # of CORE's examples: at most 500 a task
DECODING = 1 / 3  # of the memory's bandwidth: assumed
PROMPT = 100  # tokens of a question of RL: assumed


@dataclass(frozen=True)
class Speed:
    flops: float = math.nan  # FLOP/s of a stage's training steps on one device
    source: str = ""
    seconds: float = math.nan  # of the whole stage, for each FLOP that a token costs, as a run measured it
    devices: int = 1  # that reached it together, so that what they waited for one another is in it


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int = 0
    batch_tokens: int = 0
    flops: float = 0.0
    seconds: float = math.nan
    download: float = 0.0  # bytes
    disk: float = 0.0  # bytes, with what was downloaded

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens


def machine(gpu: str | None, number: int | None, price: float | None, config: RunConfig) -> Machine:
    """price: $ an hour of one device; None: the configuration's price_per_hour, of all. UserError."""
    if gpu and gpu not in targets.GPUS:
        raise UserError(f"--gpu {gpu} is not one of {', '.join(targets.GPUS)}")
    if not gpu and number not in (None, jax.device_count()):
        raise UserError(f"--count {number} needs --gpu; this machine has {jax.device_count()} devices")
    number = number or (1 if gpu else jax.device_count())
    whole = config.price_per_hour if price is None else price * number
    return Machine(gpu, number, math.nan if whole is None else whole)


def measured(run_dir: Path) -> dict[str, Speed]:
    """The speed of each stage of a run: the median rate of its steps but the first, and the seconds of a stage that is
    done. UserError where it has no steps of base."""
    config = read_run_config(run_dir)
    cfg = scaling.gpt_config(config.model, config.tokenizer.vocab_size)
    out = {}
    for stage in STAGES:
        each = scaling.flops_per_token(cfg, config.base.vocab_sample if stage == "base" else None)
        done = read_json(run_dir / stage / "done.json") or {}
        rates = [r["tokens_per_second"] for r in read_records(run_dir / stage / "metrics.jsonl") if "loss" in r][1:]
        number = len(done.get("system", {}).get("devices", [""]))
        if rates or done:
            flops = statistics.median(rates) * each / number if rates else math.nan
            out[stage] = Speed(flops, str(run_dir), done["seconds"] / each if done else math.nan, number)
    if math.isnan(out.get("base", Speed()).flops):
        raise UserError(f"{run_dir} has no steps of the stage base; give --measured a run that has trained")
    return out


class Plan(Job):
    """A run on a machine. speeds: by stage; "" for those that are not named. each: FLOPs of a token."""

    def __init__(self, config: RunConfig, on: Machine, speeds: dict[str, Speed] | None = None):
        super().__init__(config, on)
        self.speeds, self.each, self.source = speeds or {}, scaling.flops_per_token(self.cfg), source_of(config.data)

    def stages(self) -> list[Stage]:
        return [self._tokenizer(), self._base(), self._finetune("mid"), self._finetune("sft"), self._rl(), self._eval()]

    def speed(self, stage: str) -> Speed:
        return self.speeds.get(stage) or self.speeds.get("") or Speed()

    def most_waits(self, gpu: str) -> float:
        """Seconds for links in a step where nothing hides them: of float32 gradients, and of parameters in 16 bits."""
        links, params = collectives.Links.of(gpu, self.on.count), scaling.param_counts(self.cfg)["total"]
        each = {"reduce-scatter": 4 * params, "all-gather": 2 * params}
        return sum(links.seconds(op, list(range(self.on.count)), size) for op, size in each.items())

    def linked(self, speed: Speed, waits: float) -> Speed:
        """A speed that fewer devices reached, with a step of base that waits so many seconds for links."""
        if speed.devices >= self.on.count:
            return speed
        each = scaling.flops_per_token(self.cfg, self.config.base.vocab_sample)
        alone = self.base.batch_tokens * each / (self.on.count * speed.flops)
        source = f"{speed.source}; {self.on.count} of them wait {waits / (alone + waits):.1%} of a step for links"
        return replace(speed, flops=speed.flops * alone / (alone + waits), source=source)

    def _seconds(self, stage: str, flops: float) -> float:
        return flops / (self.speed(stage).flops * self.on.count)

    def as_measured(self, stage: str) -> float:
        """Seconds of a stage that is more than its steps, in proportion to a run's."""
        return self.speeds.get(stage, Speed()).seconds * self.each

    def _with_validation(self, name: str, steps: int, flops: float, every: int) -> float:
        """Seconds of a stage's steps and of its passes over the validation rows, which are forward only."""
        passes = 1 + (math.ceil(steps / every) if every else 0)
        return self._seconds(name, flops + passes * self.config.base.eval_tokens * self.each / 3)

    def _checkpoints(self, lora_rank: int | None = None) -> int:
        """Bytes of a stage's checkpoints: those that are kept, and one that is being written."""
        state = lora.state_bytes(self.cfg, lora_rank) if lora_rank else footprint.state_bytes(self.cfg, self.light)
        return (self.config.checkpoints.keep + 1) * state

    def _tokenizer(self) -> Stage:
        """All files are counted here, though most come while base trains."""
        download = (self.config.data.hub_shards + 1) * SHARD_BYTES if self.source == "hub" else 0.0
        chars = self.config.tokenizer.sample_chars
        return Stage("tokenizer", seconds=chars / TOKENIZER_CHARS, download=download, disk=download)

    def _base(self) -> Stage:
        cfg, plan = self.config.base, self.base
        flops = plan.tokens * scaling.flops_per_token(self.cfg, cfg.vocab_sample)
        seconds = self._with_validation("base", plan.steps, flops, cfg.eval_every)
        if cfg.core_every and self.config.evals.core and self.source == "hub":
            often = (plan.steps - 1) // cfg.core_every
            seconds += often * CORE_IN_TRAINING * float(np.nan_to_num(self._as_published(EVAL_BASE)))
        disk = 2 * (plan.tokens + cfg.eval_tokens) + self._checkpoints()  # 16 bits an id
        return Stage("base", plan.steps, plan.batch_tokens, flops, seconds, disk=disk)

    def _finetune(self, name: str) -> Stage:
        """mid or sft: as many rows as its conversations fill, estimated by their usual lengths."""
        cfg: FinetuneConfig = getattr(self.config, name)
        length = self.cfg.sequence_len
        recipe = mixture(name, self.config.data, cfg.mixture)
        tokens = sum(self._conversations(*row) * CONVERSATION.get(row[0], OTHERS) for row in recipe)
        rows = min(math.ceil(tokens / length), cfg.max_rows or math.inf)
        batch = cfg.batch_tokens or self.base.batch_tokens
        steps = max(1, round(cfg.epochs * rows / max(batch // length, 1)))
        flops = steps * batch * self.each
        seconds = self._with_validation(name, steps, flops, cfg.eval_every)
        disk = 3 * rows * length + self._checkpoints(cfg.lora_rank)  # ids and mask
        return Stage(name, steps, batch, flops, seconds, disk=disk)

    def _conversations(self, task: str, split: str, times: int) -> int:
        if times < 0:
            return -times
        if self.source == "hub" and task in TRAIN_ROWS:
            return times * TRAIN_ROWS[task]
        return times * len(load_task(task, split=split, data=self.config.data, cache_dir=Path()))

    def _rl(self) -> Stage:
        """Sampling, as fast as the matrices and the cache are read, and the updates."""
        cfg = self.config.rl
        named = cfg.task or ("gsm8k" if "gsm8k" in available(self.config.data, "train") else "arithmetic")
        shares = named if isinstance(named, dict) else {named: 1}
        rows = min(self._conversations(t, "train", 1) * sum(shares.values()) // n for t, n in shares.items())
        steps = cfg.steps or max(1, rows // cfg.questions)
        sampled = cfg.questions * cfg.samples
        batch = sampled * (PROMPT + cfg.max_new_tokens)
        flops = steps * batch * self.each * (cfg.epochs + 1 / 3)  # the pass that weighs the samples is forward only
        seconds = self.as_measured("rl")
        if math.isnan(seconds):
            cache = (PROMPT + cfg.max_new_tokens / 2) * scaling.kv_bytes_per_token(self.cfg, 2)
            read = 2 * scaling.matmul_params(self.cfg) + sampled / self.on.count * cache  # for one token of each
            tested = cfg.eval_questions * cfg.eval_samples / sampled / cfg.eval_every if cfg.eval_every else 0
            bandwidth = devices.bandwidth(self.on.kind) or math.nan
            seconds = self._seconds("rl", flops)
            seconds += steps * (1 + tested) * cfg.max_new_tokens * read / (DECODING * bandwidth)
        return Stage("rl", steps, batch, flops, seconds, disk=self._checkpoints())

    def _as_published(self, seconds: float) -> float:
        """What took the published $100 run so long, by the FLOPs of a token and the chips' peak."""
        h100, here = (devices.peak_flops(kind) or math.nan for kind in ("h100", self.on.kind))
        published = scaling.flops_per_token(scaling.gpt_config(ModelConfig("classic", 20), 65536))
        return seconds * (self.each / (self.on.count * here)) / (published / (8 * h100))

    def _eval(self) -> Stage:
        seconds, evals = self.as_measured("eval"), self.config.evals
        if math.isnan(seconds) and self.source == "hub":
            asked = sum(min(n, evals.max_per_task or n) for n in TEST_ROWS.values()) / sum(TEST_ROWS.values())
            chat = EVAL_CHAT * asked * sum(stage != "base" for stage in evals.stages)
            seconds = self._as_published(chat + EVAL_BASE * ("base" in evals.stages))
        size = CORE_BYTES if evals.core and self.source == "hub" else 0.0
        return Stage("eval", seconds=seconds, download=size, disk=size)


def make(config: RunConfig, on: Machine, measure: str | None = None, exact: bool = True) -> tuple[Plan, Memory]:
    """A plan, and the memory of its base stage.

    measure: a run directory; "" to time steps here; None for published rates. exact: the memory by the compiled step,
    where that can be compiled. UserError.
    """
    plan = Plan(config, on, measured(Path(measure)) if measure else None)
    compiled, peak = None, devices.peak_flops(on.kind)
    if exact:
        with contextlib.suppress(UserError):  # without the libraries of a GPU that is not here
            compiled = footprint.Compiled(plan)
    found = compiled.memory() if compiled else footprint.estimated(plan)
    if measure:
        plan.speeds[""] = plan.speeds["base"]
    elif measure == "" and compiled and found.rows:
        seconds = compiled.seconds(found.rows, found.remat)
        flops = plan.base.batch_tokens * plan.each / seconds / on.count
        plan.speeds[""] = Speed(flops, f"steps of {seconds:.2f} s, timed now", devices=on.count)
    elif peak:
        mfu, number, source = tabled_mfu(on.gpu or "", config.model.arch, config.base.fp8, config.model.depth)
        plan.speeds[""] = Speed(mfu * peak, f"{mfu:.0%} MFU, {source}", devices=number)
    if on.gpu and any(s.devices < on.count for s in plan.speeds.values()):
        waits = compiled.waits(found.rows, found.remat) if compiled and found.rows else plan.most_waits(on.gpu)
        plan.speeds = {name: plan.linked(speed, waits) for name, speed in plan.speeds.items()}
    return plan, found


def summed(stages: list[Stage]) -> Stage:
    """All stages as one; times that are not known are left out."""
    names = ("flops", "seconds", "download", "disk")
    sums: dict[str, Any] = {name: float(np.nansum([getattr(s, name) for s in stages])) for name in names}
    return Stage("all", **sums)


def dollars(stage: Stage, on: Machine) -> float:
    return on.price * stage.seconds / 3600


def time_of(stage: Stage) -> str:
    return "not known" if math.isnan(stage.seconds) else duration(stage.seconds)


def table_of(*columns: str) -> Table:
    """An empty table for the terminal, its first column to the left and the others to the right."""
    made = [Column(name, justify="right" if n else "left", no_wrap=True) for n, name in enumerate(columns)]
    return Table(*made, box=None, pad_edge=False, padding=(0, 1, 0, 0))


def show(plan: Plan, found: Memory) -> None:
    config, on, stages, console = plan.config, plan.on, plan.stages(), Console(highlight=False)
    price = "" if math.isnan(on.price) else f" at ${on.price:,.2f} an hour"
    params = count(scaling.param_counts(plan.cfg)["total"])
    title = f"{config.model.arch} d{config.model.depth}, {params} parameters, on {on.count} x {on.kind}{price}"
    console.print(title, style="bold", soft_wrap=True)
    table = table_of("stage", "tokens", "steps", "batch", "FLOPs", "download", "disk", "time", "cost")
    for stage in stages:
        table.add_row(*_row(stage, on))
    table.add_row(*_row(summed(stages), on), style="bold")
    console.print(table)
    print(*_remarks(plan, stages), *_memory_lines(plan, found), sep="\n")


def _row(stage: Stage, on: Machine) -> list[str]:
    cost = dollars(stage, on)
    return [
        stage.name,
        count(stage.tokens) if stage.tokens else "",
        f"{stage.steps:,}" if stage.steps else "",
        count(stage.batch_tokens) if stage.steps else "",
        f"{stage.flops:.2e}" if stage.flops else "",
        f"{count(stage.download)}B" if stage.download else "",
        f"{count(stage.disk)}B" if stage.disk else "",
        time_of(stage),
        "" if math.isnan(cost) else f"${cost:,.2f}",
    ]


def _remarks(plan: Plan, stages: list[Stage]) -> list[str]:
    out, speed = [], plan.speed("base")
    if speed.source:
        rate = speed.flops * plan.on.count / plan.each
        out.append(f"base at {count(rate)} tokens/s: {speed.source}")
    if unknown := [s.name for s in stages if math.isnan(s.seconds)]:
        out.append(f"the time of {', '.join(unknown)} is not known and not in the sum: --measured RUN_DIR may tell")
        if "base" in unknown:
            out.append("--measured alone times some steps of base here")
    if plan.speed("rl").source and math.isnan(plan.as_measured("rl")):
        out.append("rough: rl decodes at a third of the bandwidth, eval goes as in a $100 run, tokenizer on two cores")
    if plan.source == "hub":  # of other text it is not known before it is packed
        files = plan.config.data.hub_shards
        passes = plan.base.tokens / (files * SHARD_CHARS / CHARS_A_TOKEN * KEPT)
        out.append(f"base goes {passes:.2f} times over its {files} files" + (", take more" if passes > 1 else ""))
    return out


def _memory_lines(plan: Plan, found: Memory) -> list[str]:
    parts = ("parameters", "optimizer", "gradients", "activations")
    said = ", ".join(f"{part} {getattr(found, part) / 1e9:.2f}" for part in parts)
    line = f"memory of a device, {found.source}: {found.total / 1e9:.2f} of {plan.on.limit / 1e9:.2f} GB ({said})"
    if not found.rows:
        ways = "keep less (remat=auto, optimizer_state=light), take more devices, which share the state"
        return [line, f"not even one row fits: {ways}, or take a smaller model.depth"]
    said = f"{found.rows} rows at a time, {plan.per_device // found.rows} times a step"
    if found.remat != "none":
        said += f"; remat={found.remat} computes {remat.again(plan.cfg, found.remat) / plan.each:.0%} more"
    return [line, said]


def show_series(plans: list[tuple[Plan, Memory]], budget: float) -> int | None:
    """The depths and what they cost; returns the deepest within the budget, whose memory fits too."""
    table, best = table_of("depth", "parameters", "tokens", "FLOPs", "memory", "rows", "time", "cost"), None
    for plan, found in plans:
        whole = summed(plan.stages())
        cost, depth = dollars(whole, plan.on), plan.config.model.depth
        within = cost <= budget and found.rows > 0
        best = depth if within else best
        table.add_row(
            f"d{depth}", count(scaling.param_counts(plan.cfg)["total"]), count(plan.base.tokens), f"{whole.flops:.2e}",
            f"{count(found.total)}B", f"{found.rows or 'none fit'}", duration(whole.seconds), f"${cost:,.2f}",
            style=None if within else "dim",
        )  # fmt: skip
    Console().print(table)
    on = plans[0][0].on
    said = f"d{best} is the deepest" if best else "no depth of the series is"
    print(f"{said} within ${budget:,.2f} on {on.count} x {on.kind}; all stages are counted")
    return best


def main(config: RunConfig, args: argparse.Namespace) -> int:
    """Prints the plan that `run_speedrun.py` was asked for; the last line is a JSON object. UserError."""
    on = machine(args.gpu, args.count, args.price, config)
    if args.gpu and args.measured == "":
        raise UserError("--measured without a run directory times this machine; leave --gpu out")
    if args.budget is not None:
        if math.isnan(on.price):
            raise UserError("--budget needs --price, in dollars an hour of one device")
        if args.measured == "":
            raise UserError("--budget tries many depths: give --measured a run directory, or --gpu")
        depths = [replace(config, model=replace(config.model, depth=d)) for d in SERIES]
        best = show_series([make(c, on, args.measured, exact=False) for c in depths], args.budget)
        print(json.dumps({"budget": args.budget, "depth": best}))
        return 0
    plan, found = make(config, on, args.measured)
    show(plan, found)
    stages = plan.stages()
    out = {s.name: {**asdict(s), "dollars": dollars(s, on)} for s in (*stages, summed(stages))}
    known = {name: {k: None if v != v else v for k, v in values.items()} for name, values in out.items()}  # NaN
    print(json.dumps({"stages": known, "memory": {**asdict(found), "total": found.total}}))
    return 0
