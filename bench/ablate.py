"""What each part of the method does: the paper's Table 4 on the embedded base, and more.

    python bench/ablate.py ablation           # half an hour on two cores; goes on where it stopped
    python bench/ablate.py choices            # what the recipe has beyond the paper
    python bench/ablate.py routing            # rows that another table has are not run again
    python bench/ablate.py steps

Every row is the README's own run ("make it winter") with one thing changed, judged as in
bench/evaluate.py on the same held-out scenes. The paper's figures are marks out of 10 by a language
model, from about 60 samples; ours are measured, so only the directions can be compared. Writes
bench/results/<table>.md, and ablation.png; every run is kept in bench/results/runs.json as it ends,
until the recipe's numbers change.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import time
import zlib

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from picture import headed  # noqa: E402

from files.disk import write  # noqa: E402
from files.pictures import write_image  # noqa: E402
from train import RECIPES  # noqa: E402

RESULTS = ROOT / "bench" / "results"
WORK = ROOT / "bench" / "work"
RECIPE = zlib.crc32(repr(RECIPES["default"]).encode())  # runs of other numbers are not comparable
FIGURES = ("success", "preservation_db", "psnr_truth_db", "wrong")  # kept of evaluate.py's

# Of each row what is changed: options of train.py, or numbers of the recipe that have none.
TABLES = {
    "ablation": {
        "full": "",
        "without routing": "--routing onestep",
        "without cycle": "--cycle 0",
        "without bootstrapping": "--no-bootstrap",
        "without the cue": "--prior 0",
        "the paper's cosine": "--cue cosine --prior 0.15",
    },
    "choices": {
        "the recipe": "",
        "AdamW": {"muon": False, "lr": 4e-3},
        "the cue under the state's noise": "--cue delta-own",
        "the cue without guidance": "--guidance 1",
    },
    "routing": {
        "straight-through": "",
        "one-step": "--routing onestep",
        "detach": "--routing detach",
        "backprop": "--routing backprop",
    },
    "steps": {f"{n} steps": f"--steps {n}" for n in (40, 80, 160, 200)},
}
PAPER = {  # success / preservation
    "full": "8.3 / 7.6",
    "without routing": "8.9 / 7.2",
    "without cycle": "9.0 / 7.2",
    "without bootstrapping": "5.5 / 7.1",
    "without the cue": "0.6 / 9.8",
}
TRAIN = '--data tiny/examples --base tiny --dtype fp32 --every 1000 --instr "make it winter"'
PATCHED = """import dataclasses, train
train.RECIPES["default"] = dataclasses.replace(train.RECIPES["default"], **{patch})
train.main()"""

TILE = 3  # enlargement of the picture's tiles
SCENES = 2  # held-back pictures shown, the brightest


# ---- runs ---------------------------------------------------------------------------------------
def as_text(change):
    """An entry of TABLES, as the table shows it."""
    if isinstance(change, str):
        return change
    return ", ".join(f"{name} = {value}" for name, value in change.items())


def name_of(change, seed, o):
    """The name of a training, which is the same in every table."""
    text = as_text(change)
    if "--steps" not in text:
        text = f"{text} --steps {o.steps}".strip()
    return f"{text} --seed {seed}"


def key_of(change, seed, o):
    """The name of a training and its examination in runs.json."""
    return f"{name_of(change, seed, o)} / {o.n} scenes of seed {o.scenes}"


def folder(change, seed, o):
    """Where a training goes on, were it stopped."""
    return WORK / f"run-{zlib.crc32(f'{RECIPE} {name_of(change, seed, o)}'.encode()):08x}"


def read_runs(file):
    """The finished runs of today's recipe. -> {key: figures}"""
    runs = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {key: figures for key, figures in runs.items() if figures.get("recipe") == RECIPE}


def call(*args):
    """A Python command, in the project's folder. -> what it prints"""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ablate.py: {command} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def train(change, seed, o):
    """One training, from where it was stopped. -> its folder"""
    out = folder(change, seed, o)
    args = [*shlex.split(TRAIN), "--steps", o.steps, "--seed", seed, "--out", out]
    if (out / "checkpoint.safetensors").exists():
        args.append("--resume")
    if isinstance(change, str):
        call("train.py", *args, *change.split())  # of two --steps the last counts
    else:
        call("-c", PATCHED.format(patch=change), *args)
    return out


def run(change, seed, o):
    """One training and its examination. -> figures"""
    out = train(change, seed, o)
    judged = call("bench/evaluate.py", "--run", out, "--n", o.n, "--seed", o.scenes)
    figures = json.loads(judged.strip().splitlines()[-1])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    moments = [0.0, *(line["seconds"] for line in log)]
    spent = sum(max(0, b - a) for a, b in zip(moments, moments[1:]))  # a resumed run begins at 0
    made = json.loads((out / "config.json").read_text("utf-8"))["made"]
    return {name: figures[name] for name in FIGURES} | {
        "seconds": round(spent),
        "commit": made["commit"],
        "machine": made["machine"],
        "date": time.strftime("%Y-%m-%d"),
        "recipe": RECIPE,
    }


