"""CORE: prompts and few-shot choice equal to the reference's, and scores that follow from the model's losses."""

import json
import math

import numpy as np
import pytest
from evals_fakes import ByteTokenizer, FullLogits, tiny_model

from conftest import golden_files
from evals import core
from evals.scoring import Scorer
from nanochat_jax.errors import UserError

TOK = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def full(model):
    return FullLogits(model)


@pytest.fixture(params=golden_files("behaviour*.json"), ids=lambda p: p.stem)
def golden_core(request):
    return json.loads(request.param.read_text())["core"]


def test_golden_fewshot_indices_and_prompts(golden_core):
    for case in golden_core["cases"]:
        data = golden_core["data"][case["task_type"]]
        shots = core.fewshot_indices(case["idx"], len(data), case["num_fewshot"])
        assert shots == case["fewshot_indices"]
        fewshot = [data[i] for i in shots]
        got = core.render_prompts(case["task_type"], data[case["idx"]], case["continuation_delimiter"], fewshot)
        assert got == case["prompts"]


def test_fewshot_takes_at_most_the_others():
    assert sorted(core.fewshot_indices(1, 3, 10)) == [0, 2]
    assert core.fewshot_indices(0, 1, 5) == []


def test_answer_spans():
    assert core.answer_spans("multiple_choice", [[9, 1, 2], [9, 1, 3, 4]]) == [([9, 1, 2], 2, 3), ([9, 1, 3, 4], 2, 4)]
    assert core.answer_spans("schema", [[9, 1, 5, 6], [9, 2, 3, 5, 6]]) == [
        ([9, 1, 5, 6], 2, 4),
        ([9, 2, 3, 5, 6], 3, 5),
    ]
    assert core.answer_spans("language_modeling", [[9, 1], [9, 1, 2, 3]]) == [([9, 1, 2, 3], 2, 4)]
    # a token that straddles prompt and continuation is part of the answer
    assert core.answer_spans("language_modeling", [[9, 1, 2], [9, 1, 7, 3]]) == [([9, 1, 7, 3], 2, 4)]
    # one answer begins with another, and two equal ones: there is something to score all the same
    assert core.answer_spans("multiple_choice", [[9, 1], [9, 1, 2]]) == [([9, 1], 1, 2), ([9, 1, 2], 1, 3)]
    assert core.answer_spans("schema", [[9, 1], [9, 1]]) == [([9, 1], 1, 2)] * 2


def bundle(tmp_path, tasks):
    """A bundle of {label: (type, shots, chance in %, rows or None)}."""
    (tmp_path / "eval_data" / "some").mkdir(parents=True)
    lines = ["icl_tasks:"]
    for label, (kind, shots, _, _) in tasks.items():
        lines += ["-", f"  label: {label}", f"  dataset_uri: some/{label}.jsonl", f"  num_fewshot: [{shots}]"]
        lines += [f"  icl_task_type: {kind}"]
    (tmp_path / "core.yaml").write_text("\n".join(lines))
    meta = "Eval Task,Task Category,Random baseline\n" + "".join(f"{k},x,{v[2]}\n" for k, v in tasks.items())
    (tmp_path / "eval_meta_data.csv").write_text(meta)
    for label, (_, _, _, rows) in tasks.items():
        if rows is not None:
            text = "".join(json.dumps(r) + "\n" for r in rows)
            (tmp_path / "eval_data" / "some" / f"{label}.jsonl").write_text(text)
    return tmp_path


MC = [{"query": f"Q{i}", "choices": ["yes", "no way", "perhaps"], "gold": i % 3} for i in range(9)]
SCHEMA = [{"context_options": [f"The {i} cat", f"A {i} dog"], "continuation": "sat.", "gold": i % 2} for i in range(6)]
LM = [{"context": f"one two {i} ", "continuation": "three"} for i in range(5)]


def reference_right(full, task, examples):
    """One example at a time, as the formula says."""
    right = []
    for idx, item in enumerate(examples):
        shots = [examples[i] for i in core.fewshot_indices(idx, len(examples), task.num_fewshot)]
        prompts = core.render_prompts(task.task_type, item, task.delimiter, shots)
        ids = [[TOK.bos, *TOK.encode(p)] for p in prompts]
        means = []
        for seq, start, end in core.answer_spans(task.task_type, ids):
            means.append(full.nll(seq)[start - 1 : end - 1].mean())
            best = full(seq).argmax(-1)[start - 1 : end - 1].tolist() == seq[start:end]
        right.append(best if task.task_type == "language_modeling" else int(np.argmin(means)) == item["gold"])
    return right


