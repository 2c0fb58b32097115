"""Tasks: what they ask, what they accept, and that training never sees a test question."""

import gzip
import hashlib
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from conftest import golden_files
from evals.chat import by_subject
from evals.tasks import TASKS, available, load_task, trainable
from evals.tasks.base import read_rows
from evals.tasks.checks import holds
from evals.tasks.conversations import Conversations, local_chats
from evals.tasks.everyday import Everyday
from evals.tasks.gsm8k import GSM8K, extract_answer, parse_parts
from evals.tasks.humaneval import HumanEval, extract_program, find_program, import_lines
from evals.tasks.identity import Identity
from evals.tasks.mixtures import mixture
from evals.tasks.multiple_choice import ARC, MMLU, Facts, render_multiple_choice
from evals.tasks.plain import KINDS, Story, Talk, _said
from evals.tasks.spelling import Spelling, SpellingBee, read_words
from evals.tasks.thinking import Thinking
from evals.tasks.tools import Tools
from nanochat_jax.config import DataConfig
from nanochat_jax.data import stories
from nanochat_jax.data.split import HELD_OUT, held_out
from nanochat_jax.data.tables import ROWS
from nanochat_jax.engine.calculator import use_calculator
from nanochat_jax.errors import UserError


def behaviour(key):
    return [case for path in golden_files("behaviour*.json") for case in _items(json.loads(path.read_text())[key])]


def _items(value):
    return list(value.items()) if isinstance(value, dict) else value


@pytest.mark.parametrize("case", behaviour("gsm8k"))
def test_gsm8k_golden(case):
    assert parse_parts(case["answer"]) == case["parts"]
    assert extract_answer(case["answer"]) == case["extracted"]


@pytest.mark.parametrize(("text", "want"), behaviour("extract_answer"))
def test_extract_answer_golden(text, want):
    assert extract_answer(text) == want


@pytest.mark.parametrize("case", behaviour("humaneval_extract"))
def test_humaneval_extract_golden(case):
    assert extract_program(case["completion"]) == case["program"]


@pytest.mark.parametrize("case", behaviour("render_mc"))
def test_render_multiple_choice_golden(case):
    assert render_multiple_choice(case["question"], case["letters"], case["choices"]) == case["text"]


