"""What the run is, what it ran on, how it was set, and what each stage took: steps, tokens, device hours, dollars."""

import statistics

from evals.report import curves
from evals.report.facts import Facts
from nanochat_jax.config import dump_yaml
from nanochat_jax.data.sources import source_of
from nanochat_jax.rules import STAGES
from nanochat_jax.words import DASH, count, duration, fence, fold, listed, percent, plain, table


def header(facts: Facts) -> str:
    model = facts.config.model
    words = [f"A {model.arch} GPT of depth {model.depth}"]
    if (facts.dir / "tokenizer" / "tokenizer.model").is_file():
        from nanochat_jax.model import scaling
        from tokenizer import load_tokenizer

        vocab = load_tokenizer(facts.dir / "tokenizer").vocab_size
        parameters = scaling.param_counts(scaling.gpt_config(model, vocab))["total"]
        words.append(f"with {count(parameters)} parameters")
    if tokens := facts.done["base"].get("tokens"):
        words.append(f"pretrained on {count(tokens)} tokens")
    text = ", ".join(words) + "."
    if facts.ended:
        text += f" Stages that have ended: {listed(facts.ended)}."
    if left := [s for s in STAGES if facts.metrics[s] and not facts.done[s]]:
        text += f" Still under way, or stopped: {listed(left)}."
    return f"# {plain(facts.dir.resolve().name)}\n\n{text}"


def section(facts: Facts) -> str:
    info, c = facts.system, facts.config
    kinds = {k: info["devices"].count(k) for k in info["devices"]}
    ours = facts.done["tokenizer"].get("metrics", {}).get("bytes_per_token", {}).get("ours")
    bytes_per_token = f", {ours:.2f} bytes a token on held-out text" if ours else ""
    rows = {
        "processor": f"{plain(info['cpu'])}, {info['cores']} cores",
        "memory": f"{info['memory_gb']} GB",
        "devices": ", ".join(f"{n} x {plain(k)}" if n > 1 else plain(k) for k, n in kinds.items()),
        "software": f"{plain(info['os'])}, Python {info['python']}, jax {info['jax']}, flax {info['flax']}",
        "training in": info.get("training_dtype"),
        "git commit": info["commit"] or "n/a",
        "model": f"{c.model.arch}, depth {c.model.depth}, context {c.model.sequence_len}",
        "tokenizer": f"{c.tokenizer.vocab_size:,} entries{bytes_per_token}",
        "data": source_of(c.data),
        "seed": str(c.seed),
    }
    text = "" if facts.system_noted else "The machine is that of this page: the stages did not note theirs.\n\n"
    shown = table(["", ""], [[name, value] for name, value in rows.items() if value is not None], left=2)
    return f"## Machine and settings\n\n{text}{shown}\n\n{fold('All settings', fence(dump_yaml(c).strip(), 'yaml'))}"


def cost(facts: Facts) -> str:
    ended = {part: mark for part, mark in facts.done.items() if mark}
    if not ended:
        return ""
    price, kind = facts.config.price_per_hour, facts.system["devices"][0]
    unit = "TPU" if "tpu" in kind.lower() else "GPU"
    devices = len(facts.system["devices"]) if facts.system_noted and kind != "cpu" else 0  # 0: no hours of devices
    mfu = [curves.mfu(facts, part) for part in ended]
    columns = {
        "stage": list(ended),
        "steps": [f"{mark['steps']:,}" if mark.get("steps") else DASH for mark in ended.values()],
        "tokens": [count(_tokens(facts, part)) for part in ended],
        "tokens/s": [count(curves.median(curves.rates(facts, part)[1])) for part in ended],
        **({"MFU": [percent(share) for share in mfu]} if any(mfu) else {}),
    }
    seconds = [*(mark["seconds"] for mark in ended.values()), facts.seconds]
    spent = {"time": [duration(s) for s in seconds]}
    if devices:
        spent[f"{unit}-hours"] = [f"{devices * s / 3600:.2f}" for s in seconds]
    if price is not None:
        spent["cost"] = [f"${price * s / 3600:,.2f}" for s in seconds]
    rows = zip(*(column[: len(ended)] for column in (columns | spent).values()))
    last = ["**all**", *[""] * (len(columns) - 1), *(f"**{column[-1]}**" for column in spent.values())]
    each = f", ${price / devices:,.2f} a {unit}-hour" if price is not None and devices else ""
    peak = max(m.get("peak_memory_gb") or 0.0 for m in (*facts.done.values(), *facts.evals.values()))
    remarks = {
        "No cost: `price_per_hour`, of the whole machine in dollars, is not set.": price is None,
        f"The machine costs ${price or 0:,.2f} an hour{each}.": price is not None,
        "Rates are medians over the steps.": True,
        "Of rl it is the tokens that it sampled.": facts.done["rl"],
        "No MFU: it needs a device whose peak is known, such as a GPU.": not any(curves.mfu(facts, s) for s in STAGES),
        f"The most memory that a process held: {peak:.1f} GB.": peak,
    }
    said = " ".join(text for text, holds in remarks.items() if holds)
    return f"## Time and cost\n\n{table([*columns, *spent], [*rows, last])}\n\n{said}"


def _tokens(facts: Facts, stage: str) -> float | None:
    tokens, records = facts.done[stage].get("tokens"), [r for r in facts.metrics[stage] if "loss" in r]
    if tokens and records:
        tokens *= statistics.mean(curves.sampled_share(facts, stage, r) for r in records)
    return tokens
