"""The page about a run: what it says of a whole run and of less than that, and what text from models can do to it."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from report_fakes import HOSTILE, STAGES, SYSTEM, full_run, put

from evals.__main__ import main as evals
from evals.chat import chatcore
from evals.report import plots, write_report
from evals.report.facts import TITLES
from evals.report.plots import moving_average
from nanochat_jax.words import count, cut, duration, fence, listed, plain, plus_minus, printable, table


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything, and its pages: (folder, report.md, report.html)."""
    run = full_run(tmp_path_factory.mktemp("runs") / "a_b|c")
    path = write_report(run, html=True)
    assert path == run / "report.html"
    return run, (run / "report.md").read_text(), path.read_text()


def cells(page: str, title: str) -> list[str]:
    """The row of a table that begins with `title`."""
    row = next(line for line in page.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[2:-1]]


# ------------------------------------------------------------------------------------------------- a whole run


def test_scores_are_over_stages_with_errors_the_best_and_what_is_partial(whole):
    _, page, _ = whole
    assert cells(page, "") == ["chance", "BASE", "MID", "SFT", "RL"]
    assert cells(page, "bits per byte (↓)")[:2] == ["-", "**0.8000 ± 0.0020**"]
    assert cells(page, "GSM8K")[:3] == ["0.00", "-", "0.350 ± 0.030 <sup>2</sup>"]
    assert cells(page, "GSM8K")[4] == "**0.450 ± 0.030** <sup>2</sup>" and cells(page, "MMLU")[0] == "0.25"
    assert cells(page, "GSM8K, lenient")[:3] == ["0.00", "-", "0.550 ± 0.030 <sup>3, 2</sup>"]
    assert re.fullmatch(r"0\.\d{4} ± 0.0050 <sup>1</sup>", cells(page, "CORE")[1])
    notes = re.findall(r"^(\d)\. (.*)$", page, re.MULTILINE)
    assert [n for n, _ in notes] == ["1", "2", "3"]
    stand_in = r"squad.other\|set.jsonl for squad"
    assert notes[0][1] == (
        "Partial CORE: over 7 of 8 tasks and 1,400 examples; without coqa, whose data are missing; stand-ins for "
        f"data: {stand_in}; at most 200 examples a task."
    )
    assert "GSM8K (200 of 1,319)" in notes[1][1] and notes[2][1].startswith("The lenient score of GSM8K also takes")
    assert "**Total wall-clock: 10 h 00 min, $240.00**" in page


def test_verdicts_by_name_and_the_lengths_of_thoughts_are_shown(whole):
    _, page, _ = whole
    assert cells(page, "tools: calls")[:3] == ["-", "-", "0.750 ± 0.030"]
    assert cells(page, "tools: answer")[2] == "0.500 ± 0.030"
    assert "| tokens of an answer |" in page and cells(page, "on")[-1] == "20.5"


def test_hours_of_gpus_and_dollars_of_each_stage(whole):
    _, page, _ = whole
    assert cells(page, "stage") == ["steps", "tokens", "tokens/s", "MFU", "time", "GPU-hours", "cost"]
    steps, tokens, rate, mfu, *spent = cells(page, "base")
    assert (steps, tokens, spent) == ("24", "12.6 M", ["4 h 00 min", "32.00", "$96.00"])
    assert 400 <= float(rate.split()[0]) <= 410 and 40 <= float(mfu.split("\N{NO-BREAK SPACE}")[0]) <= 41
    *_, total = (line for line in page.splitlines() if line.startswith("| **all** |"))
    assert total.endswith("| **10 h 00 min** | **80.00** | **$240.00** |")
    assert "$24.00 an hour, $3.00 a GPU-hour" in page


def test_tokens_of_rl_are_those_that_were_sampled(whole):
    """64 of 256 on the average: a quarter of the budget, and of the rate."""
    _, page, _ = whole
    _, tokens, rate, mfu, *_ = cells(page, "rl")
    assert tokens == "3.15 M" and 100 <= float(rate.split()[0]) <= 103 and mfu == "-"


def test_plots_are_there_and_no_others(whole, tmp_path):
    run, page, _ = whole
    names = re.findall(r"!\[[^]]+\]\(report/(\w+)\.png\)", page)
    assert names == [
        "loss",
        "bpb",
        "core",
        "reward",
        "policy",
        "throughput",
        "core_base",
        "mmlu_subjects",
        "thinking_subjects",
    ]
    assert sorted(p.stem for p in (run / "report").iterdir()) == sorted(names)
    for name in names:
        raw = (run / "report" / f"{name}.png").read_bytes()
        assert raw[:4] == b"\x89PNG" and int.from_bytes(raw[16:20]) == 1620 and len(raw) < 300_000


