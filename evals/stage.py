"""Everything that is measured of one stage's model, as evals/<stage>.json in its run directory.

The base model gets bits per byte, CORE where the bundle is at hand, and multiple choice (on a few questions: it has not
seen a conversation yet, so this is where the others start from). Later stages get bits per byte and all chat tasks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evals import records, sandbox
from evals.bpb import evaluate_bpb
from evals.chat import Draws, answer_generative, chatcore, evaluate_chat_task
from evals.core import evaluate_core
from evals.engines import Engines
from evals.scoring import Scorer
from evals.tasks import TASKS, available, load_task
from evals.tasks.base import Task
from nanochat_jax.checkpoint import Loaded, load_model
from nanochat_jax.config import MeshConfig, RunConfig, check
from nanochat_jax.data.bundle import find_bundle
from nanochat_jax.data.packing import pack_split
from nanochat_jax.data.sources import open_documents
from nanochat_jax.engine.tools import Tools
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, check_writable, read_json
from nanochat_jax.mesh import sharding
from nanochat_jax.model.quantize import rounded
from nanochat_jax.tracking.tracking import peak_memory_gb
from tokenizer.chat import render_prompt

CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")
BASE_QUESTIONS = 500  # per multiple-choice task of the base model
BASE_PROMPTS: tuple[str, ...] = (
    "Once upon a time there was a",
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "If 5*x + 3 = 13, then x is",
)
CHAT_PROMPTS: tuple[str, ...] = (
    "Who are you?",
    "What can you do?",
    "What is 17 * 23?",
    "How many letters r are in the word strawberry?",
    "Spell window, please.",
    "Anna put her red hat in the kitchen. Where is the hat?",
    "Tell me a story about a dog called Milo.",
    "Why is the sky blue?",
)
BASE_SAMPLE_TOKENS, CHAT_SAMPLE_TOKENS = 24, 128
MEASURES = ("bpb", "core", "samples")  # beside the chat tasks; each is a method of _Evaluation


def evaluate_stage(
    run_dir: str | Path,
    stage: str | None = None,
    config: RunConfig | None = None,
    *,
    tasks: Sequence[str] | None = None,
    int8: bool = False,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> dict:
    """Evaluates the model that `stage` (None: the latest) ended with; writes, and returns, evals/<stage>.json.

    int8: with its weights rounded as they are for serving; the file is then evals/<stage>-int8.json.
    tasks: names of chat tasks, `bpb`, `core`, `samples`, whose results join those in the file; None: all that the stage
    and the data allow. settings: in place of those of config.evals where not None, such as samples.
    UserError for an unknown task, or a run or stage that is not there.
    """
    began = time.perf_counter()
    run_dir, known = Path(run_dir), (*MEASURES, *TASKS)
    if unknown := [name for name in tasks or () if name not in known]:
        raise UserError(f"unknown task {unknown[0]}; there are {', '.join(known)}")
    loaded = load_model(run_dir, stage)
    check_writable(run_dir / "evals")  # now, and not after all answers
    stage, config = loaded.stage, config or loaded.config
    given = {name: value for name, value in settings.items() if value is not None}
    config = replace(config, evals=replace(config.evals, **given))
    check(RunConfig(evals=config.evals))
    name, model = (f"{stage}-int8", rounded(loaded.model)) if int8 else (stage, loaded.model)
    evaluation = _Evaluation(run_dir, name, model, loaded, config, log)
    chosen = evaluation.default_tasks() if tasks is None else tasks
    out: dict[str, Any] = {"stage": stage, "bpb": None, "core": None, "chat": {}, "chatcore": None, "samples": []}
    if tasks is not None:
        out |= read_json(run_dir / "evals" / f"{name}.json") or {}
    if {"humaneval", "tools"} & set(chosen):  # which run programs
        sandbox.prepare(config.evals.sandbox, log)
    for task in chosen:
        if task in MEASURES:
            out[task] = getattr(evaluation, task)()
        else:
            out["chat"][task] = evaluation.chat(task)
    if stage != "base" and out["chat"]:
        out["chatcore"] = chatcore(out["chat"], CHATCORE)
    out["seconds"] = time.perf_counter() - began
    out["peak_memory_gb"] = peak_memory_gb()
    atomic_write_json(run_dir / "evals" / f"{name}.json", out)
    return out


class _Evaluation:
    def __init__(self, run_dir: Path, name: str, model, loaded: Loaded, config: RunConfig, log: Callable[[str], None]):
        self.run_dir, self.name, self.stage, self.config, self.log = run_dir, name, loaded.stage, config, log
        self.model, self.tok = model, loaded.tokenizer
        self.cache_dir = Path(config.data.cache_dir) if config.data.cache_dir else run_dir.parent / "cache"
        self.mesh = sharding.make_mesh(MeshConfig())
        self.scorer = Scorer(model, config.evals.batch, self.mesh)

    @cached_property
    def engine(self) -> Engines:
        slots, max_len = self.config.evals.batch, self.model.cfg.sequence_len
        return Engines(self.model, slots=slots, max_len=max_len, tool=Tools(self.tok), mesh=self.mesh)

    def load(self, name: str) -> Task:
        return load_task(name, split="test", data=self.config.data, cache_dir=self.cache_dir)

    def default_tasks(self) -> list[str]:
        """All that the stage and the data allow; of the chat tasks those of config.evals.chat_tasks where set."""
        chat = list(self.config.evals.chat_tasks or available(self.config.data, "test"))
        if self.stage != "base":
            return ["bpb", *chat, "samples"]
        core = ["core"] if self.config.evals.core and find_bundle(self.config, self.cache_dir) else []
        return ["bpb", *core, *(name for name in chat if self.load(name).kind == "categorical"), "samples"]

    def bpb(self) -> dict:
        """Bits per byte on the pinned validation text, packed in the same rows as in training."""
        documents = open_documents(self.config.data, self.cache_dir)
        path = records.path_of(self.run_dir, self.name, "bpb")
        with pack_split(self.config, documents, self.tok, self.cache_dir, "val", log=self.log) as rows:
            out = evaluate_bpb(self.scorer, rows, self.tok, path=path)
        if out["bpb"] is not None:
            self.log(f"{self.name} bpb: {out['bpb']:.4f}, {out['bytes']:,} bytes")
        return out

    def core(self) -> dict:
        bundle = find_bundle(self.config, self.cache_dir)
        if bundle is None:
            raise UserError(
                "no CORE bundle: python -m nanochat_jax.data download --dataset core fetches it; or set evals.core_dir "
                "to its folder, or data.dir to one that holds core/"
            )
        out = evaluate_core(self.scorer, self.tok, bundle, self.config.evals.max_per_task, self.log)
        if out["core_metric"] is not None:
            self.log(f"{self.name} CORE: {out['core_metric']:.4f} over {out['n_tasks']} of {out['total_tasks']} tasks")
        return out

    def chat(self, name: str) -> dict:
        task, began, evals = self.load(name), time.perf_counter(), self.config.evals
        limit = evals.max_per_task
        out = evaluate_chat_task(
            task,
            self.tok,
            self.scorer,
            self.engine if task.kind == "generative" else None,
            max_per_task=min(limit or BASE_QUESTIONS, BASE_QUESTIONS) if self.stage == "base" else limit,
            max_new_tokens=evals.max_new_tokens,
            draws=Draws(evals.samples, evals.temperature, self.config.seed) if evals.samples else None,
            path=records.path_of(self.run_dir, self.name, name),
        )
        out["seconds"] = time.perf_counter() - began
        self.log(
            f"{self.name} {name}: accuracy {out['accuracy']:.4f} ± {out['stderr']:.4f} "
            f"({out['n']} questions, chance {out['baseline']:.2f}), {out['seconds']:.1f} s"
        )
        if "accuracy_lenient" in out:
            figure = f"{out['accuracy_lenient']:.4f} ± {out['stderr_lenient']:.4f}"
            self.log(f"{self.name} {name}: accuracy_lenient {figure}; it admits {out['lenient']}")
        if "pass_at_k" in out:
            found = ", ".join(f"{k} {e['value']:.4f} ± {e['stderr']:.4f}" for k, e in out["pass_at_k"].items())
            self.log(f"{self.name} {name}: {out['samples']} samples at temperature {out['temperature']:g}: {found}")
        return out

    def samples(self) -> list[dict]:
        if self.stage == "base":
            prompts, budget = BASE_PROMPTS, BASE_SAMPLE_TOKENS
            ids = [[self.tok.bos, *self.tok.encode(p)] for p in prompts]
        else:
            prompts, budget = CHAT_PROMPTS, CHAT_SAMPLE_TOKENS
            ids = [render_prompt(self.tok, [{"role": "user", "content": p}]) for p in prompts]
        answers = zip(prompts, answer_generative(self.engine, self.tok, ids, budget))
        kept = [{"prompt": p, **answer} for p, [answer] in answers if answer["finish_reason"] != "prompt too long"]
        return [{name: value for name, value in sample.items() if name != "tokens"} for sample in kept]
