"""Which differences are called real, and what is said where nothing can be compared."""

import json

import numpy as np
import pytest

from evals import records
from evals.__main__ import main
from evals.compare import Side, compare, open_sides
from evals.significance import pass_estimates
from nanochat_jax.errors import UserError


def write_run(run, stage, right, *, index=None, ids=None, samples=None, **more):
    """A stage's evaluation on disk: task -> verdicts, with figures that follow from them."""
    (run / "evals").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("")
    chat = {}
    for task, verdicts in right.items():
        verdicts = np.asarray(verdicts, bool)
        n, accuracy = len(verdicts), float(verdicts.mean())
        chat[task] = {"accuracy": accuracy, "stderr": 0.0, "n": n, "of": n, "baseline": 0.0, "centered": accuracy}
        places = range(n) if index is None else index
        found = [
            {"index": int(i), "id": (ids or "q{}").format(i), "prompt": f"question {i}", "correct": bool(v)}
            for i, v in zip(places, verdicts)
        ]
        if samples is not None:
            chat[task]["pass_at_k"] = pass_estimates(samples)
            found = [{**r, "samples": [{"correct": bool(v)} for v in row]} for r, row in zip(found, samples)]
        records.write(records.path_of(run, stage, task), found)
    result = {"stage": stage, "bpb": None, "core": None, "chat": chat, "chatcore": None, **more}
    (run / "evals" / f"{stage}.json").write_text(json.dumps(result))
    return Side(run, stage, result)


def only(found, name):
    [one] = [d for d in found if d.name == name]
    return one


def test_answers_to_the_same_questions_are_compared_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.random(500) < 0.5
    better = base | (np.arange(500) % 30 == 0)  # a few more, and none less
    a = write_run(tmp_path / "a", "sft", {"gsm8k": base})
    b = write_run(tmp_path / "b", "sft", {"gsm8k": better})
    d = only(compare(a, b), "gsm8k")
    gained = int((better & ~base).sum())
    assert d.test == "McNemar" and d.n == 500 and d.only == (0, gained) and d.p == pytest.approx(2 / 2**gained)
    assert d.better(0.05) == "b" and only(compare(b, a), "gsm8k").better(0.05) == "a"
    assert d.stderr == pytest.approx(np.std(better.astype(float) - base, ddof=0) / np.sqrt(500))
    # the same scores on other questions are no difference that could be told from chance
    other = write_run(tmp_path / "c", "sft", {"gsm8k": better}, ids="other {}")
    apart = only(compare(a, other), "gsm8k")
    assert apart.test == "two proportions" and apart.n == (500, 500) and apart.better(0.05) is None
    assert (apart.a, apart.b) == (d.a, d.b)


def test_a_difference_by_luck_is_called_noise(tmp_path):
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(40):
        a, b = (write_run(tmp_path / name, "sft", {t: rng.random(100) < 0.3 for t in "uvwxyz"}) for name in "ab")
        alarms += any(d.better(0.05) for d in compare(a, b))
    assert alarms <= 5  # of 240 comparisons in 40 pairs of equal runs; uncorrected it would be some 8 pairs


def test_questions_in_common_are_enough_where_they_are_most_of_the_smaller_part(tmp_path):
    a = write_run(tmp_path / "a", "sft", {"mmlu": [1] * 50 + [0] * 50})
    b = write_run(tmp_path / "b", "sft", {"mmlu": [1] * 30}, index=range(20, 50))
    c = write_run(tmp_path / "c", "sft", {"mmlu": [1] * 30}, index=range(90, 120))
    [d], [e] = compare(a, b), compare(a, c)
    assert (d.test, d.n, d.a, d.b) == ("McNemar", 30, 1.0, 1.0) and d.p == 1.0
    assert (e.test, e.n, e.a, e.b) == ("two proportions", (100, 30), 0.5, 1.0) and e.better(0.05) == "b"


def test_pass_at_k_is_compared_question_by_question(tmp_path):
    rng = np.random.default_rng(2)
    chance = rng.random((200, 1))
    draws = [rng.random((200, 4)) < p for p in (chance, np.minimum(chance + 0.2, 1))]
    a, b = (write_run(tmp_path / n, "rl", {"gsm8k": d[:, 0]}, samples=d) for n, d in zip("ab", draws))
    found = compare(a, b)
    assert [d.name for d in found] == ["gsm8k", "gsm8k pass@1", "gsm8k pass@4"]
    first, last = found[1:]
    assert first.test == "paired t" and first.a == pytest.approx(draws[0].mean()) and first.better(0.05) == "b"
    assert last.b == pytest.approx(draws[1].any(axis=1).mean())
    assert [d.name for d in compare(a, b, ["gsm8k pass@4"])] == ["gsm8k pass@4"]


def bpb_rows(run, stage, bits, sizes, ids="row {}"):
    rows = [
        {"index": i, "id": ids.format(i), "bits": float(b), "bytes": int(s)}
        for i, (b, s) in enumerate(zip(bits, sizes))
    ]
    records.write(records.path_of(run, stage, "bpb"), rows)
    return {"bpb": float(bits.sum() / sizes.sum()), "stderr": 0.01, "rows": len(bits)}


