"""Several ranks are one run: the same losses, one voice, and an end when one of them dies."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, WINTER, call, read_log

RUN = ["train.py", *WINTER, *"--base tiny --size 32 --batch 4 --n 2 --rank 4 --dtype fp32".split()]
TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--"]


def test_two_ranks_take_the_steps_of_one(few, tmp_path):
    """The log of one process against that of two; in some of the eight steps there is identity."""
    command = [*RUN, "--data", few, "--steps", 8, "--out"]
    alone = call(*command, tmp_path / "one")
    shared = call(*TWO, *command, tmp_path / "two")
    assert alone.returncode == shared.returncode == 0, shared.stderr
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 8 and any("identity" in line for line in one)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in {"identity", "cycle", "prior"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (name, a, b)
    assert shared.stdout.count("done:") == 1  # rank 0 speaks for both
    assert shared.stderr.count("16 images in") == 1


def ranks_of(launcher):
    """{rank: pid} of torchrun's processes."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    ranks = {}
    for pid in map(int, found.stdout.split()):
        with open(f"/proc/{pid}/environ") as environ:
            variables = dict(line.partition("=")[::2] for line in environ.read().split("\0"))
        ranks[int(variables["RANK"])] = pid
    return ranks


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_ranks_dies_all_end_and_the_last_save_stands(victim, few, tmp_path):
    out, command = tmp_path / "out", [*RUN, "--data", few, "--out", tmp_path / "out"]
    endless = [sys.executable, *TWO, *command, "--steps", "100000", "--every", "2"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(endless, cwd=ROOT, start_new_session=True, **silent)
    try:
        until = time.time() + 120
        while not (out / "checkpoint.safetensors").exists() and time.time() < until:
            time.sleep(0.2)
        ranks = ranks_of(run)
        os.kill(ranks[victim], signal.SIGKILL)
        assert run.wait(timeout=60) == 1
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    steps = read_log(out)[-1]["step"] + 1
    again = call(*command, "--steps", steps, "--resume")
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in read_log(out)] == [*range(1, steps + 1)]
