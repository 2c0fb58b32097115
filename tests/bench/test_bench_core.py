"""The bookkeeping of the race over CORE, with sides that know their answers; no process is started."""

import json

import pytest

from nanochat_jax.bench import core
from nanochat_jax.bench.__main__ import main


class Known:
    """A side that answers the same each time and takes the next of its times for it."""

    def __init__(self, name, right, seconds):
        self.name, self.right, self.seconds, self.asked = name, right, list(seconds), 0

    def ask(self, order):
        self.asked += 1
        return {"seconds": self.seconds.pop(0), "right": self.right}


def test_a_task_is_timed_without_its_first_pass_and_every_answer_compared():
    ours, theirs = Known("ours", [True, False, True, True], [9, 1, 2, 3]), Known("reference", [True] * 4, [8, 4, 6])
    got = core.measure([ours, theirs], {}, rounds=3)
    assert ours.asked == 4 and theirs.asked == 3
    assert got["ours"] == {"n": 4, "seconds": 2, "examples_per_second": 2, "accuracy": 0.75, "first_seconds": 9}
    assert got["reference"]["seconds"] == 6 and got["ratio"] == 3 and got["agree"] == 3


def test_answers_that_change_from_round_to_round_are_an_error():
    class Fickle(Known):
        def ask(self, order):
            self.right = [not self.right[0]]
            return super().ask(order)

    with pytest.raises(AssertionError):
        core.measure([Fickle("ours", [True], [1, 1])], {}, rounds=1)


def test_all_tasks_together_are_examples_over_seconds():
    sides = [Known("ours", [True, False], [5, 1]), Known("reference", [True, False], [4])]
    more = [Known("ours", [True] * 8, [6, 2]), Known("reference", [False] * 8, [11])]
    out = core.summary([core.measure(sides, {}, 1), core.measure(more, {}, 1)])
    assert out["ours"] == {"examples": 10, "seconds": 3, "examples_per_second": 10 / 3, "first_seconds": 11}
    assert out["ratio"] == 5 and out["ratio_with_compiling"] == 15 / 11
    assert out["tasks_of_equal_accuracy"] == 1 and out["examples_that_agree"] == 2
    assert "reference" not in core.summary([core.measure([Known("ours", [True], [2, 1])], {}, 1)])


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main(["core", "--bundle", str(tmp_path)]) == 2
    (tmp_path / "core.yaml").write_text(
        "icl_tasks:\n- {label: t, dataset_uri: t.jsonl, num_fewshot: [0], icl_task_type: schema}\n"
    )
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nt,50\n")
    (tmp_path / "eval_data").mkdir()
    (tmp_path / "eval_data" / "t.jsonl").write_text(json.dumps({"gold": 0}))
    assert main(["core", "--bundle", str(tmp_path), "--tasks", "t,other"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == ["error", "error"] and "other" in err[1] and "core_dir" in err[0]
    assert main(["core", "--bundle", "x", "--examples", "5"]) == 2
