"""A handful of the runs that tests/kill_runs.py kills at random moments; by hand it makes sixty."""

import time

import pytest
from kill_runs import campaign


@pytest.mark.slow
def test_killed_runs_end_like_one_left_alone(tmp_path):
    seed = time.time_ns()
    result = campaign(tmp_path, runs=3, seed=seed, devices=[1], steps=16)
    assert result["kills"] >= 1 and result["differing"] == [], f"seed {seed}: {result}"
