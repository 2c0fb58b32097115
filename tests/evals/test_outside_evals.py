"""The field's own evaluations on a served model, by the commands of evals/README.md on two small local tasks."""

import glob
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from evals_fakes import tiny_model
from server_fakes import TOK, scripted_app, serving

from evals.scoring import Scorer
from nanochat_jax.engine.engine import Engine

README = Path(__file__).parents[2] / "evals" / "README.md"
QUESTIONS = [
    ("Two and two are", ["four", "five and a half", "six"], 0),
    ("Grass is", ["blue, mostly", "green", "x"], 1),
]
LM_TASK = """task: small
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
INSPECT_TASK = """from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import choice
from inspect_ai.solver import multiple_choice

@task
def small():
    rows = {rows!r}
    samples = [Sample(input=q, choices=c, target="ABC"[a]) for q, c, a in rows]
    return Task(dataset=samples, solver=multiple_choice(), scorer=choice())
"""


@pytest.fixture(scope="module")
def served():
    model = tiny_model()
    with serving(scripted_app(None, engine=Engine(model, slots=4, max_len=192))[0]) as url:
        yield model, url


def documented(program, url, folder, **changed):
    """Runs a command of evals/README.md, with some of its words changed; skips where it is not installed."""
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed: it is no dependency of this project")
    text = README.read_text().replace("\\\n", " ").replace("http://127.0.0.1:8000", url)
    [command] = [line for line in text.split("\n") if f"{program} " in line and "--model " in line and "`" not in line]
    for word, other in changed.items():
        command = command.replace(word, other)
    words = shlex.split(command)
    env = {**os.environ, **dict(word.split("=", 1) for word in words if word.isupper() or word.startswith("NANOCHAT_"))}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "INSPECT_DISPLAY": "none"}
    words = [word for word in words if not word.startswith("NANOCHAT_")]
    more = ["--include_path", ".", "--output_path", "out", "--log_samples"] if program == "lm_eval" else []
    done = subprocess.run([*words, *more], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_lm_eval_chooses_as_the_scorer_does(served, tmp_path):
    model, url = served
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.yaml").write_text(LM_TASK.format(file=tmp_path / "rows.jsonl"))
    documented("lm_eval", url, tmp_path, arc_easy="small", **{"max_length=255": "max_length=191"})
    [found] = glob.glob(f"{tmp_path}/out/*/samples_small*.jsonl")
    told = sorted(map(json.loads, Path(found).read_text().splitlines()), key=lambda sample: sample["doc_id"])
    begun = [(TOK.bos, *TOK.encode(row["question"])) for row in rows]
    asked = [
        [([*start, *TOK.encode(f" {c}")], len(start), len(start) + 1 + len(c)) for c in row["choices"]]
        for start, row in zip(begun, rows)
    ]
    for sample, scores in zip(told, Scorer(model).token_losses(asked), strict=True):
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        ours = [-float(score.nll.sum()) for score in scores]
        np.testing.assert_allclose(theirs, ours, atol=1e-3)
        assert sample["acc"] == float(np.argmax(ours) == sample["doc"]["answer"])


@pytest.mark.slow
def test_inspect_asks_the_chat(served, tmp_path):
    (tmp_path / "questions.py").write_text(INSPECT_TASK.format(rows=QUESTIONS))
    documented("inspect", served[1], tmp_path)
    assert glob.glob(f"{tmp_path}/logs/*.eval")
