"""What was partial, cropped or substituted, and where: one plain list."""

from __future__ import annotations

import statistics

from evals.report.facts import STAGES, Facts, stand_ins, titled
from nanochat_jax.data.sources import source_of
from nanochat_jax.words import listed, percent, plain


def section(facts: Facts) -> str:
    lines = [*_stages(facts), *_texts(facts), *_core(facts), *_chat(facts)]
    if not lines:
        return ""
    return "## Partial, cropped, substituted\n\n" + "\n".join(f"- {line}" for line in lines)


def _stages(facts: Facts) -> list[str]:
    out = []
    for stage in STAGES:
        if facts.metrics[stage] and not facts.done[stage]:
            last = max(r["step"] for r in facts.metrics[stage])
            out.append(f"{stage} has not ended: its records go to step {last:,}.")
    if missing := [s for s in STAGES if facts.done[s] and s not in facts.evals]:
        out.append(f"Not evaluated: {listed(missing)}.")
    return out


def _texts(facts: Facts) -> list[str]:
    """Of what was learned from."""
    out = []
    if source_of(facts.config.data) == "embedded":
        out.append("The documents are Python's help topics and docstrings, in place of web text.")
    base = facts.done["base"] or {}
    if packed := base.get("packed"):
        share = packed["tokens_cropped"] / (packed["tokens"] + packed["tokens_cropped"])
        out.append(f"base: {percent(share)} of the documents' tokens were cropped to fill rows.")
    if base.get("epochs", 1) > 1.001:
        out.append(f"base: its documents were read {base['epochs']:.2f} times.")
    for stage in ("mid", "sft"):
        packed = (facts.done[stage] or {}).get("packed", {})
        if packed.get("cropped"):
            gone = f", and {packed['dropped']:,} dropped, of which that left no answer" if packed["dropped"] else ""
            of = f"{packed['conversations']:,} are in its rows"
            out.append(f"{stage}: {packed['cropped']:,} conversations were cropped to a row{gone}; {of}.")
    truncated = [r["truncated"] for r in facts.metrics["rl"] if r.get("truncated") is not None]
    if truncated and statistics.mean(truncated) > 0:
        limit = facts.config.rl.max_new_tokens
        out.append(f"rl: {percent(statistics.mean(truncated))} of the sampled answers met the limit of {limit} tokens.")
    return out


def _core(facts: Facts) -> list[str]:
    out = []
    for stage in STAGES:
        core = facts.core(stage)
        if not core:
            continue
        name = f"CORE of {stage}"
        if core["missing"]:
            out.append(f"{name}: no data for {listed([plain(t) for t in core['missing']])}.")
        if found := stand_ins(core):
            out.append(f"{name}: stand-ins for data: {', '.join(found)}.")
        for key, what in (("long", "longer than the model's context"), ("cropped", "cropped at the left")):
            if found := core.get(key):
                out.append(f"{name}: prompts {what}: {_of_tasks(found)}.")
    return out


def _of_tasks(found: dict[str, int] | list[str]) -> str:
    """Tasks, with how many of their examples where that is known."""
    if isinstance(found, dict):
        return listed([f"{plain(task)} ({n:,})" for task, n in found.items()])
    return listed([plain(task) for task in found])


def _chat(facts: Facts) -> list[str]:
    found: dict[str, list[str]] = {}  # what is to be said -> the stages that it is said of
    for stage in STAGES:
        for text in _chat_of(facts, stage):
            found.setdefault(text, []).append(stage)
    few = facts.asked_in_part()
    out = [f"Not all questions were asked of {few}."] if few else []
    return out + [f"{listed(stages)}: {text}" for text, stages in found.items()]


def _chat_of(facts: Facts, stage: str) -> list[str]:
    asked, out = facts.chat(stage), []
    if missing := (facts.evals.get(stage, {}).get("chatcore") or {}).get("missing"):
        out.append(f"ChatCORE lacks {listed([titled(t) for t in missing])}.")
    endless = [f"{titled(t)} ({percent(r['unfinished'])})" for t, r in asked.items() if r.get("unfinished")]
    if endless:
        limit = facts.config.evals.max_new_tokens
        out.append(f"answers that had no end within {limit} tokens and the context: {listed(endless)}.")
    return out
