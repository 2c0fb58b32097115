"""What the models say: answers to fixed prompts, and right and wrong answers to questions of the evaluation."""

from evals import records
from evals.report.facts import Facts, titled
from nanochat_jax.rules import STAGES
from nanochat_jax.words import cut, fence, fold, plain

CHARS, LINES = 600, 14  # of a text that the page shows
EACH = 2  # right and wrong answers to a task


def section(facts: Facts) -> str:
    found = {s: facts.evals[s].get("samples") for s in reversed(STAGES)}
    blocks = {s.upper(): fence("\n\n".join(_sample(s, x) for x in samples)) for s, samples in found.items() if samples}
    return "\n\n".join(["## Samples\n\nGreedy.", *_first_open(blocks)]) if blocks else ""


def _first_open(blocks: dict[str, str]) -> list[str]:
    """{title: text} as parts of the page, of which all but the first are folded."""
    return [fold(*b) if i else "**{}**\n\n{}".format(*b) for i, b in enumerate(blocks.items())]


def _sample(stage: str, sample: dict) -> str:
    """A prompt and what follows it: at once where it is one text, on a new line where it is an answer."""
    said = cut(records.said(sample), CHARS, LINES)
    return f"> {sample['prompt']}{said.rstrip()}" if stage == "base" else f"> {sample['prompt']}\n{said.strip()}"


def answers(facts: Facts) -> str:
    """Of the latest stage that has some: the first right and wrong answers to each generative task."""
    for stage in reversed(STAGES):
        blocks = {}
        for task in facts.tasks:
            if facts.chat[stage].get(task, {}).get("kind") != "generative":
                continue
            if found := records.read(records.path_of(facts.dir, stage, task)):
                right, wrong = ([r for r in found if r["correct"] is verdict] for verdict in (True, False))
                title = f"{titled(task)}: {len(right):,} of {len(found):,} right"
                blocks[title] = "\n\n".join(map(_answer, wrong[:EACH] + right[:EACH]))
        if blocks:
            more = f"`python -m evals show RUN:{stage} --task NAME --wrong` shows all."
            head = f"## Answers, wrong and right\n\nThe first of each, of {stage}. {more}"
            return "\n\n".join([head, *_first_open(blocks)])
    return ""


def _answer(record: dict) -> str:
    said = ["**right**" if record["correct"] else "**wrong**"]
    said += [plain(cut(remark, 200, 3)) for remark in records.remarks(record)]
    lines = ["> " + cut(record["prompt"].strip(), CHARS, LINES).replace("\n", "\n> ")]
    lines.append(cut(records.said(record).strip(), CHARS, LINES) or "(nothing)")
    if not record["correct"] and record.get("expected"):
        expected = record["expected"].rpartition(record["prompt"])[2]  # of code the prompt is the beginning
        lines.append("expected:\n" + cut(expected.strip("\n"), CHARS // 2, LINES // 2))
    return f"Question {record['index']:,}: {', '.join(said)}\n\n" + fence("\n\n".join(lines))
