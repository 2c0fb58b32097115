"""Reading what a model answered, in the terminal; and the command that has it answer."""

import json
from types import SimpleNamespace

import pytest
from evals_fakes import ByteTokenizer, tiny_model

from evals import records
from evals.__main__ import main
from nanochat_jax.config import RunConfig

DRAWN = {"completion": "drawn", "correct": True, "finish_reason": "stop", "tokens": 2}
RECORDS = [
    {"index": 3, "id": "a", "prompt": "Two and two?", "completion": "#### 4", "correct": True, "expected": "4"}
    | {"finish_reason": "stop", "tokens": 5},
    {"index": 8, "id": "b", "prompt": "Six by seven?", "completion": "It is 41.", "correct": False, "expected": "42"}
    | {"parts": [{"type": "text", "text": "It is "}, {"type": "python", "text": "6*7"}], "tokens": 9}
    | {"finish_reason": "length", "reason": "no number"},
    {"index": 9, "id": "c", "prompt": "[red]Odd?", "completion": "\x1b[2J\u202e", "correct": False, "subject": "a_b"}
    | {"samples": [DRAWN, DRAWN | {"completion": "other", "correct": False, "tokens": 1}, DRAWN]},
]


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "demo"
    run.mkdir()
    (run / "config.yaml").write_text("")
    for stage in ("sft", "rl"):
        records.write(records.path_of(run, stage, "gsm8k"), RECORDS)
        (run / "evals" / f"{stage}.json").write_text(json.dumps({"chat": {}}))
    records.write(records.path_of(run, "sft", "mmlu"), RECORDS[:1])
    records.write(records.path_of(run, "sft", "bpb"), [{"index": 0, "bits": 1.0, "bytes": 1}])
    return run


def show(capsys, *args):
    code = main(["show", *map(str, args)])
    return code, capsys.readouterr()


def test_what_there_is_to_read(run, capsys):
    rows = [line.split() for line in show(capsys, run)[1].out.splitlines()]
    assert rows[1:] == [["sft", "gsm8k", "3", "1", "2"], ["sft", "mmlu", "1", "1", "0"], ["rl", "gsm8k", "3", "1", "2"]]
    assert len(show(capsys, f"{run}:rl")[1].out.splitlines()) == 2


def test_questions_answers_and_verdicts_are_shown(run, capsys):
    code, said = show(capsys, run, "--task", "gsm8k")
    assert code == 0 and f"{run} rl gsm8k: 1 of 3 right; 3 of 3 chosen shown" in said.out
    assert "Two and two?" in said.out and "answer: right, 5 tokens" in said.out
    assert "answer: wrong, 9 tokens, cut off at the limit, no number\nIt is <<6*7\n\nexpected\n42" in said.out
    assert (
        "[red]Odd?" in said.out
        and "samples 0, 2: right, 2 tokens\ndrawn\n\nsample 1: wrong, 1 token\nother" in said.out
        and " a b " in said.out
    )
    assert "\x1b" not in said.out and "\u202e" not in said.out  # a model may not steer the terminal


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        (["--wrong"], [8, 9]),
        (["--right"], [3]),
        (["--index", "8"], [8]),
        (["--grep", "SIX by"], [8]),
        (["--grep", r"6\*7"], [8]),
        (["--grep", "drawn"], [9]),
        (["--limit", "1"], [3]),
        (["--limit", "0"], [3, 8, 9]),
        (["--wrong", "--limit", "1", "--stage", "sft"], [8]),
    ],
)
def test_options_choose(run, capsys, options, indices):
    code, said = show(capsys, run, "--task", "gsm8k", *options)
    shown = {3: "Two and two?", 8: "Six by seven?", 9: "[red]Odd?"}
    assert code == 0 and [i for i, text in shown.items() if text in said.out] == indices


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "nosuch"], "has no answers to nosuch; there are gsm8k, mmlu"),
        (["--task", "mmlu", "--stage", "rl"], "stage rl of {run} has no answers to mmlu; there are gsm8k"),
        (["--task", "bpb"], "has no answers to bpb"),
        (["--task", "gsm8k", "--stage", "mid"], "stage mid of {run} has not been evaluated; there are sft, rl"),
        (["--task", "gsm8k", "--index", "5"], "question 5 was not asked; 3 were, between 3 and 9"),
        (["--task", "gsm8k", "--grep", "("], "no regular expression"),
        (["--task", "mmlu", "--wrong"], "no question is as the options say"),
    ],
)
def test_mistakes_are_one_line(run, capsys, options, says):
    code, said = show(capsys, run, *options)
    assert code == 2 and says.format(run=run) in said.err and said.err.count("\n") == 1


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert main(["show", str(tmp_path / "none")]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_the_command_evaluates_draws_and_leaves_records(tmp_path, capsys, monkeypatch):
    import evals.stage

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    loaded = SimpleNamespace(model=tiny_model(128), tokenizer=ByteTokenizer(), config=RunConfig(), stage="sft")
    monkeypatch.setattr(evals.stage, "load_model", lambda *_: loaded)
    command = ["--run-dir", str(run), "--tasks", "facts,reading", "--max-per-task", "3"]
    assert main([*command, "--samples", "2", "--temperature", "0.5"]) == 0
    said = capsys.readouterr()
    assert list(json.loads(said.out)["scores"]) == ["facts", "reading", "chatcore"] and "pass@2" in said.err
    result = records.results(run)["sft"]["chat"]
    assert result["facts"]["n"] == 3 and "pass_at_k" not in result["facts"]  # nothing is drawn in multiple choice
    assert result["reading"]["samples"] == 2 and result["reading"]["temperature"] == 0.5
    assert [len(r["samples"]) for r in records.read(records.path_of(run, "sft", "reading"))] == [2] * 3
    assert show(capsys, run, "--task", "reading")[0] == 0
    assert main([*command, "--temperature", "0"]) == 2 and "must be more than 0" in capsys.readouterr().err


def test_what_is_suggested_was_answered_rightly_and_is_short(tmp_path):
    run, right = tmp_path / "run", {"correct": True, "finish_reason": "stop", "completion": "4"}
    (run / "evals").mkdir(parents=True)
    chat = {"sums": {"accuracy": 0.9}, "spell": {"accuracy": 0.5}, "mmlu": {"accuracy": 0.7}}
    (run / "evals" / "sft.json").write_text(json.dumps({"chat": chat}))
    asked = [{"prompt": "What is 2 + 2?"} | right, {"prompt": "What is 3 + 3?"} | right | {"correct": False}]
    asked += [{"prompt": "a" * 400} | right, {"prompt": "one line\n\nand another"} | right]
    records.write(records.path_of(run, "sft", "sums"), asked)
    records.write(records.path_of(run, "sft", "spell"), [{"prompt": "Spell the word cat"} | right])
    records.write(records.path_of(run, "sft", "mmlu"), [{"prompt": "Multiple choice?", "correct": True}])
    assert records.suggestions(run, "sft") == [
        {"kind": "sums", "text": "What is 2 + 2?"},
        {"kind": "spell", "text": "Spell the word cat"},
    ]
    assert records.suggestions(run, "sft", most=1) == [{"kind": "sums", "text": "What is 2 + 2?"}]
    assert records.suggestions(run, "rl") == []
