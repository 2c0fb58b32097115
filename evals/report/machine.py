"""What the run is, what it ran on and how it was set."""

from __future__ import annotations

from evals.report.facts import STAGES, Facts
from nanochat_jax.config import dump_yaml
from nanochat_jax.data.sources import source_of
from nanochat_jax.words import count, fence, fold, listed, plain, table


def header(facts: Facts) -> str:
    model, mark = facts.config.model, facts.done["base"] or {}
    words = [f"A {model.arch} GPT of depth {model.depth}"]
    if parameters := facts.parameters():
        words.append(f"with {count(parameters)} parameters")
    if mark.get("tokens"):
        words.append(f"pretrained on {count(mark['tokens'])} tokens")
    text = ", ".join(words) + "."
    if ended := [s for s in STAGES if facts.done[s]]:
        text += f" Stages that have ended: {listed(ended)}."
    if left := [s for s in STAGES if facts.metrics[s] and not facts.done[s]]:
        text += f" Still under way, or stopped: {listed(left)}."
    return f"# {plain(facts.dir.resolve().name)}\n\n{text}"


def section(facts: Facts) -> str:
    info, noted = facts.system
    kinds = {k: info["devices"].count(k) for k in info["devices"]}
    devices = ", ".join(f"{n} x {plain(k)}" if n > 1 else plain(k) for k, n in kinds.items())
    c = facts.config
    rows = [
        ["processor", f"{plain(info['cpu'])}, {info['cores']} cores"],
        ["memory", f"{info['memory_gb']} GB"],
        ["devices", devices],
        ["software", f"{plain(info['os'])}, Python {info['python']}, jax {info['jax']}, flax {info['flax']}"],
        *([["training in", info["training_dtype"]]] if "training_dtype" in info else []),
        ["git commit", info["commit"] or "n/a"],
        ["model", f"{c.model.arch}, depth {c.model.depth}, context {c.model.sequence_len}"],
        ["tokenizer", f"{c.tokenizer.vocab_size:,} entries{_bytes_per_token(facts)}"],
        ["data", source_of(c.data)],
        ["seed", str(c.seed)],
    ]
    text = "" if noted else "The machine is that of this page: the stages did not note theirs.\n\n"
    settings = fold("All settings", fence(dump_yaml(c).strip(), "yaml"))
    return f"## Machine and settings\n\n{text}{table(['', ''], rows, left=2)}\n\n{settings}"


def _bytes_per_token(facts: Facts) -> str:
    found = ((facts.done["tokenizer"] or {}).get("metrics") or {}).get("bytes_per_token")
    ours = found.get("ours") if isinstance(found, dict) else None
    return f", {ours:.2f} bytes a token on held-out text" if ours else ""