def test_bits_per_byte_of_the_same_rows_are_compared_row_by_row(tmp_path):
    rng = np.random.default_rng(3)
    sizes = rng.integers(800, 1200, 60)
    bits = sizes * rng.normal(2.0, 0.2, 60)
    runs = [tmp_path / name for name in "abc"]
    ids = ("row {}", "row {}", "text {}")
    figures = [bpb_rows(r, "base", x, sizes, i) for r, x, i in zip(runs, (bits, bits * 0.99, bits * 0.99), ids)]
    a, b, c = (write_run(run, "base", {}, bpb=f) for run, f in zip(runs, figures))
    [d] = compare(a, b)
    assert d.test == "paired t" and d.headline and d.difference == pytest.approx(-0.01 * figures[0]["bpb"])
    assert d.better(0.05) == "b" and compare(b, a)[0].better(0.05) == "a"  # less is better
    [e] = compare(a, c)  # another text: by the standard errors
    assert e.test == "standard errors" and e.stderr == pytest.approx(0.01 * np.sqrt(2)) and e.better(0.05) is None


def core_result(accuracies, n=1000, substitutes=()):
    stderr = {k: float(np.sqrt(v * (1 - v) / n)) for k, v in accuracies.items()}
    return {
        "results": accuracies,
        "n": dict.fromkeys(accuracies, n),
        "stderr": stderr,
        "substitutes": dict(substitutes),
        "core_metric": float(np.mean(list(accuracies.values()))),
        "core_stderr": float(np.sqrt(sum(s**2 for s in stderr.values())) / len(stderr)),
        "n_tasks": len(accuracies),
    }


def test_core_is_compared_by_task_and_as_a_whole(tmp_path):
    a = write_run(tmp_path / "a", "base", {}, core=core_result({"copa": 0.6, "squad": 0.1, "lambada": 0.3}))
    b = write_run(tmp_path / "b", "base", {}, core=core_result({"copa": 0.6, "squad": 0.3, "lambada": 0.32}))
    found = compare(a, b)
    assert [d.name for d in found] == ["core", "core copa", "core squad", "core lambada"]
    assert [d.better(0.05) for d in found] == ["b", None, "b", None] and found[0].difference == pytest.approx(0.22 / 3)
    # a stand-in for a task's data is another task
    c = write_run(tmp_path / "c", "base", {}, core=core_result({"copa": 0.6, "squad": 0.3}, substitutes={"squad": "x"}))
    assert [d.name for d in compare(a, c)] == ["core copa"]


def test_chatcore_takes_its_error_from_the_tasks(tmp_path):
    rng = np.random.default_rng(4)
    right = [{"gsm8k": rng.random(400) < p, "humaneval": rng.random(400) < p} for p in (0.3, 0.5)]
    score = [{"score": float(np.mean([v.mean() for v in r.values()])), "tasks": list(r)} for r in right]
    a, b = (write_run(tmp_path / n, "sft", r, chatcore=s) for n, r, s in zip("ab", right, score))
    d = only(compare(a, b), "chatcore")
    errors = [only(compare(a, b), task).stderr for task in right[0]]
    assert d.stderr == pytest.approx(np.hypot(*errors) / 2) and d.better(0.05) == "b"


def test_the_command_says_it_in_a_table_and_in_one_line(tmp_path, capsys):
    run = tmp_path / "demo"
    write_run(run, "sft", {"gsm8k": [0] * 80 + [1] * 20, "mmlu": [0, 1] * 50})
    write_run(run, "rl", {"gsm8k": [1] * 80 + [1] * 20, "mmlu": [1, 0] * 50})
    assert main(["compare", f"{run}:sft", f"{run}:rl"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "B better" in text and "noise" in text and f"A {run}:sft" in text
    said = {f["name"]: f for f in json.loads(last)["figures"]}
    assert said["gsm8k"]["better"] == "b" and said["mmlu"]["better"] is None and said["mmlu"]["only"] == [50, 50]
    assert main(["compare", str(run), f"{run}:sft"]) == 2
    assert "are the same" in capsys.readouterr().err


def test_sides_are_named_by_run_and_stage(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for run, stage in ((a, "base"), (a, "sft"), (b, "base"), (b, "sft"), (b, "rl"), (a, "sft-int8")):
        write_run(run, stage, {"gsm8k": [1]})

    def stages(one, other, stage=None):
        return [side.stage for side in open_sides([str(one), str(other)], stage)]

    assert list(records.results(a)) == ["base", "sft", "sft-int8"]
    assert stages(a, b) == ["sft", "sft"]  # the latest that both have
    assert stages(a, b, "base") == ["base", "base"]
    assert stages(f"{a}:base", f"{b}:rl") == ["base", "rl"]
    assert stages(f"{a}:base", b) == ["base", "base"]  # one name serves both
    odd = tmp_path / "c:d"
    write_run(odd, "sft", {"gsm8k": [1]})
    assert records.split_spec(str(odd)) == (odd, None) and records.split_spec(f"{odd}:sft") == (odd, "sft")


@pytest.mark.parametrize(
    ("specs", "more", "says"),
    [
        (("a", "none"), [], "none is not a run directory"),
        (("a:rl", "b"), [], "stage rl of .*a has not been evaluated; there are sft"),
        (("a", "b"), ["--stage", "mid"], "stage mid of .*a has not been evaluated"),
        (("a", "b"), ["--tasks", "humaneval"], "do not both have humaneval; they share gsm8k"),
        (("a", "other"), [], "no stage of both runs has been evaluated"),
        (("a", "empty"), [], "has been evaluated; python -m evals --run-dir"),
        (("a:sft", "other:base"), [], "have no figure in common"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, specs, more, says):
    write_run(tmp_path / "a", "sft", {"gsm8k": [1]})
    write_run(tmp_path / "b", "sft", {"gsm8k": [1], "humaneval": [0]})
    write_run(tmp_path / "other", "base", {"arc_easy": [1]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("")
    assert main(["compare", *(f"{tmp_path}/{s}" for s in specs), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(UserError, match=says):
        raise UserError(error)