def test_task_by_task(whole):
    _, page, _ = whole
    assert cells(page, r"squad\* (from squad.other\|set.jsonl)")[0] == "200"
    assert cells(page, "coqa: no data") == ["-"] * 3
    assert cells(page, "HumanEval pass@4") == ["0.400 ± 0.020"] * 3
    assert "4 answers to a question, at temperature 0.8" in page
    assert cells(page, "abstract algebra")[0] == "16" and len(cells(page, "abstract algebra")) == 4


def test_wrong_answers_stand_with_what_was_expected_and_why(whole):
    _, page, _ = whole
    asked = page[page.index("## Answers") :]
    assert [int(n) for n in re.findall(r"^Question (\d)", asked, re.MULTILINE)] == [0, 2, 1, 0]
    assert "**GSM8K: 1 of 4 right**" in asked and "Question 1: **right**, 256 tokens, cut off at the limit" in asked
    assert asked.count("expected:\nIt is 1.\n#### 1") == 2 and "It is 2." not in asked
    assert r"Question 0: **wrong**, 256 tokens, cut off at the limit, failed: \</code\>" in asked


def test_what_was_partial_is_said_in_one_place(whole):
    _, page, _ = whole
    section = page[page.index("## Partial, cropped") : page.index("## Machine")].replace("\N{NO-BREAK SPACE}", " ")
    for text in (
        "base: 10.0 % of the documents' tokens were cropped",
        "base: its documents were read 2.50 times",
        "sft: 12 conversations were cropped to a row, and 3 dropped",
        "CORE of base: no data for coqa.",
        "Not all questions were asked of ARC-Easy (200 of 1,319)",
        "answers that had no end within 512 tokens and the context: GSM8K (10.0 %)",
    ):
        assert text in section


def test_the_machine_is_that_of_the_stages(whole):
    _, page, _ = whole
    assert cells(page, "devices") == ["8 x NVIDIA H100 80GB HBM3"] and cells(page, "git commit") == ["abc1234"]


# ------------------------------------------------------------------------------------------------- less than that


def without(*names):
    def remove(run):
        for name in names:
            for path in run.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def stopped(run):
    """SFT was killed as it wrote a line; nothing after it has begun."""
    without("rl", "sft/done.json", "evals/*")(run)
    path = run / "sft" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]) + '{"step": 10, "lo')


def older(run):
    """Marks and results of a version that noted less."""
    for path in run.glob("*/done.json"):
        put(path, {k: v for k, v in json.loads(path.read_text()).items() if k in ("seconds", "steps")})
    for path in run.glob("evals/*.json"):
        found = json.loads(path.read_text())
        for task in found["chat"].values():
            for key in ("stderr", "of", "unfinished", "subjects", "macro", "pass_at_k", "accuracy_lenient"):
                task.pop(key, None)
        found["bpb"] = {"bpb": None}
        for key in ("stderr", "n"):
            (found["core"] or {}).pop(key, None)
        put(path, found)


def one_step(run):
    for stage in STAGES:
        path = run / stage / "metrics.jsonl"
        path.write_text(path.read_text().splitlines()[0] + "\n")


PARTS = {
    "no rl": (without("rl", "evals/rl*"), "| MMLU | 0.25 | - |", "![Reward"),
    "base alone": (without("mid", "sft", "rl", "evals/[msr]*"), "## CORE by task", "ChatCORE |"),
    "no answers": (without("evals/*.jsonl"), "## Samples", "## Answers"),
    "no evaluations": (without("evals"), "No stage has been evaluated.", "## Samples"),
    "stopped in sft": (stopped, "sft has not ended: its records go to step 9.", "![Reward"),
    "an older version's": (older, "| ARC-Easy |", "GPU-hours"),
    "a step each": (one_step, "## Scores", "## Curves"),
    "only begun": (without("*/", "evals"), "## Machine and settings", "## Time"),
}


@pytest.mark.parametrize("name", PARTS)
def test_less_than_a_whole_run_makes_a_shorter_page(name, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 30)
    remove, there, gone = PARTS[name]
    run = full_run(tmp_path / "run")
    remove(run)
    html = write_report(run, html=True).read_text()
    page = (run / "report.md").read_text()
    assert there in page and gone not in page and len(page) < len(whole[1])
    assert page.count("![") == len(list(run.glob("report/*.png"))) == html.count("<img")


