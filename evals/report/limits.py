"""What was partial, cropped or substituted, and where: one plain list."""

import statistics
from collections.abc import Iterator

from evals.report.facts import Facts, names, stand_ins, titled
from nanochat_jax.data.sources import source_of
from nanochat_jax.rules import STAGES
from nanochat_jax.words import listed, percent


def section(facts: Facts) -> str:
    lines = [f"- {line}" for part in (_stages, _texts, _core, _chat) for line in part(facts)]
    return "\n".join(["## Partial, cropped, substituted\n", *lines]) if lines else ""


def _stages(facts: Facts) -> Iterator[str]:
    for stage in STAGES:
        if facts.metrics[stage] and not facts.done[stage]:
            last = max(r["step"] for r in facts.metrics[stage])
            yield f"{stage} has not ended: its records go to step {last:,}."
    if missing := [s for s in facts.ended if s not in facts.evaluated]:
        yield f"Not evaluated: {listed(missing)}."


def _texts(facts: Facts) -> Iterator[str]:
    """Of what was learned from."""
    if source_of(facts.config.data) == "embedded":
        yield "The documents are stories and sentences made here and docstrings of optax, in place of web text."
    base = facts.done["base"]
    if packed := base.get("packed"):
        share = packed["tokens_cropped"] / (packed["tokens"] + packed["tokens_cropped"])
        yield f"base: {percent(share)} of the documents' tokens were cropped to fill rows."
    if base.get("epochs", 1) > 1.001:
        yield f"base: its documents were read {base['epochs']:.2f} times."
    for stage in ("mid", "sft"):
        packed = facts.done[stage].get("packed", {})
        if packed.get("cropped"):
            gone = f", and {packed['dropped']:,} dropped, of which that left no answer" if packed["dropped"] else ""
            of = f"{packed['conversations']:,} are in its rows"
            yield f"{stage}: {packed['cropped']:,} conversations were cropped to a row{gone}; {of}."
    if skipped := sum(r.get("skipped", 0) for r in facts.metrics["rl"]):
        yield f"rl: {skipped:,} questions were skipped, as their prompts leave no room for an answer."
    truncated = [r["truncated"] for r in facts.metrics["rl"] if r.get("truncated") is not None]
    if any(truncated):
        limit = facts.config.rl.max_new_tokens
        yield f"rl: {percent(statistics.mean(truncated))} of the sampled answers met the limit of {limit} tokens."


def _core(facts: Facts) -> Iterator[str]:
    for stage, core in facts.core.items():
        name = f"CORE of {stage}"
        if core["missing"]:
            yield f"{name}: no data for {names(core['missing'])}."
        if found := stand_ins(core):
            yield f"{name}: stand-ins for data: {found}."


def _chat(facts: Facts) -> Iterator[str]:
    if few := facts.asked_in_part():
        yield few
    found: dict[str, list[str]] = {}  # what is to be said -> the stages that it is said of
    for stage in STAGES:
        if missing := (facts.evals[stage].get("chatcore") or {}).get("missing"):
            found.setdefault(f"ChatCORE lacks {listed([titled(t) for t in missing])}.", []).append(stage)
        asked = facts.chat[stage].items()
        if endless := [f"{titled(t)} ({percent(r['unfinished'])})" for t, r in asked if r.get("unfinished")]:
            limit = facts.config.evals.max_new_tokens
            text = f"answers that had no end within {limit} tokens and the context: {listed(endless)}."
            found.setdefault(text, []).append(stage)
    yield from (f"{listed(stages)}: {text}" for text, stages in found.items())
