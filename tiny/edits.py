"""The edits of the general editor: what is asked of which scene, in which words, and what is kept
back to test it.

    python tiny/edits.py world/ --n 4000 --seed 1

Writes unpaired pictures, and tuples.jsonl with a random edit of each. Pictures of the results are
never written: training stays without pairs.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import scenes  # noqa: E402
from data import derive  # noqa: E402

# How often each kind of edit is drawn; of the weathers all but snowfall are halved again.
EDITS = {"season": 0.2, "time": 0.2, "weather": 0.32, "house": 0.2, "style": 0.04, "trees": 0.04}
FALLING = ("rain", "snowfall")  # they begin at random places

# Kept from training, to see whether the editor understands words: two values that it is never asked
# for, as instruction or undo, and a style that is never a source.
NEVER = {"season": "autumn", "house": "purple"}
UNSEEN_STYLE = "blueprint"
STYLES = {"plain": 0.7, "sketch": 0.15, "pixel": 0.15}  # of the sources


def change(scene: scenes.Scene, kind: str, value, seed: int = 0) -> scenes.Scene:
    """The exact counterfactual; new trees stand where a random scene with that house would have
    them."""
    if kind != "trees":
        return dataclasses.replace(scene, **{kind: value})
    number, word = value
    rng = np.random.default_rng((int(100 * scene.place[0]), seed))
    left, _, width, _ = scene.place
    while True:
        trees = scenes.sample_scene(rng).trees  # kept from that scene's house, not from this one's
        free = all(not left - 4 < x < left + width + 4 for x, _, _ in trees)
        if len(trees) == number and free:
            return dataclasses.replace(scene, trees=trees, kind=word)


def propose(scene: scenes.Scene, kind: str, rng: np.random.Generator):
    """A random value for `kind` that the scene does not have, or None where neither edit nor undo
    may be met in training."""
    if kind == "trees":
        number = 0 if scene.trees else int(rng.integers(1, 4))
        return number, scene.kind
    now = getattr(scene, kind)
    options = [v for v in scenes.ATTRIBUTES[kind] if v not in (now, NEVER.get(kind))]
    if now == NEVER.get(kind):
        return None
    return str(rng.choice(options))


def edit_prompts(
    scene: scenes.Scene, kind: str, value, rng: np.random.Generator, wordings: slice = scenes.ANY
) -> dict[str, str]:
    """-> dict of src, tgt, instr, undo. Both captions are in the same words but for what the edit
    changes."""
    now = (len(scene.trees), scene.kind) if kind == "trees" else getattr(scene, kind)
    instr = scenes.instruction(kind, value, rng, wordings)
    undo = scenes.instruction(kind, now, rng, wordings)
    seed = rng.integers(2**31)
    src, tgt = (
        scenes.caption(s, np.random.default_rng(seed), drop=0.0)
        for s in (scene, change(scene, kind, value))
    )
    if kind in ("weather", "style"):  # these may go unsaid, so the two captions need not be alike
        tgt = derive(instr, src)[0]
    return {"src": src, "tgt": tgt, "instr": instr, "undo": undo}


def draw(rng: np.random.Generator, snow: float, night: float):
    """-> scene, kind, value; None where this is no edit to train on"""
    scene = scenes.sample_scene(rng, style=str(rng.choice(list(STYLES), p=list(STYLES.values()))))
    kind = str(rng.choice(list(EDITS), p=list(EDITS.values())))
    value = propose(scene, kind, rng)
    if snow and rng.random() < snow:
        kind, value = "weather", "snowfall"
        if scene.weather == "snowfall":
            value = None
    if night and rng.random() < night:
        kind, value = "time", "night"
        if scene.time != "sunset":
            value = None
    if kind == "weather" and value != "snowfall" and rng.random() < 0.5:
        return None  # snowfall is the hardest to learn: twice as often as the other weathers
    if value is None:
        return None
    return scene, kind, value


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("out", type=pathlib.Path, help="folder to fill")
    p.add_argument("--n", type=int, default=4000, help="pictures (4000)")
    p.add_argument("--seed", type=int, default=1, help="of scenes and edits (1)")
    share = "share of the edits that are {}, beside those by chance (0)"
    p.add_argument("--snow", type=float, default=0.0, help=share.format("snowfall"))
    p.add_argument("--night", type=float, default=0.0, help=share.format("night after sunset"))
    o = p.parse_args()
    rng = np.random.default_rng((o.seed, 2))
    o.out.mkdir(parents=True, exist_ok=True)
    lines = []
    while len(lines) < o.n:
        drawn = draw(rng, o.snow, o.night)
        if drawn is None:
            continue
        scene, kind, value = drawn
        name = f"{len(lines):05d}.png"
        Image.fromarray(scenes.render(scene)).save(o.out / name)
        line = {"file_name": name} | edit_prompts(scene, kind, value, rng, scenes.SEEN)
        lines.append(json.dumps(line))
    (o.out / "tuples.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
