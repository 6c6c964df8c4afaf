"""Nothing is lost: a training is killed (SIGKILL) at random moments and resumed each time, and ends
bit for bit as one that was never killed.

    python bench/kills.py --kills 30 --seed 0       # about two minutes

It saves at every step, so that many of the kills fall into a save. After each kill every file that
is there must be whole. The last line is one JSON object. Linux and macOS only (fork).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"  # one thread: a process that can be forked
import numpy as np  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import frozen.load  # noqa: E402
import train  # noqa: E402

OPTIONS = '--instr "make it winter" --base tiny --batch 2 --n 2 --rank 2 --every 1 --size 32'


def two_steps(model):
    return 2


def start(data, out, steps, resume):
    """train.py in a forked process, which spares the imports. -> its pid"""
    if pid := os.fork():
        return pid
    code = 1
    try:
        frozen.load.edit_steps = two_steps  # quick sample sheets: most of the time goes to saving
        few = {"identity_first": 2, "warmup": 3}
        train.RECIPES["default"] = dataclasses.replace(train.RECIPES["default"], **few)
        sys.argv = ["train.py", *shlex.split(OPTIONS), "--data", str(data), "--out", str(out)]
        sys.argv += ["--steps", str(steps)] + ["--resume"] * resume
        sys.stdout = sys.stderr = open(os.devnull, "w")
        train.main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    finally:
        os._exit(code)


def whole(out):
    """Reads all that a killed run left; raises where a file is torn. -> lines of the log"""
    for path in out.glob("*.safetensors"):
        load_file(path)
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    for line in lines[:-1]:  # the last may be torn; --resume drops it
        json.loads(line)
    return len(lines)


def steps_of(out):
    """The steps in the log."""
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


def check_same(never, often, steps):
    """Raises AssertionError where two runs differ, or a log is not every step once."""
    for name in ("checkpoint.safetensors", "adapter.safetensors"):
        a, b = load_file(never / name), load_file(often / name)
        same = a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
        assert same, f"{name} differs from the run that was never killed"
    every = list(range(1, steps + 1))
    assert steps_of(never) == steps_of(often) == every, "the log has gaps or doubles"


def survive(kills, steps, seed):
    """-> how far the run had come at each kill; raises AssertionError where something was lost"""
    rng, reached = np.random.default_rng(seed), []
    with tempfile.TemporaryDirectory() as work:
        data, never, often = (pathlib.Path(work) / n for n in ("data", "never", "often"))
        data.mkdir()
        for i in range(4):
            shutil.copy(ROOT / "tiny" / "examples" / f"{i:03d}.png", data)
        begun = time.time()
        assert os.waitpid(start(data, never, steps, False), 0)[1] == 0, "training failed"
        whole_run = time.time() - begun
        while True:
            pid = start(data, often, steps, (often / "checkpoint.safetensors").exists())
            if len(reached) == kills:
                break
            time.sleep(rng.uniform(0, 1.5 * whole_run * 4 / kills + 0.5))
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            assert status in (0, signal.SIGKILL), f"training ended by itself with {status}"
            reached.append(whole(often))
            if status == 0:  # it was done before the kill came: once more from the start
                shutil.rmtree(often)
        assert os.waitpid(pid, 0)[1] == 0, "the last resume failed"
        check_same(never, often, steps)
    return reached


def main():
    kind = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=kind)
    p.add_argument("--kills", type=int, default=30)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    begun = time.time()
    reached = survive(o.kills, o.steps, o.seed)
    same = "every file whole, the end bit for bit that of a run never killed"
    print(f"{o.kills} kills, at log lines {reached}: {same}")
    print(json.dumps(vars(o) | {"reached": reached, "seconds": round(time.time() - begun)}))


if __name__ == "__main__":
    main()
