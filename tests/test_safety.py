"""Nothing is lost and nothing hostile gets in: the short versions of bench/kills.py and bench/fuzz.py."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from fuzz import fuzz  # noqa: E402


def test_damaged_files_are_accepted_or_refused_in_one_sentence():
    table, failures = fuzz(cases=200, seed=1)
    assert not failures, failures
    assert len(table) == 8 and all(c["refused"] for name, c in table.items() if name != "pictures")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_as_one_never_killed():
    command = [sys.executable, ROOT / "bench" / "kills.py", "--kills", "8", "--steps", "12", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[-1])["reached"]) == 8