# ---- what is written ----------------------------------------------------------------------------
def in_unit(values, unit):
    """The mean, and the lowest to the highest where there are several."""
    text = f"{np.mean(values):.1f} {unit}"
    if len(values) > 1:
        text += f" ({min(values):.1f} to {max(values):.1f})"
    return text


def success_of(runs, n):
    """The success with its standard error: of the seeds or, where that is larger, of the edits."""
    rates = [100 * r["success"] for r in runs]
    mean = np.mean(rates)
    among = np.std(rates, ddof=1) if len(runs) > 1 else 0.0
    error = max(among, (mean * (100 - mean) / n) ** 0.5) / len(runs) ** 0.5
    return f"{in_unit(rates, '%')} ± {error:.1f}"


def line_of(name, change, runs, o):
    """The cells of a row."""
    wrong = {}
    for r in runs:
        for kind, count in r["wrong"].items():
            wrong[kind] = wrong.get(kind, 0) + count
    ordered = sorted(wrong.items(), key=lambda item: -item[1])
    cells = [
        name,
        f"`{as_text(change)}`" if change else "",
        success_of(runs, o.n),
        in_unit([r["preservation_db"] for r in runs], "dB"),
        in_unit([r["psnr_truth_db"] for r in runs], "dB"),
        ", ".join(f"{kind} {count}" for kind, count in ordered) or "nothing",
        str(len(runs)),
    ]
    if o.table == "ablation":
        cells.append(PAPER.get(name, ""))
    return cells


def table(rows, done, o):
    """rows: {name: (change, keys of its runs)} -> Markdown"""
    command = (
        f"python bench/ablate.py {o.table} --seeds {o.seeds} --steps {o.steps} "
        f"--n {o.n} --scenes {o.scenes}"
    )
    about = (
        f'"make it winter", {o.n} held-out scenes. Success with its standard error: of the edits '
        "or, where that is larger, of the training seeds."
    )
    if o.seeds > 1:
        about += " In brackets the lowest and the highest of the seeds."
    heads = "run changed success preservation truth misclassified seeds".split()
    if o.table == "ablation":
        heads.append("the paper")
    lines = [heads, ["---"] * len(heads)]
    made = set()
    for name, (change, keys) in rows.items():
        runs = [done[key] for key in keys if key in done]
        if runs:
            lines.append(line_of(name, change, runs, o))
        made |= {f"{r['commit']} on {r['date']}, {r['machine']}" for r in runs}
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"`{command}`\n\n{about}\n\n{text}\n\nMade by commit {'; '.join(sorted(made))}.\n"


def tiles_of(out):
    """A run's last sample sheet. -> (rows, 3, 64, 64, 3): source, edit, edit undone"""
    sheet = np.asarray(Image.open(out / "samples" / "latest.png").convert("RGB"))
    zoom = sheet.shape[1] // (3 * 72)
    sheet = sheet[::zoom, ::zoom]  # tiles of 64 pixels, each with a border of 4
    tiles = sheet.reshape(-1, 72, 3, 72, 3).swapaxes(1, 2)
    return tiles[:, :, 4:-4, 4:-4]


def picture(outs):
    """The edits of two bright scenes, each with the edit undone below. outs: {name: run folder}"""
    tiles = {name: tiles_of(out) for name, out in outs.items()}
    sources = next(iter(tiles.values()))[:, 0]  # the same in every run
    bright = np.argsort(-sources.mean((1, 2, 3)))[:SCENES]
    columns = {"source": [sources[i] for i in bright for _ in range(2)]}
    for name, run_tiles in tiles.items():
        columns[name] = [run_tiles[i, state] for i in bright for state in (1, 2)]
    return headed(columns, 64 * TILE)


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("table", choices=TABLES)
    p.add_argument("--seeds", type=int, default=1, help="training seeds (1)")
    p.add_argument("--steps", type=int, default=200, help="optimizer steps of every run (200)")
    p.add_argument("--n", type=int, default=200, help="held-out scenes (200)")
    p.add_argument("--scenes", type=int, default=909, help="seed of the scenes (909)")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder (bench/results)")
    return p.parse_args()


def main():
    o = options()
    file = o.out / "runs.json"
    done = read_runs(file)
    rows = {}
    for name, change in TABLES[o.table].items():
        rows[name] = change, [key_of(change, seed, o) for seed in range(o.seeds)]
    for seed in range(o.seeds):
        for name, (change, keys) in rows.items():
            key = keys[seed]
            if key not in done:
                figures = run(change, seed, o)
                print(f"{name}, seed {seed}: {figures}", flush=True)
                done = read_runs(file) | done | {key: figures}  # another table may have written
                write(file, json.dumps(done, indent=1) + "\n")
            write(o.out / f"{o.table}.md", table(rows, done, o))
    outs = {name: folder(change, 0, o) for name, (change, _) in rows.items()}
    here = [out for out in outs.values() if (out / "samples" / "latest.png").exists()]
    if o.table == "ablation" and len(here) == len(outs):
        write_image(o.out / "ablation.png", picture(outs))
    rates = {name: [done[key]["success"] for key in keys] for name, (_, keys) in rows.items()}
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