def reference_answer(conversation) -> str:
    """What the visible text of the last message is."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


WORDS = [word for subject in stories.words().values() for word in subject]
MADE = {
    **KINDS,
    "facts": Facts,
    "spelling": lambda split: Spelling(WORDS, split, 500),
    "spellingbee": lambda split: SpellingBee(WORDS, split, 500),
}


@pytest.mark.parametrize("name", MADE)
def test_made_tasks_accept_their_own_answer_and_nothing_else(name):
    for split in ("train", "test"):
        task = MADE[name](split)
        for i in range(0, len(task), len(task) // 50):
            conversation = task[i]
            assert conversation == task[i]
            answer = reference_answer(conversation)
            assert task.evaluate(conversation, answer) and task.reward(conversation, answer) == 1.0
            assert not task.evaluate(conversation, "") and not task.evaluate(conversation, "Xyzzy 7.25.")
    with pytest.raises(IndexError):
        task[len(task)]


@pytest.mark.parametrize("name", sorted(set(MADE) - {"self", "story"}))  # those have no questions of their own to test
def test_training_and_test_questions_are_disjoint(name):
    train, test = (
        {task[i]["messages"][0]["content"] for i in range(min(len(task), 3000))}
        for task in (MADE[name]("train"), MADE[name]("test"))
    )
    assert not train & test and len(test) > 100


@pytest.mark.parametrize("name", ["sums", "arithmetic", "letters"])
def test_calls_say_what_the_calculator_says_and_the_answer_ends_with_it(name):
    task, kinds = KINDS[name]("train"), set()
    for i in range(300):
        parts = task[i]["messages"][1]["content"]
        if isinstance(parts, list):
            call, result, said = parts if len(parts) == 3 else (None, None, parts[0])
            if call:
                assert use_calculator(call["text"]) == result["text"]
                assert round(float(result["text"]), 2) == task[i]["check"]["number"]
                kinds |= set(call["text"]) & set("+-*/")
            assert said["text"].endswith(".")
    assert name == "letters" or kinds == set("+-*/")


def test_facts_have_one_right_choice_of_four():
    task, answers = Facts("train"), []
    for i in range(200):
        text, answer = (m["content"] for m in task[i]["messages"])
        _, *lines = text.split("\n- ")
        choices = dict(reversed(line.split("\n")[0].split("=")) for line in lines)
        assert len(set(choices.values())) == 4 and answer in choices
        answers.append(answer)
    assert all(30 < answers.count(letter) < 75 for letter in "ABCD")


def test_what_is_read_was_stated():
    """But for numbers of things, and answers that put it in other words."""
    found = [KINDS["reading"]("train")[i] for i in range(200)]
    stated = sum(c["check"]["any"][0] in c["messages"][0]["content"].lower() for c in found)
    assert stated > 180 and all(holds(c["check"], c["messages"][-1]["content"]) for c in found)
    assert {len(c["messages"]) for c in found} == {2, 4, 6}
    tested = [KINDS["reading"]("test")[i] for i in range(50)]
    assert {len(c["messages"]) for c in tested} == {2}


def test_talk_goes_from_one_subject_to_another():
    task = Talk("train")
    talks = [task[i] for i in range(200)]
    assert {2, 4, 6, 8} <= {len(t["messages"]) for t in talks}
    assert all(task.evaluate(t, reference_answer(t)) for t in talks)
    asked = [m["content"] for t in talks for m in t["messages"][::2]]
    number = [q for q in asked if re.search(r"\d", q)]  # sums, problems and texts, whose split is that of their hash
    assert len(number) > 100 and not any(held_out(q, HELD_OUT) for q in number)


def test_numbers_in_words_are_as_people_say_them():
    said = {n: {_said(random.Random(i), n, True) for i in range(40)} for n in (0, 7, 15, 20, 42, 100)}
    assert said == {
        0: {"0", "zero"},
        7: {"7", "seven"},
        15: {"15", "fifteen"},
        20: {"20", "twenty"},
        42: {"42", "forty two", "forty-two"},
        100: {"100"},
    }
    assert _said(random.Random(0), 42, False) == "42"


def test_conversations_do_not_depend_on_the_interpreter():
    """CI compares Python 3.11 and 3.13 by this. What is said has changed on purpose: the new hash belongs here."""
    said = [task("train")[i] for task in (Talk, Tools, Thinking) for i in range(100)]
    assert hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16] == "8e1ac1fdb5d42615"


def test_a_story_has_what_was_asked_for():
    task = Story("train")
    for i in range(200):
        given = task[i]["check"]["story"]
        assert not stories.problems(reference_answer(task[i]), given)
    wrong = "Once there was a kind dog named Milo. He had a red ball. Colorless ideas sleep."
    assert stories.problems(wrong, {"hero": "Rex"}) and stories.problems(wrong, {})


def test_answers_in_other_words_are_judged_alike():
    assert holds({"number": 391}, "17 * 23 is 1 more than 390, so 391.") and not holds({"number": 391}, "1391")
    assert holds({"number": 3}, "There are three.") and not holds({"number": 3}, "There are many.")
    assert holds({"spelled": "window"}, "W-I-N-D-O-W") and holds({"spelled": "window"}, "It is w, i, n, d, o, w.")
    assert not holds({"spelled": "window"}, "window") and not holds({"spelled": "window"}, "w i n d o w s")
    assert holds({"any": ["red", "crimson"]}, "It is Red!") and not holds({"any": ["red"]}, "It is bored.")
    assert holds({"any": ["shop"], "none": ["school"]}, "The shop.")
    assert not holds({"any": ["shop"], "none": ["school"]}, "The shop or the school.")


def test_the_everyday_questions_stand_apart_from_what_is_trained_on():
    dev, test = Everyday("dev"), Everyday("test")
    assert len(dev) == len(test) == 100 and len(Everyday()) == 200
    asked = {t["messages"][0]["content"].lower() for t in (Talk("train")[i] for i in range(3000))}
    assert sum(test[i]["messages"][0]["content"].lower() in asked for i in range(100)) < 5
    kinds = {e["subject"] for e in (test[i] for i in range(100))}
    assert kinds == {"sums", "letters", "spelling", "words", "self", "change", "reading"}


def test_spelling_counts_letters():
    task = SpellingBee(WORDS, "test", 100)
    for i in range(100):
        parts = task[i]["messages"][1]["content"]
        assert use_calculator(parts[1]["text"]) == parts[2]["text"] == task[i]["answer"]


def test_identity_says_its_name():
    task = Identity()
    asked = {t["messages"][0]["content"]: t["messages"][1]["content"] for t in (task[i] for i in range(len(task)))}
    assert "nanochat_jax" in asked["Who are you?"]
    assert all(len(task[i]["messages"]) in (2, 4) for i in range(50))


def test_multiple_choice_rows_of_the_hub():
    row = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    task = ARC([row], "arc_easy")
    assert task[0]["letters"] == ["1", "2"] and "- y=2\n" in task[0]["messages"][0]["content"]
    assert task.evaluate(task[0], "2") and not task.evaluate(task[0], "1") and task.baseline == 0.25
    mmlu = {"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 3}
    for rows in ([mmlu], [{"train": mmlu}]):
        assert MMLU(rows)[0]["messages"][1]["content"] == "D"


HUMANEVAL = {
    "prompt": "from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    '''Sum.'''\n",
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
    "entry_point": "total",
}


@pytest.mark.parametrize(
    ("choices", "answer", "want"),
    [("abcd", "B", "B"), ("abcd", " c", "C"), ("abc", 2, "C"), ("abcdefghij", 9, "J"), ("abcdefghij", "J", "J")],
)
def test_mmlu_takes_letters_and_any_number_of_choices(choices, answer, want):
    row = {"question": "Q?", "choices": list(choices), "answer": answer}
    for task in (MMLU([row]), MMLU([{"train": row}])):
        asked, said = (m["content"] for m in task[0]["messages"])
        assert said == want and len(task[0]["letters"]) == len(choices) and f"- {choices[-1]}=" in asked


MC = {"question": "Q?", "choices": ["a", "b", "c"], "answer": 1}
ARC_ROW = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}
UNUSABLE = [
    ("gsm8k", {"question": "Q?", "answer": "#### 1"}, {"question": None}, "question is null"),
    ("gsm8k", {"question": "Q?", "answer": "#### 1"}, {"answer": None}, "answer is null"),
    ("humaneval", HUMANEVAL, {"prompt": None}, "prompt is null"),
    ("mmlu", MC, {"question": None}, "question is null"),
    ("mmlu", MC, {"choices": None}, "choices is null"),
    ("mmlu", MC, {"choices": ["a", None, "c"]}, "two or more texts"),
    ("mmlu", MC, {"choices": ["a"]}, "two or more texts"),
    ("mmlu", MC, {"choices": [str(i) for i in range(30)]}, "two or more texts"),
    ("mmlu", MC, {"answer": None}, "answer is null"),
    ("mmlu", MC, {"answer": 3}, "answer 3 is none of its letters, A, B, C"),
    ("mmlu", MC, {"answer": -1}, "answer -1 is none"),
    ("mmlu", MC | {"answer": "B"}, {"answer": "AB"}, "answer 'AB' is none"),
    ("mmlu", MC | {"answer": 1.0}, {}, "answer is 1.0"),
    ("arc_easy", ARC_ROW, {"answerKey": "C"}, "answer 'C' is none of its letters, A, B"),
    ("arc_easy", ARC_ROW, {"choices": {"text": ["x", "y"], "label": ["A"]}}, "two or more texts"),
    ("arc_easy", ARC_ROW, {"choices": None}, "choices is null"),
]


@pytest.mark.parametrize(("name", "row", "change", "says"), UNUSABLE)
def test_a_row_that_cannot_be_asked_is_named_with_its_file(name, row, change, says, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "tasks" / ROWS[name].files["test"].replace("*", "x")
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([row, row | change]), path)
    task = load_task(name, split="test", data=DataConfig(dir=str(tmp_path)), cache_dir=tmp_path)
    with pytest.raises(UserError, match=f"{path.name}, row 1 .*{says}") as e:
        task[1]
    assert "\n" not in str(e.value)


def test_gsm8k_compares_numbers_as_written():
    task = GSM8K([{"question": "?", "answer": "It is <<10*123=1230>>1,230.\n#### 1,230"}])
    assert task.evaluate(task[0], "so #### 1230") and not task.evaluate(task[0], "1230")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        *(
            ("72", s)
            for s in ("72.", "$72", "72.00", " 72", "+72", "**72**", "Answer: 72", r"\boxed{72}", "**Answer:** 72.0")
        ),
        ("72.", "72"),
        ("$72", "72"),
        ("0.5", ".5"),
        ("-5", "\u2212$5.0"),
        ("1,230", "$1,230.00 in all"),
    ],
)
def test_the_lenient_score_of_numbers_is_of_their_values(reference, said):
    task = GSM8K([{"question": "?", "answer": f"So.\n#### {reference}"}])
    assert not task.evaluate(task[0], f"#### {said}") and task.reward(task[0], f"#### {said}") == 1.0
    assert task.reward(task[0], f"####{said}") == 1.0
    for wrong in (said, f"#### 9{said}", "#### ", "####" + "-" * 1000, "#### " + "9" * 5000):
        assert task.reward(task[0], wrong) == 0.0


def test_what_is_right_by_the_strict_score_is_right_by_the_lenient_one():
    task = GSM8K([{"question": "?", "answer": "#### 1/2"}])
    assert task.evaluate(task[0], "#### 1") and task.reward(task[0], "### 1 #### 1 or 2") == 1.0
    nobody = GSM8K([{"question": "?", "answer": "Nobody knows."}])
    assert nobody.reward(nobody[0], "#### none") == 0.0


TOTAL = "def total(xs):\n    return sum(xs)"
LENIENT = {
    "py": f"```py\n{TOTAL}\n```",
    "Python": f"Here it is:\n```Python\n{TOTAL}\n```\nIt sums.",
    "python3": f"```python3\n{TOTAL}\n```",
    "braces": f"```{{.python}}\n{TOTAL}\n```",
    "tildes": f"~~~\n{TOTAL}\n~~~",
    "no end": f"Sure:\n```python\n{TOTAL}",
    "no beginning": f"{TOTAL}\n```\nThat is all.",
    "indented": "1. So:\n   ```python\n   def total(xs):\n       return sum(xs)\n   ```",
    "end in the last line": f"```python\n{TOTAL}```",
    "text after the end": f"```python\n{TOTAL}``` It sums.",
    "title": f'```python title="a.py"\n{TOTAL}\n```',
    "code in the first line": f"```python {TOTAL}\n```",
    "in a line": "`" * 3 + "def total(xs): return sum(xs)" + "`" * 3,
    "bash first": f"```bash\npip install x\n```\nand then\n```python\n{TOTAL}\n```",
    "example first": f"```python\nprint(total([1]))\n```\nwith\n```python\n{TOTAL}\n```",
    "another language first": f"```ruby\ndef total(xs)\nend\n```\n```\n{TOTAL}\n```",
}


@pytest.mark.parametrize("name", LENIENT)
def test_the_lenient_score_finds_code_between_fences_of_any_kind(name):
    found = find_program(LENIENT[name], "total")
    assert found.split() == TOTAL.split() and found != extract_program(LENIENT[name])
    assert find_program(LENIENT[name].replace("\n", "\r\n"), "total").split() == TOTAL.split()


def test_code_that_only_the_lenient_score_finds_is_run_too():
    task = HumanEval([HUMANEVAL])
    for said, want in ((LENIENT["bash first"], 1.0), ("```py\ndef total(xs):\n    return 0\n```", 0.0)):
        assert not task.evaluate(task[0], said) and task.reward(task[0], said) == want
    for said in ("", "None.", "```", "``````", "~~~\n```", "```python\nprint(1)\n```"):
        assert find_program(said, "total") == said.strip()


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        ("```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```", True),  # needs the prompt's import
        ("```python\ndef total(xs):\n    return 0\n```", False),
        ("I do not know.", False),
        ("import os\nos._exit(0)", False),
    ],
)
def test_humaneval_runs_the_tests(completion, want):
    task = HumanEval([HUMANEVAL])
    assert task.evaluate(task[0], completion) is want
    assert task.evaluate(task[0], task[0]["messages"][1]["content"])


def dialogue(n):
    return [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(n)]


def test_conversations_leave_out_what_is_no_dialogue():
    system = [{"role": "system", "content": "Be kind."}]
    bad = [[], dialogue(1), dialogue(2)[::-1], system, [{"role": "user", "content": ""}, dialogue(2)[1]]]
    rows = [{"messages": m} for m in [*bad, None, ["hi"], [{"role": "user"}], system + dialogue(2)]]
    both = Conversations(rows, "train"), Conversations(rows, "test")
    assert all(f"; {len(bad) + 3} left out" in t.notes[0] for t in both) and len(both[0]) + len(both[1]) == 1
    assert [task[i] for task in both for i in range(len(task))] == [{"messages": system + dialogue(2)}]
    with pytest.raises(UserError, match="can be used: 3 left out .*no messages, first row 1"):
        Conversations(rows[:3], "train")


def test_chats_of_a_folder_are_read_with_what_is_said_of_them(tmp_path):
    with pytest.raises(UserError, match="needs conversations in"):
        local_chats(tmp_path, "train")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": dialogue(2)}) + '\n\n{"text": "x"}\n')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(dialogue(3)).encode()))
    (tmp_path / "c.csv").write_text("a,b")
    both = [local_chats(tmp_path, split) for split in ("train", "test")]
    assert [t[i] for t in both for i in range(len(t))] == [{"messages": dialogue(2)}] * 2
    form, counted, others = both[0].notes
    assert "deep/b.jsonl.gz: taken for lists of messages" in form and "c.csv not read" in others
    assert "2 conversations taken, 1 of them repaired (1 taken up to the last answer); 1 left out" in counted
    assert "(1 no known form (fields text), first a.jsonl line 3)" in counted
    (tmp_path / "d.jsonl.gz").write_bytes(b"half")
    with pytest.raises(UserError, match="d.jsonl.gz cannot be read"):
        local_chats(tmp_path, "train")


def test_conversations_hold_out_by_their_text_alone():
    def sides(rows):
        return [{json.dumps(t[i]) for i in range(len(t))} for t in (Conversations(rows, s) for s in ("train", "test"))]

    rows = [{"messages": [{"role": "user", "content": f"hello {i}"}, *dialogue(2)[1:]]} for i in range(2000)]
    train, test = sides(rows)
    assert not train & test and len(train | test) == 2000 and 20 < len(test) < 70
    assert sides(rows[::-1]) == [train, test]  # neither order, nor what else is there, nor a repeat moves a row
    assert sides(rows[:500] * 2)[1] == test & {json.dumps(r) for r in rows[:500]}


def test_parquet_rows_are_read_when_asked_for(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "smol.parquet"
    want = [{"messages": [*dialogue(2), {"role": "user", "content": str(i)}, *dialogue(2)[1:]]} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(want), path, row_group_size=7)
    rows = read_rows(path)
    assert list(rows) == want and rows[-1] == want[-1] and [rows[i] for i in range(len(rows))] == want
    with pytest.raises(IndexError):
        rows[40]
    both = Conversations(rows, "train"), Conversations(rows, "test")
    assert len(both[0]) + len(both[1]) == 40 and both[0][0] in want
    path.write_bytes(path.read_bytes()[:-20])
    for bad in (path, tmp_path / "none.parquet"):
        with pytest.raises(UserError, match=bad.name) as e:
            read_rows(bad)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("make", [lambda r: ARC(r, "arc_easy"), MMLU, GSM8K, HumanEval])
def test_rows_of_another_table_are_named(make):
    with pytest.raises(UserError, match="lack .*they have other"):
        make([{"other": 1}])


def test_gsm8k_without_a_number_is_never_right():
    task = GSM8K([{"question": "?", "answer": "Nobody knows <<what>>."}])
    assert [p["text"] for p in task[0]["messages"][1]["content"]] == ["Nobody knows ", "what", "", "."]
    assert not task.evaluate(task[0], "nor do I")


def test_humaneval_takes_the_imports_above_the_first_function_only():
    prompt = "import math\nfrom typing import List\n\n\ndef f():\n    '''Reads\nfrom left to right.\n    '''\n"
    assert import_lines(prompt) == ["import math", "from typing import List"]


def test_spelling_accepts_letters_apart_only():
    task = Spelling(WORDS, "test", 5)
    word = task[0]["answer"].replace(" ", "")
    assert task.evaluate(task[0], f"Here: {' '.join(word)}\n")
    assert not task.evaluate(task[0], word) and not task.evaluate(task[0], f"{word}: {' '.join(word[::-1])} x")
    with pytest.raises(UserError, match="no words for its test split"):
        Spelling([], "test", 5)


def test_words_are_read_gzipped_or_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Ant\r\nbee\r\nit's\r\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"ant\nbee\n"))
    assert read_words(tmp_path / "a.txt") == read_words(tmp_path / "a.txt.gz") == ["ant", "bee"]
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read as a list of words"):
        read_words(tmp_path / "b.txt.gz")


def test_every_task_that_is_offered_can_be_loaded_and_unknown_ones_are_named(tmp_path):
    data = DataConfig()
    for split in ("train", "test"):
        for name in {*available(data, split), *(trainable(data) if split == "train" else [])}:
            task = load_task(name, split=split, data=data, cache_dir=tmp_path)
            assert task.name == name and len(task) and {"messages", "text"} & set(task[random.randrange(len(task))])
    with pytest.raises(UserError, match="unknown task nosuch; there are arc_easy"):
        load_task("nosuch", split="test", data=data, cache_dir=tmp_path)
    for name in ("gsm8k", "chat"):
        with pytest.raises(UserError, match="data.dir"):
            load_task(name, split="train", data=data, cache_dir=tmp_path)


def test_local_folder_offers_what_it_holds(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "tasks").mkdir()
    data = DataConfig(dir=str(tmp_path))
    assert available(data, "test") == ["spellingbee"] and "chat" not in trainable(data)
    table = pa.table({"question": ["q"], "answer": ["#### 1"]})
    pq.write_table(table, tmp_path / "tasks" / "gsm8k_main_train.parquet")
    assert available(data, "train") == ["gsm8k", "spellingbee"] and available(data, "test") == ["spellingbee"]
    assert len(load_task("gsm8k", split="train", data=data, cache_dir=tmp_path)) == 1
    with pytest.raises(UserError, match="gsm8k_main_test.parquet"):
        load_task("gsm8k", split="test", data=data, cache_dir=tmp_path)
    assert ("gsm8k", "train", 1) in mixture("mid", data) and all(n in TASKS for n, _, _ in mixture("sft", data))


@pytest.fixture(scope="module")
def published():
    """The data source of the published tables."""
    folder = os.environ.get("NANOCHAT_DATA")
    if not folder or not any((Path(folder) / "tasks").glob("*.parquet")):
        pytest.skip("NANOCHAT_DATA does not name a folder with tasks/*.parquet")
    return DataConfig(dir=folder)


def test_published_mmlu_has_57_subjects(published, tmp_path):
    task = load_task("mmlu", split="test", data=published, cache_dir=tmp_path)
    conversations = [task[i] for i in range(len(task))]
    found = by_subject([c["subject"] for c in conversations], np.ones(len(task)), [None] * len(task))
    assert len(task) == 14_042 and len(found["subjects"]) == 57 and found["macro"]["accuracy"] == 1.0
    assert found["subjects"]["astronomy"]["n"] == 152 and found["subjects"]["professional_law"]["n"] == 1534
    assert all(task.evaluate(c, c["messages"][1]["content"]) for c in conversations)


@pytest.mark.parametrize(("name", "size"), [("gsm8k", 1319), ("arc_easy", 2376), ("arc_challenge", 1172)])
def test_published_answers_are_right(published, tmp_path, name, size):
    task = load_task(name, split="test", data=published, cache_dir=tmp_path)
    assert len(task) == size
    for i in range(size):
        assert task.evaluate(task[i], reference_answer(task[i]))


def test_mixture_overrides():
    data = DataConfig()
    assert mixture("sft", data, {"facts": -10}) == [("facts", "train", -10)]
    with pytest.raises(UserError, match="gsm8k, which has no training rows here"):
        mixture("sft", data, {"gsm8k": 1})
    with pytest.raises(UserError, match="means nothing"):
        mixture("sft", data, {"facts": 0})
