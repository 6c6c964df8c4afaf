"""Guards a refactor: does the working tree train, bit for bit, as another revision did?

    python bench/same.py HEAD~1                     # a minute; exit status 1 where anything differs
    python bench/same.py HEAD~9 --then "--rank 16"  # where that revision needs other options

Both train six steps of pictures and six of clips. Compared are every tensor of the adapter and of
the checkpoint, every line of the log but its seconds, and every pixel of the sample sheets.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image, ImageSequence
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMON = '--base tiny --steps 6 --every 3 --seed 5 --dtype fp32 --instr "make it winter"'
RUNS = {"pictures": "--data tiny/examples --batch 8", "clips": "--data tiny/clips --batch 2"}


def train(root: pathlib.Path, options: str, out: pathlib.Path) -> None:
    command = f"{sys.executable} train.py {COMMON} {options} --out {out}"
    done = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"same.py: {command} failed in {root}: {done.stderr.strip()[-600:]}")


def frames(path: pathlib.Path) -> list[np.ndarray]:
    with Image.open(path) as img:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(img)]


def contents(out: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything that a run wrote and that must not change, by name."""
    found = {}
    for name in ("adapter", "checkpoint"):
        for key, tensor in load_file(out / f"{name}.safetensors").items():
            found[f"{name}: {key}"] = tensor
    for line in map(json.loads, (out / "log.jsonl").read_text("utf-8").splitlines()):
        for key in line.keys() - {"seconds"}:
            found[f"log, step {line['step']}: {key}"] = np.asarray(line[key])
    for path in sorted((out / "samples").iterdir()):
        for i, frame in enumerate(frames(path)):
            found[f"{path.name}, frame {i}"] = frame
    return found


def compare(name: str, then: pathlib.Path, now: pathlib.Path, left_out: str) -> int:
    """-> how many things differ"""
    a, b = contents(then), contents(now)
    if left_out:
        a = {key: value for key, value in a.items() if left_out not in key}
    odd = sorted(a.keys() ^ b.keys())
    for key in a.keys() & b.keys():
        if not np.array_equal(a[key], b[key], equal_nan=True):
            odd.append(key)
    text = f"{name}: {len(a)} tensors, figures and pictures, {len(odd)} differ"
    print(text, ", ".join(odd[:3]))
    return len(odd)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("revision", help="of git, to compare the working tree with")
    p.add_argument("--then", default="", help="further options of that revision's train.py")
    p.add_argument("--now", default="", help="further options of today's train.py")
    p.add_argument("--only", choices=RUNS, help="pictures or clips alone")
    p.add_argument("--left-out", default="", help="names that contain this need not be there today")
    o = p.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as tmp:
        old = pathlib.Path(tmp, "revision")
        subprocess.run(["git", "worktree", "add", "-q", old, o.revision], cwd=ROOT, check=True)
        try:
            for name in [o.only] if o.only else RUNS:
                then, now = pathlib.Path(tmp, f"{name}-then"), pathlib.Path(tmp, f"{name}-now")
                train(old, f"{RUNS[name]} {o.then}", then)
                train(ROOT, f"{RUNS[name]} {o.now}", now)
                different += compare(name, then, now, o.left_out)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
