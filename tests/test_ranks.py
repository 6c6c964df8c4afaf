"""Several ranks are one run: the same losses, one voice, and an end when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

RUN = [
    "train.py",
    "--data",
    "tiny/examples",
    "--instr",
    "make it winter",
    "--base",
    "tiny",
    "--batch",
    "4",
    "--n",
    "2",
    "--views",
    "2",
    "--identity-first",
    "5",
    "--held",
    "1",
    "--dtype",
    "fp32",
]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_ranks_take_the_steps_of_one(tmp_path):
    command = [*RUN, "--steps", "20", "--out"]
    alone = subprocess.run(
        [sys.executable, *command, tmp_path / "one"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    shared = subprocess.run(
        [*TWO, *command, tmp_path / "two"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert alone.returncode == shared.returncode == 0, shared.stderr
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 20
    for a, b in zip(one, two):
        for name in ("identity", "cycle", "prior"):
            assert (name in a) == (name in b) and (
                name not in a or a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5)
            ), (name, a, b)
    assert (
        shared.stdout.count("done:") == 1 and shared.stderr.count("256 images in") == 1
    )  # rank 0 speaks for both


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_ranks_dies_all_end_and_the_last_save_stands(victim, tmp_path):
    out, until = tmp_path / "out", time.time() + 120
    run = subprocess.Popen(
        [*TWO, *RUN, "--steps", "100000", "--every", "4", "--out", out],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not (out / "checkpoint.safetensors").exists() and time.time() < until:
            time.sleep(0.2)
        ranks = [
            int(pid)
            for pid in subprocess.run(
                ["pgrep", "-P", str(run.pid)], capture_output=True, text=True
            ).stdout.split()
        ]
        os.kill(
            next(
                pid for pid in ranks if f"\0RANK={victim}\0" in open(f"/proc/{pid}/environ").read()
            ),
            signal.SIGKILL,
        )
        assert run.wait(timeout=60) == 1
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    steps = str(log(out)[-1]["step"] + 1)
    again = subprocess.run(
        [sys.executable, *RUN, "--steps", steps, "--out", out, "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in log(out)] == [*range(1, int(steps) + 1)]