def test_means_over_different_tasks_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 30)
    run = full_run(tmp_path / "run")
    assert cells(write_report(run).read_text(), "ChatCORE")[4].startswith("**")
    found = json.loads((run / "evals" / "rl.json").read_text())
    del found["chat"]["mmlu"]
    put(run / "evals" / "rl.json", found | {"chatcore": chatcore(found["chat"], tuple(TITLES))})
    page = write_report(run).read_text()
    assert "**" not in "".join(cells(page, "ChatCORE")) and ", without MMLU; not to be compared" in page


def test_a_machine_without_gpus_has_hours_and_no_gpu_hours(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 30)
    run = full_run(tmp_path / "run")
    for path in run.glob("*/done.json"):
        put(path, json.loads(path.read_text()) | {"system": SYSTEM | {"devices": ["cpu"]}})
    page = write_report(run).read_text()
    assert "GPU-hours" not in page and cells(page, "base")[-2:] == ["4 h 00 min", "$96.00"]


# ------------------------------------------------------------------------------------------------- text from models


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(whole):
    page = whole[2]
    tags = Tags(page)
    assert not tags.open  # all are closed, in order
    never = {"script", "iframe", "object", "embed", "link", "base", "form", "svg", "video", "audio", "source"}
    assert not never & {t for t, _ in tags.found}
    for tag, attrs in tags.found:
        assert not any(name.startswith("on") for name in attrs)
        assert tag != "img" or attrs["src"].startswith("data:image/png;base64,")
        assert tag != "a" or attrs["href"].startswith("#")
    assert "default-src &#x27;none&#x27;; img-src data:;" in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_hostile_text_is_shown_as_it_is(whole):
    run, page, html = whole
    shown = printable(HOSTILE)
    assert "\x1b" not in page + html and "\u202e" not in page + html
    assert Tags(html).text.count(shown) == len(STAGES) + 4  # samples, answers to questions
    assert html.count("<h2") == page.count("\n## ") and "<title>a_b|c</title>" in html and "<h1>a_b|c</h1>" in html


def test_other_renderers_of_the_markdown_see_only_the_tags_of_the_report(whole):
    found = MarkdownIt("commonmark").enable("table").parse(whole[1])
    raw = [t.content for b in found for t in [b, *(b.children or [])] if t.type in ("html_block", "html_inline")]
    assert {tag for text in raw for tag in re.findall(r"<[^>]*>", text)} == {
        *("<details>", "</details>", "<summary>", "</summary>", "<sup>", "</sup>")
    }
    assert {t.attrs["src"][:7] for b in found for t in b.children or [] if t.type == "image"} == {"report/"}


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("|`*_<>[]\\&#~\n")))
def test_plain_text_is_one_cell_that_says_just_this(text):
    md = MarkdownIt("commonmark").enable("table")
    tokens = md.parse(table(["a", "b"], [[plain(text), "end"]]))
    inside = [t for t in tokens if t.type == "inline"]
    assert len(inside) == 4 and inside[3].content == "end"
    children = inside[2].children
    assert {t.type for t in children} <= {"text", "text_special"}
    assert "".join(t.content for t in children) == " ".join(printable(text).split())


@given(st.text(st.sampled_from("`~a \n")))
def test_no_text_ends_its_fence(text):
    (block,) = MarkdownIt("commonmark").parse(fence(text))
    assert block.type == "fence" and block.content == f"{text}\n"


# ------------------------------------------------------------------------------------------------- words


def test_words():
    assert [duration(s) for s in (None, 5, 65, 3723)] == ["-", "5.0 s", "1 min 05 s", "1 h 02 min"]
    assert [count(n) for n in (None, 12, 1234, 12_345_678, 3e9)] == ["-", "12", "1.23 k", "12.3 M", "3 G"]
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| :-- | --: |\n| x | 1 |"
    assert [listed(list(w)) for w in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    assert [plus_minus(0.5, e) for e in (0.012, 0.0, None)] == ["0.500 ± 0.012", "0.500", "0.500"]
    assert moving_average([1, 3, 5, 7], 2) == [1, 2, 4, 6]


def test_long_texts_are_cut_between_words():
    assert cut("short", 10, 2) == "short"
    assert cut("one two three four", 11, 2) == "one two [... 11 more characters]"
    assert cut("one two three", 7, 2) == "one two [... 6 more characters]"
    assert cut("a\nb\nc", 100, 2) == "a\nb [... 2 more characters]"
    assert cut("x" * 30, 10, 2) == "x" * 10 + " [... 20 more characters]"


# ------------------------------------------------------------------------------------------------- the command


def test_command(tmp_path, capsys):
    run = full_run(tmp_path / "run")
    without("[msr]*/", "evals/[msr]*")(run)
    assert evals(["report", "--run-dir", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.md") and not (run / "report.html").exists()
    assert evals(["report", "--run-dir", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
