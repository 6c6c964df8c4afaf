"""Several processes are one run: the same losses, one voice, and an end when one of them dies."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

RUN = ["train.py", "--data", "tiny/examples", "--instr", "make it winter", "--base", "tiny", "--batch", "4", "--n", "2",
       "--views", "2", "--identity-first", "5", "--held", "1", "--dtype", "fp32"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_ranks_take_the_steps_of_one(tmp_path):
    command = [*RUN, "--steps", "20", "--out"]
    alone = subprocess.run([sys.executable, *command, tmp_path / "one"], cwd=ROOT,
                           env=os.environ | {"OMP_NUM_THREADS": "1"},           # one thread: one process
                           capture_output=True, text=True, timeout=280)
    shared = subprocess.run([*TWO, *command, tmp_path / "two"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert alone.returncode == shared.returncode == 0, shared.stderr
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 20
    for a, b in zip(one, two):
        for name in ("identity", "cycle", "prior"):
            assert (name in a) == (name in b) and (name not in a or a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5)), (name, a, b)
    assert shared.stdout.count("done:") == 1 and shared.stderr.count("96 images in") == 1       # rank 0 speaks for both


@pytest.mark.parametrize("victim", ["0", "1"])
def test_when_one_of_the_two_processes_dies_the_other_ends_and_the_last_save_stands(victim, tmp_path):
    """The pair that `train.py` makes by itself on a processor."""
    run = subprocess.Popen([sys.executable, *RUN, "--steps", "100000", "--every", "4", "--out", tmp_path / "out"], cwd=ROOT,
                           env=os.environ | {"OMP_NUM_THREADS": "2"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.time() + 120
        while not (tmp_path / "out/checkpoint.safetensors").exists() and time.time() < until:
            time.sleep(.2)
        second, = map(int, subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split())
        os.kill(second if victim == "1" else run.pid, signal.SIGKILL)
        assert run.wait(timeout=60) == (1 if victim == "1" else -signal.SIGKILL)
        while os.path.exists(f"/proc/{second}") and time.time() < until:
            time.sleep(.2)
        assert not os.path.exists(f"/proc/{second}")
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    if victim == "0":
        return
    steps = str(log(tmp_path / "out")[-1]["step"] + 1)
    again = subprocess.run([sys.executable, *RUN, "--steps", steps, "--out", tmp_path / "out", "--resume"], cwd=ROOT, capture_output=True, text=True,
                           timeout=120)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in log(tmp_path / "out")] == [*range(1, int(steps) + 1)]
