"""What the teacher's cue alone knows: an edit without any training, by following the cue from noise to data.

    python bench/cue.py --n 96 --seed 2024
    python bench/cue.py --instr "make it night"

The edit begins as the source and takes the change that the delta cue asks for (losses.py, `follow`): where a training
that followed the cue to the letter would end, and a cheap way to compare cues. Judged as in bench/evaluate.py, a line for each
guidance, constant and fading with noise. The last line is one JSON object.
"""

import argparse
import json
import math

import numpy as np
import torch
from evaluate import (
    asked,
    held_out,
    judge_all,
    scenes,
    summary,
)  # puts the repository on the path, so first

from data import derive  # isort: skip
from frozen.load import load_base  # noqa: E402
from frozen.vae import to_images, to_pixels
from losses import fade, follow
from routing import time_grid


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--instr", default="make it winter")
    p.add_argument("--n", type=int, default=96, help="scenes")
    p.add_argument("--seed", type=int, default=2024, help="of the scenes and of the noise")
    p.add_argument("--steps", type=int, default=12, help="of the whole way")
    p.add_argument("--draws", type=int, default=2, help="noises that the cue is averaged over")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    o = p.parse_args()
    model, vae, text, shift = load_base("tiny")
    kind, value = asked(o.instr)
    world, rng = held_out(kind, value, o.n, o.seed), np.random.default_rng(o.seed)
    captions = [scenes.caption(s, rng, drop=0.0) for s in world]
    with torch.no_grad():
        x = vae.encode(to_pixels(np.stack([scenes.render(s) for s in world])))
        prompts = {
            "src": text(captions),
            "tgt": text([derive(o.instr, c)[0] for c in captions]),
            "null": text([""] * o.n),
        }
    ts, table = time_grid(o.steps, shift), {}
    constant = lambda w: lambda t: torch.full((len(t), 1, 1, 1), w)
    for w in o.guidance:
        for name, guidance in (
            {"constant": constant(w)} | ({"fading": lambda t: fade(w, t)} if w != 1 else {})
        ).items():
            y = follow(
                model, x, prompts, guidance, ts, torch.Generator().manual_seed(o.seed), o.draws
            )
            with torch.no_grad():
                output = to_images(vae.decode(y))
            table[f"{w:g} {name}"] = figures = summary(
                judge_all(world, [kind] * o.n, [value] * o.n, output)
            )
            print(
                f"guidance {w:g} {name:9} success {100 * figures['success']:3.0f} %, "
                f"preservation {figures['preservation_db'] or math.nan:.1f} dB, truth {figures['psnr_truth_db']:.1f} dB, "
                f"read wrongly: {figures['wrong'] or 'nothing'}",
                flush=True,
            )
    print(json.dumps({"instr": o.instr, "n": o.n, "seed": o.seed, "rows": table}))


if __name__ == "__main__":
    main()
