"""What each part of the method does: the paper's Table 4 on the embedded base, routings, sweeps, and quality against steps.

    python bench/ablate.py ablation --seeds 3 --steps 80          # an hour on two cores; goes on where it was stopped
    python bench/ablate.py routing --seeds 3 --steps 80           # rows that another table has are not run again
    python bench/ablate.py sweeps --seeds 1 --steps 80
    python bench/ablate.py steps --seeds 3

Every row is the README's own run ("make it winter", shortened, its phases in proportion, and without imitation, which would do in advance
what the parts are to do) with one thing changed, for several training seeds, judged as in bench/evaluate.py on the same held-out
scenes. The paper's figures are marks out of 10 by a language model (about 60 samples), ours are measured; only the directions can be
compared. Writes bench/results/<table>.md and .png; every run is kept in bench/results/runs.json as it ends.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
import zlib

import numpy as np
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
ABLATION = {  # what is changed, and the paper's success and preservation
    "full": ("", "8.3 / 7.6"),
    "without routing (the cycle sees the one-step prediction)": ("--routing onestep", "8.9 / 7.2"),
    "without cycle": ("--cycle 0", "9.0 / 7.2"),
    "without direction (the anchor alone)": ("--cue anchor", "8.4 / 7.2"),
    "without bootstrapping (noised source)": ("--no-bootstrap", "5.5 / 7.1"),
    "without prior (no teacher cue)": ("--prior 0", "0.6 / 9.8"),
    "without random identity": ("--identity-share 0", "8.4 / 7.5"),
    "with imitation (of followed cues, in the first half of the steps)": ("--imitate .5", ""),
}
TABLES = {
    "ablation": ABLATION,
    "routing": {
        f"routing: {name}": (flags, "")
        for name, flags in (
            ("straight-through", ""),
            ("one-step", "--routing onestep"),
            ("detach", "--routing detach"),
            ("backprop", "--routing backprop"),
        )
    },
    "sweeps": {
        "the recipe": ("", ""),
        "cue under the state's own noise": ("--no-fresh-noise", ""),
        "cosine cue": ("--cue cosine", ""),
        "cosine cue without anchor": ("--cue cosine --alpha 0", ""),
    }
    | {
        f"{name} {value}": (f"--{name} {value}", "")
        for name, values in (
            ("guidance", (1, 5)),
            ("n", (4, 12)),
            ("states", (1, 4)),
            ("ema", (0, 0.8)),
            ("prior", (2, 8)),
            ("cycle", (1, 4)),
        )
        for value in values
    },
    "steps": {f"{n} steps": (f"--steps {n}", "") for n in (40, 80, 160, 300)},
}


def call(*args):
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(
            f"ablate.py: {' '.join(map(str, args))} failed: {done.stderr.strip().splitlines()[-1:]}"
        )
    return done.stdout


def folder(key):
    return ROOT / "bench" / "work" / f"run-{zlib.crc32(key.encode()):08x}"


def run(key, flags, seed, o):
    """One training and its examination. -> figures"""
    out = folder(key)
    resume = ["--resume"] if (out / "checkpoint.safetensors").exists() else []
    call(
        "train.py",
        "--data",
        "tiny/examples",
        "--instr",
        "make it winter",
        "--base",
        "tiny",
        "--dtype",
        "fp32",
        "--every",
        1000,
        "--seed",
        seed,
        "--out",
        out,
        *flags.split(),
        *resume,
    )  # float32: the same on any machine
    judged = call(
        "bench/evaluate.py", "--run", out, "--n", o.n, "--seed", o.scenes, "--steps", 20
    )  # as the committed rows, all of them
    figures = json.loads(judged.strip().splitlines()[-1])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    made = json.loads((out / "config.json").read_text())["made"]
    return {k: figures[k] for k in ("success", "preservation_db", "psnr_truth_db", "wrong")} | {
        "seconds": round(
            log[0]["seconds"]
            + sum(max(0, b["seconds"] - a["seconds"]) for a, b in zip(log, log[1:]))
        ),  # may have been resumed
        "commit": made["commit"],
        "machine": made["machine"],
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows, done, o, command):
    lines = [
        f"`{command}`",
        "",
        f'"make it winter", {o.n} held-out scenes; mean over training seeds (lowest to highest); success with its '
        "standard error: of the seeds or, where that is larger, of all their edits (the scenes are the same for each).",
        "",
        "| run | success | preservation | truth | read wrongly | seconds | seeds |"
        + " the paper |" * (o.table == "ablation"),
        "|---|---|---|---|---|---|---|" + "---|" * (o.table == "ablation"),
    ]
    for name, (keys, paper) in rows.items():
        runs = [done[k] for k in keys if k in done]
        if runs:
            cell = lambda key, unit, scale=1: "{:.1f}{u} ({:.1f} to {:.1f})".format(  # noqa: E731
                *(scale * f([r[key] for r in runs]) for f in (np.mean, min, max)), u=unit
            )
            rates, wrong = [r["success"] for r in runs], {}
            p, among = np.mean(rates), np.std(rates, ddof=1) if len(runs) > 1 else 0.0
            error = max(among, (p * (1 - p) / o.n) ** 0.5) / len(runs) ** 0.5
            for r in runs:
                wrong |= {k: wrong.get(k, 0) + v for k, v in r["wrong"].items()}
            lines.append(
                f"| {name} | {cell('success', ' %', 100)} ± {100 * error:.1f} | "
                f"{cell('preservation_db', ' dB')} | {cell('psnr_truth_db', ' dB')} | "
                f"{', '.join(f'{k} {v}' for k, v in sorted(wrong.items(), key=lambda w: -w[1])) or 'nothing'} | "
                f"{np.mean([r['seconds'] for r in runs]):.0f} | {len(runs)} |"
                + f" {paper} |"
                * (o.table == "ablation")
            )
    made = sorted(
        {
            f"{r['commit']} on {r['date']}, {r['machine']}"
            for keys, _ in rows.values()
            for k in keys
            if (r := done.get(k))
        }
    )
    return "\n".join([*lines, "", "Made by commit " + "; ".join(made) + "."]) + "\n"


def picture(names):
    """Source, edit, edit undone of the first held-back pictures, a block for each row of the table. names: {name: run folder}"""
    blocks = []
    for name, out in names.items():
        strip = Image.open(out / "samples" / "latest.png")
        strip = strip.resize((strip.width // 2, strip.height // 2), Image.Resampling.NEAREST)
        block = Image.new("RGB", (strip.width + 8, 16 + strip.height * 2 // 3), "white")
        block.paste(strip, (0, 16))
        ImageDraw.Draw(block).text((4, 2), name.split(" (")[0], "black")
        blocks.append(np.asarray(block))
    blocks += [np.full_like(blocks[0], 255)] * (
        -len(blocks) % 8 if len(blocks) > 8 else 0
    )  # lines of eight
    return Image.fromarray(
        np.concatenate([np.concatenate(blocks[i : i + 8], 1) for i in range(0, len(blocks), 8)])
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("table", choices=TABLES)
    p.add_argument("--seeds", type=int, default=3, help="training seeds")
    p.add_argument("--steps", type=int, default=80, help="optimizer steps of every run")
    p.add_argument("--n", type=int, default=100, help="held-out scenes")
    p.add_argument("--scenes", type=int, default=909, help="seed of the scenes")
    o = p.parse_args()
    RESULTS.mkdir(exist_ok=True)
    file, rows, todo = RESULTS / "runs.json", {}, []
    done = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(o.seeds):
        for name, (flags, paper) in TABLES[o.table].items():
            steps = int(flags.split()[1]) if flags.startswith("--steps") else o.steps
            flags = (
                f"--steps {steps} --identity-first {steps // 30} --warmup {steps // 15} --imitate 0 "
                + flags.removeprefix(f"--steps {steps}")
            )
            key = f"{flags.strip()} --seed {seed} / {o.n} scenes of seed {o.scenes}"
            rows.setdefault(name, ([], paper))[0].append(key)
            todo.append((name, key, flags, seed))
    for name, key, flags, seed in todo:
        if key not in done:
            done[key] = run(key, flags, seed, o)
            file.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{name}, seed {seed}: {done[key]}", flush=True)
        command = f"python bench/ablate.py {o.table} --seeds {o.seeds} --steps {o.steps} --n {o.n} --scenes {o.scenes}"
        (RESULTS / f"{o.table}.md").write_text(table(rows, done, o, command))
    here = lambda keys: {
        name: folder(k)
        for name, k in zip(rows, keys)  # noqa: E731
        if k in done and (folder(k) / "samples" / "latest.png").exists()
    }
    if len(blocks := max(map(here, zip(*(keys for keys, _ in rows.values()))), key=len)) == len(
        rows
    ):  # of a seed of which all runs are here
        picture(blocks).save(RESULTS / f"{o.table}.png")
    print(
        json.dumps({name: [done[k]["success"] for k in keys] for name, (keys, _) in rows.items()})
    )


if __name__ == "__main__":
    main()
