"""Many files: 10,000 pictures to train on, 1,000 to edit, with long and foreign names, from a folder one may not write to.

    python bench/load.py --images 10000 --edits 1000          # three minutes on two cores

Runs train.py (one step) and sample.py and follows their memory. Training keeps a latent of every picture, 8 KiB of each here; besides
those, memory must be flat: exit code 1 where it grew by more than half a GiB in the second half of the way (the training step itself takes
300 MiB). The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent


def fill(folder, n, seed=0):
    """n copies of the example pictures under names of all kinds, with captions; read-only in the end."""
    folder.mkdir()
    examples, rng, lines = (
        sorted((ROOT / "tiny" / "examples").glob("*.png")),
        np.random.default_rng(seed),
        [],
    )
    captions = {
        r["file_name"]: r["text"]
        for r in map(json.loads, (ROOT / "tiny/examples/metadata.jsonl").read_text().splitlines())
    }
    for i in range(n):
        source = examples[i % len(examples)]
        name = f"{i:05d} {('ö' * 115, '雪の家', 'a' * 245, 'with  spaces', 'b', '.dots..', 'emoji 🏠')[rng.integers(7)]}.png"
        (folder / name).write_bytes(source.read_bytes())
        lines.append(json.dumps({"file_name": name, "text": captions[source.name]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    folder.chmod(0o555)


def follow(*command):
    """Runs it. -> [its MiB, every half second]"""
    with tempfile.TemporaryFile("w+") as err:
        process, curve = (
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=err,
            ),
            [],
        )
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                curve.append(
                    int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                    * os.sysconf("SC_PAGE_SIZE")
                    >> 20
                )
            time.sleep(0.5)
        err.seek(0)
        if process.returncode:
            sys.exit(
                f"load.py: {' '.join(map(str, command))} ended with {process.returncode}: {err.read()[-500:]}"
            )
    return curve


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--images", type=int, default=10000)
    p.add_argument("--edits", type=int, default=1000)
    o = p.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for name, n in (("many", o.images), ("some", o.edits)):
            fill(work / name, n)
        try:
            for name, command in (
                (
                    "train",
                    [
                        "train.py",
                        "--data",
                        work / "many",
                        "--instr",
                        "make it winter",
                        "--base",
                        "tiny",
                        "--steps",
                        1,
                        "--batch",
                        4,
                        "--views",
                        1,
                        "--n",
                        2,
                        "--out",
                        work / "out",
                    ],
                ),
                (
                    "sample",
                    [
                        "sample.py",
                        "--run",
                        work / "out",
                        "--input",
                        work / "some",
                        "--output",
                        work / "edited",
                        "--steps",
                        2,
                    ],
                ),
            ):
                begun, curve = time.time(), follow(*command)
                later = curve[len(curve) // 10 : -2] or curve
                figures[name] = {
                    "seconds": round(time.time() - begun),
                    "most_mib": max(curve),
                    "grew_in_second_half_mib": max(later[len(later) // 2 :])
                    - max(later[: len(later) // 2]),
                }
                print(f"{name}: {figures[name]}", flush=True)
            written = sorted(p.stem for p in (work / "edited").iterdir())
            assert written == sorted(p.stem for p in (work / "some").glob("*.png")), (
                "an edit is missing"
            )
            assert Image.open(next((work / "edited").iterdir())).size == (64, 64)
        finally:
            for name in ("many", "some"):
                (work / name).chmod(0o755)
    print(json.dumps({"images": o.images, "edits": o.edits} | figures))
    return any(f["grew_in_second_half_mib"] > 512 for f in figures.values())


if __name__ == "__main__":
    sys.exit(main())
