"""Quality of an editor where the truth is known: held-out scenes of the embedded world, edited, judged by the renderer.

    python bench/evaluate.py --run out --n 200 --seed 1000

success         of all 960 attribute combinations drawn for that very geometry, the nearest to the output is the wished-for one
preservation_db PSNR to the source over the pixels where source and truth agree
psnr_truth_db   PSNR to the truth over all pixels
The last line is one JSON object; out/evaluate.png shows source, edit, truth of the first scenes and of the worst failures.
"""
import argparse
import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import sys

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import data  # noqa: E402
import scenes  # noqa: E402
from frozen.vae import to_images, to_pixels  # noqa: E402
from model import UserError, load_adapter, load_base, read_json  # noqa: E402
from routing import time_grid  # noqa: E402
from sample import edit  # noqa: E402


def asked(instr):
    """What an instruction asks of the world: "make it winter" -> ("season", "winter")."""
    for kind, family in zip(scenes.ATTRIBUTES, data.FAMILIES):
        for value, (_, words) in family.items():
            if value in scenes.ATTRIBUTES[kind] and data._find(words, instr):
                return kind, value
    raise UserError(f"'{instr}' names no season, time, weather, house colour or style of the embedded world", 2)


def psnr(a, b, mask=None):
    error = (a.astype(np.float32) - b) ** 2
    error = error.mean() if mask is None else error[mask].mean() if mask.any() else 0.
    return float(10 * np.log10(255 ** 2 / max(error, 1e-2)))


def measure(scene, kind, value, output):
    """One edit against its exact truth. -> dict"""
    wish = dataclasses.replace(scene, **{kind: value})
    source, truth = scenes.render(scene), scenes.render(wish)
    read = scenes.judge(wish, output[None])[0]
    wrong = [k for k in scenes.ATTRIBUTES if read[k] != getattr(wish, k)]
    same = np.abs(source.astype(int) - truth).max(-1) <= 2
    return {"success": not wrong, "wrong": wrong, "preservation_db": psnr(output, source, same), "psnr_truth_db": psnr(output, truth)}


def held_out(kind, value, n, seed):
    """n random scenes that are not yet as the edit wants them."""
    rng, world = np.random.default_rng((seed, 1)), []
    while len(world) < n:
        scene = scenes.sample_scene(rng, style="plain")
        if getattr(scene, kind) != value:
            world.append(scene)
    return world


def judge_all(world, kind, value, output):
    """-> mean figures, how often each attribute was read wrongly, results per scene"""
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        results = list(pool.map(measure, world, [kind] * len(world), [value] * len(world), output, chunksize=4))
    figures = {k: round(float(np.mean([r[k] for r in results])), 4) for k in ("success", "preservation_db", "psnr_truth_db")}
    return figures, dict(collections.Counter(k for r in results for k in r["wrong"])), results


@torch.no_grad()
def edit_all(model, vae, adapter, images, prompt, shift, steps, seed):
    out, noise = [], torch.Generator().manual_seed(seed)
    for i in range(0, len(images), 25):
        x = vae.encode(to_pixels(np.stack(images[i:i + 25])))
        eps = torch.randn(x.shape, generator=noise)
        p = tuple(a.expand(len(x), *a.shape[1:]) for a in prompt)
        out.append(to_images(vae.decode(edit(model, adapter, x, p, eps, time_grid(steps, shift)))))
    return np.concatenate(out)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--run", default="out")
    p.add_argument("--instr", help="default: the run's own")
    p.add_argument("--n", type=int, default=200, help="scenes")
    p.add_argument("--seed", type=int, default=1000, help="of the scenes and of the noise")
    p.add_argument("--steps", type=int, default=20, help="Euler steps of the edit")
    o = p.parse_args()
    run = pathlib.Path(o.run)
    if not (run / "adapter.safetensors").exists():
        raise UserError(f"{run} holds no trained adapter; train one with train.py first", 2)
    config = read_json(run / "config.json")
    instr = o.instr or config["instruction"]
    kind, value = asked(instr)
    model, vae, text, shift = load_base(config["base"])
    adapter = load_adapter(run / "adapter.safetensors", model)[0]
    world = held_out(kind, value, o.n, o.seed)
    images = [scenes.render(s) for s in world]
    with torch.no_grad():
        output = edit_all(model, vae, adapter, images, text([instr]), shift, o.steps, o.seed)
    figures, wrong, results = judge_all(world, kind, value, output)
    failed = [i for i in np.argsort([r["psnr_truth_db"] for r in results]) if not results[i]["success"]]
    shown = [*range(min(8, o.n)), *failed[:8]]
    truth = [scenes.render(dataclasses.replace(world[i], **{kind: value})) for i in shown]
    scenes.sheet([[images[i] for i in shown], [output[i] for i in shown], truth]).save(run / "evaluate.png")
    print(f"{o.n} held-out scenes, \"{instr}\": read wrongly: {wrong or 'nothing'}; picture: {run / 'evaluate.png'} "
          "(source, edit, truth; eight first scenes, then the worst failures)")
    print(json.dumps(figures | {"n": o.n, "seed": o.seed, "kinds": {kind: figures}}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(error.code)
