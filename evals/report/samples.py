"""What the models say: answers to fixed prompts, and right and wrong answers to questions of the evaluation."""

from __future__ import annotations

from evals import records
from evals.report.facts import STAGES, Facts, titled
from nanochat_jax.words import cut, fence, fold, plain

CHARS, LINES = 600, 14  # of a text that the page shows
EACH = 2  # right and wrong answers to a task


def section(facts: Facts) -> str:
    """Of all stages, the latest first and open."""
    stages = [s for s in STAGES if facts.evals.get(s, {}).get("samples")]
    blocks = []
    for stage in reversed(stages):
        texts = [_sample(stage, sample) for sample in facts.evals[stage]["samples"]]
        block = fence("\n\n".join(texts))
        blocks.append(fold(stage.upper(), block) if blocks else f"**{stage.upper()}**\n\n{block}")
    return "\n\n".join(["## Samples\n\nGreedy.", *blocks]) if blocks else ""


def _sample(stage: str, sample: dict) -> str:
    """A prompt and what follows it: at once where it is one text, on a new line where it is an answer."""
    said = cut(records.said(sample), CHARS, LINES)
    return f"> {sample['prompt']}{said.rstrip()}" if stage == "base" else f"> {sample['prompt']}\n{said.strip()}"


def answers(facts: Facts) -> str:
    """Of the latest stage that has some: the first right and wrong answers to each generative task."""
    stage = next((s for s in reversed(STAGES) if _generative(facts, s)), None)
    if stage is None:
        return ""
    blocks = []
    for task in _generative(facts, stage):
        found = facts.answers(stage, task)
        right = sum(r["correct"] for r in found)
        chosen = [r for verdict in (False, True) for r in [x for x in found if x["correct"] is verdict][:EACH]]
        body = "\n\n".join(_answer(r) for r in chosen)
        title = f"{titled(task)}: {right:,} of {len(found):,} right"
        blocks.append(fold(title, body) if blocks else f"**{title}**\n\n{body}")
    more = f"`python -m evals show RUN:{stage} --task NAME --wrong` shows all."
    return "\n\n".join([f"## Answers, wrong and right\n\nThe first of each, of {stage}. {more}", *blocks])


def _generative(facts: Facts, stage: str) -> list[str]:
    asked = facts.chat(stage)
    return [t for t in facts.tasks() if asked.get(t, {}).get("kind") == "generative" and facts.answers(stage, t)]


def _answer(record: dict) -> str:
    """A question with its answer, the verdict and what there is to say of that."""
    verdict = "right" if record["correct"] else "wrong"
    said = [f"{n:,} token{'s' * (n != 1)}"] if (n := record.get("tokens")) is not None else []
    if record.get("finish_reason", "stop") != "stop":
        said.append({"length": "cut off at the limit"}.get(record["finish_reason"], plain(record["finish_reason"])))
    if record.get("reason"):
        said.append(plain(cut(record["reason"], 200, 3)))
    title = f"Question {record['index']:,}: **{verdict}**" + (f", {', '.join(said)}" if said else "")
    lines = ["> " + cut(record["prompt"].strip(), CHARS, LINES).replace("\n", "\n> ")]
    lines.append(cut(records.said(record).strip(), CHARS, LINES) or "(nothing)")
    if not record["correct"] and record.get("expected"):
        expected = record["expected"].rpartition(record["prompt"])[2]  # code is asked to be gone on with
        lines.append("expected:\n" + cut(expected.strip("\n"), CHARS // 2, LINES // 2))
    return title + "\n\n" + fence("\n\n".join(lines))
