"""Many files: 10,000 pictures to train on and 1,000 to edit, with long and foreign names, from
folders that one may not write to.

    python bench/load.py --images 10000 --edits 1000      # three minutes on two cores

Runs train.py (one step) and sample.py and follows their memory. Training keeps a latent of every
picture, 8 KiB of each here; besides those, memory must be flat: exit code 1 where it grew by more
than half a GiB in the second half of the way (the training step itself takes 300 MiB). The last
line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "tiny" / "examples"
PARTS = ("ö" * 115, "雪の家", "a" * 245, "with  spaces", "b", ".dots..", "emoji 🏠")  # of names
TRAINING = '--instr "make it winter" --base tiny --steps 1 --batch 4 --n 2'


def fill(folder, n, seed=0):
    """n copies of the example pictures under names of all kinds, with captions; read-only in the
    end."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    captions = {}
    for line in (EXAMPLES / "metadata.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        captions[row["file_name"]] = row["text"]
    examples = sorted(EXAMPLES.glob("*.png"))
    lines = []
    for i in range(n):
        source = examples[i % len(examples)]
        name = f"{i:05d} {PARTS[rng.integers(len(PARTS))]}.png"
        (folder / name).write_bytes(source.read_bytes())
        lines.append(json.dumps({"file_name": name, "text": captions[source.name]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    folder.chmod(0o555)


def mebibytes(pid):
    """What a process has in memory."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def follow(*command):
    """Runs a command of ours. -> [its MiB, every half second]"""
    curve = []
    command = [sys.executable, *map(str, command)]
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err)
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                curve.append(mebibytes(process.pid))
            time.sleep(0.5)
        err.seek(0)
        if process.returncode:
            end = err.read()[-500:]
            sys.exit(f"load.py: {' '.join(command)} ended with {process.returncode}: {end}")
    return curve


def measure(*command):
    """-> dict: seconds, the most MiB, and how many more in the second half than in the first"""
    begun = time.time()
    curve = follow(*command)
    later = curve[len(curve) // 10 : -2] or curve
    half = len(later) // 2
    return {
        "seconds": round(time.time() - begun),
        "most_mib": max(curve),
        "grew_in_second_half_mib": max(later[half:]) - max(later[:half] or later),
    }


def run(work):
    """Trains on work/many, edits work/some. -> {"train": figures, "sample": figures}"""
    many, some, out, edited = (work / name for name in ("many", "some", "out", "edited"))
    figures = {}
    figures["train"] = measure("train.py", "--data", many, "--out", out, *shlex.split(TRAINING))
    print(f"train: {figures['train']}", flush=True)
    files = "--input", some, "--output", edited
    figures["sample"] = measure("sample.py", "--run", out, *files, "--steps", 2)
    print(f"sample: {figures['sample']}", flush=True)
    written = sorted(p.stem for p in edited.iterdir())
    assert written == sorted(p.stem for p in some.glob("*.png")), "an edit is missing"
    assert Image.open(next(edited.iterdir())).size == (64, 64)
    return figures


def main():
    kind = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=kind)
    p.add_argument("--images", type=int, default=10000)
    p.add_argument("--edits", type=int, default=1000)
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        fill(work / "many", o.images)
        fill(work / "some", o.edits)
        try:
            figures = run(work)
        finally:
            for name in ("many", "some"):
                (work / name).chmod(0o755)
    print(json.dumps({"images": o.images, "edits": o.edits} | figures))
    return any(f["grew_in_second_half_mib"] > 512 for f in figures.values())


if __name__ == "__main__":
    sys.exit(main())
