"""The page about a run: what was trained on what, what it scores, what it says, what it took.

It is made of the run directory alone; a stage or a figure that is not there makes it shorter, and nothing is estimated.
`facts` reads, a module for each section writes Markdown, `plots` draws, `html` renders.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.files import atomic_write_text


def write_report(run_dir: str | Path, html: bool = False) -> Path:
    """Writes report.md, report/*.png and, where asked for, report.html; returns the path of the last one.

    UserError where `run_dir` is not a run directory.
    """
    from evals.report import curves, limits, machine, samples, scores, tasks
    from evals.report.facts import Facts
    from evals.report.html import to_html

    facts = Facts(Path(run_dir))
    for old in facts.dir.glob("report/*.png"):
        old.unlink()
    sections = [
        machine.header(facts),
        scores.section(facts),
        curves.section(facts),
        tasks.core(facts),
        tasks.chat(facts),
        samples.section(facts),
        samples.answers(facts),
        machine.cost(facts),
        limits.section(facts),
        machine.section(facts),
    ]
    text = "\n\n".join(s for s in sections if s) + "\n"
    path = facts.dir / "report.md"
    atomic_write_text(path, text)
    if html:
        path = facts.dir / "report.html"
        atomic_write_text(path, to_html(text, facts.dir, facts.dir.resolve().name))
    return path


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m evals report", description=__doc__.split("\n\n")[0])
    p.add_argument("--run-dir", required=True, help="the run directory")
    p.add_argument("--html", action="store_true", help="report.html too: the same page in one file, to be passed on")
    args = p.parse_args(argv)
    print(write_report(args.run_dir, args.html))
    return 0