@pytest.mark.parametrize(
    ("kind", "rows"), [("multiple_choice", MC), ("schema", SCHEMA), ("language_modeling", LM)], ids=lambda x: str(x)[:8]
)
@pytest.mark.parametrize("shots", [0, 3, 5])
def test_batched_scores_equal_one_at_a_time(model, full, kind, rows, shots):
    task = core.CoreTask("t", kind, "t.jsonl", shots, "\nAnswer: ", 0.25)
    assert core.evaluate_task(Scorer(model, batch_rows=4), TOK, task, rows) == reference_right(full, task, rows)


def test_language_modeling_is_right_only_where_every_token_is(model, full):
    """The model's own greedy continuation is right; the same with its end changed is not."""
    ids = [TOK.bos, *TOK.encode("abc")]
    for _ in range(4):
        ids.append(int(full(ids)[-1, :128].argmax()))
    text = bytes(ids[4:]).decode()
    scorer = Scorer(model, batch_rows=2)

    class Greedy:  # of the ids that are ASCII, as the continuation above
        cfg = scorer.cfg

        def token_losses(self, questions, limit):
            full = scorer.token_losses(questions, limit)
            return [[g._replace(best=np.asarray(s[a:b]))] for ((s, a, b),), (g,) in zip(questions, full)]

    task = core.CoreTask("t", "language_modeling", "t.jsonl", 0, "", 0.0)
    assert core.evaluate_task(Greedy(), TOK, task, [{"context": "abc", "continuation": text}]) == [True]
    wrong = {"context": "abc", "continuation": text[:-1] + "~~"}
    assert core.evaluate_task(scorer, TOK, task, [wrong]) == [False]


def test_missing_data_and_stand_ins_are_named(tmp_path, model):
    tasks = {
        "first": ("multiple_choice", 0, 50, MC),
        "gone": ("schema", 0, 50, None),
        "other": ("language_modeling", 2, 0, None),
    }
    folder = bundle(tmp_path, tasks)
    (folder / "eval_data" / "some" / "other.subset.jsonl").write_text("".join(json.dumps(r) + "\n" for r in LM))
    said = []
    out = core.evaluate_core(Scorer(model, 4), TOK, folder, say=said.append)
    assert out["missing"] == ["gone"] and out["substitutes"] == {"other": "other.subset.jsonl"}
    assert out["partial"] is True and out["n_tasks"] == 2 and out["total_tasks"] == 3
    acc = out["results"]["first"]
    assert out["centered"]["first"] == pytest.approx((acc - 0.5) / 0.5)
    assert out["core_metric"] == pytest.approx(sum(out["centered"].values()) / 2)
    assert out["stderr"]["first"] == pytest.approx(math.sqrt(acc * (1 - acc) / 9))
    assert any("gone" in line for line in said)
    json.dumps(out)


def test_a_whole_bundle_is_not_partial_and_none_has_no_score(tmp_path, model):
    folder = bundle(tmp_path / "a", {"t": ("schema", 0, 50, SCHEMA)})
    out = core.evaluate_core(Scorer(model, 4), TOK, folder, max_per_task=4)
    assert out["partial"] is False and out["n"] == {"t": 4} and out["max_per_task"] == 4
    out = core.evaluate_core(Scorer(model, 4), TOK, bundle(tmp_path / "b", {"t": ("schema", 0, 50, None)}))
    assert out["core_metric"] is None and out["partial"] is True


def test_a_prompt_beyond_the_context_is_scored_whole_and_beyond_ten_contexts_cropped(model):
    """As the reference does it, which crops none; all at the left, so that the answer stays."""
    limits, contexts = [], model.cfg.sequence_len
    scorer = Scorer(model, 4)

    class Noting:
        cfg = scorer.cfg

        def token_losses(self, questions, limit):
            limits.append(limit)
            return scorer.token_losses(questions, limit)

    rows = [{"context": "word " * n, "continuation": "end"} for n in (1, 50, 400)]
    task = core.CoreTask("t", "language_modeling", "t.jsonl", 0, " ", 0.0)
    assert len(core.evaluate_task(Noting(), TOK, task, rows)) == 3 and limits == [10 * contexts]


def test_a_folder_that_is_no_bundle(tmp_path, model):
    with pytest.raises(UserError, match="core_dir"):
        core.evaluate_core(Scorer(model, 4), TOK, tmp_path)


def test_order_is_that_of_the_seed(tmp_path):
    import random

    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"i": i}) + "\n" for i in range(20)))
    want = [{"i": i} for i in range(20)]
    random.Random(1337).shuffle(want)
    assert core.load_examples(path, None) == want and core.load_examples(path, 3) == want[:3]
