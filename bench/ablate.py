"""What each part of the method does: the paper's Table 4 on the embedded base, and the routings compared.

    python bench/ablate.py --seeds 3 --steps 160         # some three hours on two cores; goes on where it was stopped

Every row is the README's own run ("make it winter", shortened) with one part taken out, for several training seeds, judged as in
bench/evaluate.py on the same held-out scenes. The paper's figures are marks out of 10 by a language model (about 60 samples), ours
are measured; only the directions can be compared. Writes bench/results/ablate.json, .md and .png.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
VARIANTS = {                                            # what is changed, and the paper's success and preservation
    "full": ([], "8.3 / 7.6"),
    "without routing (the cycle sees the one-step prediction)": (["--routing", "onestep"], "8.9 / 7.2"),
    "without cycle": (["--cycle", "0"], "9.0 / 7.2"),
    "without direction (the anchor alone)": (["--cue", "anchor"], "8.4 / 7.2"),
    "without bootstrapping (noised source)": (["--no-bootstrap"], "5.5 / 7.1"),
    "without prior (no teacher cue)": (["--prior", "0"], "0.6 / 9.8"),
    "without random identity": (["--identity-share", "0"], "8.4 / 7.5"),
    "routing: detach": (["--routing", "detach"], "-"),
    "routing: backprop through the rollout": (["--routing", "backprop"], "-"),
    "the paper's cosine cue": (["--cue", "cosine"], "-"),
}


def call(*args):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ablate.py: {' '.join(map(str, args))} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def folder(o, name, seed):
    return ROOT / "bench" / "work" / f"ablate-{o.steps}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{seed}"


def table(done, seeds, command):
    lines = [f"`{command}`", "", "Mean over training seeds (lowest to highest).", "",
             "| run | success | preservation | truth | seconds | the paper's success / preservation |", "|---|---|---|---|---|---|"]
    for name, (_, paper) in VARIANTS.items():
        runs = [done[k] for k in (f"{name} {s}" for s in range(seeds)) if k in done]
        if runs:
            cell = lambda key, scale, unit: "{:.1f}{u} ({:.1f} to {:.1f})".format(          # noqa: E731
                *(scale * f([r[key] for r in runs]) for f in (np.mean, min, max)), u=unit)
            lines.append(f"| {name} | {cell('success', 100, ' %')} | {cell('preservation_db', 1, ' dB')} | {cell('psnr_truth_db', 1, ' dB')} | "
                         f"{np.mean([r['seconds'] for r in runs]):.0f} | {paper} |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--seeds", type=int, default=3, help="training seeds")
    p.add_argument("--steps", type=int, default=160, help="optimizer steps of every run")
    p.add_argument("--n", type=int, default=100, help="held-out scenes")
    p.add_argument("--scenes", type=int, default=909, help="seed of the scenes")
    o = p.parse_args()
    RESULTS.mkdir(exist_ok=True)
    command, file = f"python bench/ablate.py --seeds {o.seeds} --steps {o.steps} --n {o.n} --scenes {o.scenes}", RESULTS / "ablate.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    done = old["runs"] if old.get("command") == command else {}
    for seed in range(o.seeds):
        for name, (flags, _) in VARIANTS.items():
            key, run = f"{name} {seed}", folder(o, name, seed)
            if key in done:
                continue
            resume = ["--resume"] if (run / "checkpoint.safetensors").exists() else []
            call("train.py", "--data", "tiny/examples", "--instr", "make it winter", "--base", "tiny", "--steps", o.steps, "--every", o.steps,
                 "--seed", seed, "--out", run, *flags, *resume)
            figures = json.loads(call("bench/evaluate.py", "--run", run, "--n", o.n, "--seed", o.scenes).strip().splitlines()[-1])
            log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            done[key] = {k: figures[k] for k in ("success", "preservation_db", "psnr_truth_db", "wrong")} | {
                "seconds": round(log[0]["seconds"] + sum(max(0, b["seconds"] - a["seconds"]) for a, b in zip(log, log[1:])))}
            file.write_text(json.dumps({"command": command, "runs": done}, indent=1) + "\n")
            (RESULTS / "ablate.md").write_text(table(done, o.seeds, command))
            print(f"{key}: {done[key]}", flush=True)
    strips = [Image.open(f) for name in VARIANTS if (f := folder(o, name, 0) / "samples" / "latest.png").exists()]
    if strips:                                          # source, edit, edit undone of the held-back images, a block for each row of the table
        page = Image.new("RGB", (sum(s.width + 8 for s in strips), strips[0].height), "white")
        for i, s in enumerate(strips):
            page.paste(s, (i * (s.width + 8), 0))
        page.save(RESULTS / "ablate.png")
    print(json.dumps({k: v["success"] for k, v in done.items()}))


if __name__ == "__main__":
    main()
