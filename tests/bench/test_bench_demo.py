"""The demo over seeds, with runs that are there already."""

import json

from nanochat_jax.bench import __main__ as bench
from nanochat_jax.bench import demo


def test_the_table_has_the_worst_of_the_runs(tmp_path, monkeypatch, capsys):
    asked = []

    def train(command, **how):
        asked.append([a for a in command if a.startswith(("seed=", "dtype=", "mid."))])
        out = tmp_path / command[command.index("--run-dir") + 1]
        seed = int(asked[-1][0].split("=")[1])
        (out / "evals").mkdir(parents=True)
        (out / "rl").mkdir()
        (out / "config.yaml").write_text("")
        (out / "rl" / "done.json").write_text(json.dumps({"seconds": 60.0 * (seed - 1336), "metrics": {}}))
        kinds = {"letters": {"accuracy": 0.5 if seed == 1338 else 0.75}}
        chat = {"sums": {"accuracy": 1.0}, "everyday": {"accuracy": 0.9 - (seed == 1338) / 10, "subjects": kinds}}
        for stage, bpb in (("base", 1.0), ("rl", 1.1)):
            (out / "evals" / f"{stage}.json").write_text(json.dumps({"bpb": {"bpb": bpb}, "chat": chat}))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(demo.subprocess, "run", train)
    assert bench.main(["demo", "--seeds", "2", "--out", str(tmp_path / "out"), "mid.max_rows=8"]) == 0
    out = capsys.readouterr().out
    assert asked == [[f"seed={seed}", "dtype=auto", "mid.max_rows=8"] for seed in (1337, 1338)]
    worst = json.loads(out.splitlines()[-1])["worst"]
    assert worst == {"everyday: letters": 0.5, "everyday": 0.8, "sums": 1.0, "bpb / base's": 1.1, "minutes": 2.0}
    assert out.splitlines()[0].split()[:3] == ["worst", "auto", "1338"]  # the worst run comes first
