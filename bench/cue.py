"""What the teacher's cue alone knows: an edit without any training, by following the cue.

    python bench/cue.py --n 96 --seed 2024
    python bench/cue.py --instr "make it night"

`follow` is where a training that follows the delta cue to the letter would end, and a cheap way to
compare cues. It needs both captions, and three passes of the base at every node for each draw; a
trained editor needs neither. Judged as in bench/evaluate.py, a line for each guidance, which fades
as in training. The last line is one JSON object.
"""

import argparse
import json

import numpy as np
import torch
from evaluate import asked, held_out, judge_all, of_each, scenes, summary  # sets the path, so first

from data import derive
from frozen.load import load_base
from frozen.vae import to_images, to_pixels
from losses import fade, teacher
from routing import time_grid


@torch.no_grad()
def follow(model, x, src, tgt, null, guidance, ts, generator, draws=2):
    """Begins as the source and takes, at each node of ts, the change that the delta cue asks for:
    d = v_tgt(y') - v_src(x'), as FlowEdit does (arXiv 2412.08629). It is asked for under fresh
    noise, as the mean over `draws` noises, each second the negative of the one before, so that
    what is odd in the noise cancels. Prompts are for every sample of x. x (B, C, H, W) -> the edit
    """
    y, eps = x, None
    for t, t_next in zip(ts, ts[1:]):
        times = t.repeat(len(x))
        w = fade(guidance, times)
        changes = []
        for draw in range(draws):
            eps = -eps if draw % 2 else torch.randn(x.shape, generator=generator)
            x_t = torch.lerp(x, eps, t)
            y_t = y + x_t - x  # of a straight path from eps to y
            v_src, v_tgt, v_null = teacher(model, times, (x_t, src), (y_t, tgt), (y_t, null))
            changes.append(v_null + w * (v_tgt - v_null) - v_src)
        change = torch.stack(changes).mean(0)
        # There the base sees how light a picture is, not where things stand: 93 % succeed with the
        # mean over the picture, 85 % without ("make it winter", 96 scenes of seed 2024).
        if t > 0.9:
            change = change.mean((2, 3), keepdim=True)
        y = y - (t - t_next) * change
    return y


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--instr", default="make it winter", help="the edit (make it winter)")
    p.add_argument("--n", type=int, default=96, help="scenes (96)")
    p.add_argument("--seed", type=int, default=2024, help="of the scenes and of the noise (2024)")
    p.add_argument("--steps", type=int, default=8, help="nodes of the whole way (8)")
    p.add_argument("--draws", type=int, default=2, help="noises that a change is the mean of (2)")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="(1 2 3)")
    return p.parse_args()


def main():
    o = options()
    model, vae, text, shift = load_base("tiny")
    kind, value = asked(o.instr)
    world = held_out(kind, value, o.n, o.seed)
    rng = np.random.default_rng(o.seed)
    captions = [scenes.caption(s, rng, drop=0.0) for s in world]
    with torch.no_grad():
        x = vae.encode(to_pixels(np.stack([scenes.render(s) for s in world])))
        src = text(captions)
        tgt = text([derive(o.instr, caption)[0] for caption in captions])
        null = [of_each(a, x) for a in text([""])]
    ts = time_grid(o.steps, shift)
    table = {}
    for guidance in o.guidance:
        generator = torch.Generator().manual_seed(o.seed)
        y = follow(model, x, src, tgt, null, guidance, ts, generator, o.draws)
        with torch.no_grad():
            output = to_images(vae.decode(y))
        figures = summary(judge_all(world, [kind] * o.n, [value] * o.n, output))
        table[f"{guidance:g}"] = figures
        print(
            f"guidance {guidance:g}: success {100 * figures['success']:.0f} %, "
            f"preservation {figures['preservation_db'] or np.nan:.1f} dB, "
            f"truth {figures['psnr_truth_db']:.1f} dB, "
            f"misclassified: {figures['wrong'] or 'nothing'}",
            flush=True,
        )
    print(json.dumps({"instr": o.instr, "n": o.n, "seed": o.seed, "rows": table}))


if __name__ == "__main__":
    main()
