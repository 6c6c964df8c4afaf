"""The edits of the general editor: what is asked of which scene, in which words, and what is kept back to test it.

    python tiny/edits.py world/ --n 4000 --seed 1            # unpaired pictures with tuples.jsonl, each with one random edit

Pictures of the results are never written: training stays without pairs.
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

# How often each kind of edit is drawn (of the weathers, half of those but snowfall are drawn again), and what is kept from training to see
# whether the editor understands words: two values that it is never asked for (as instruction or undo), one style that is never a source.
EDITS = {"season": 0.2, "time": 0.2, "weather": 0.32, "house": 0.2, "style": 0.04, "trees": 0.04}
FALLING = ("rain", "snowfall")  # they begin at random places
NEVER = {"season": "autumn", "house": "purple"}
UNSEEN_STYLE = "blueprint"


def change(scene: scenes.Scene, kind: str, value, seed: int = 0) -> scenes.Scene:
    """The exact counterfactual; new trees stand where a random scene with that house would have them."""
    if kind != "trees":
        return dataclasses.replace(scene, **{kind: value})
    number, word = value
    rng = np.random.default_rng((int(100 * scene.place[0]), seed))
    left, _, width, _ = scene.place  # sample_scene kept them from another house
    while len((other := scenes.sample_scene(rng)).trees) != number or any(
        left - 4 < x < left + width + 4 for x, _, _ in other.trees
    ):
        pass
    return dataclasses.replace(scene, trees=other.trees, kind=word)


def propose(scene: scenes.Scene, kind: str, rng: np.random.Generator):
    """A random value for `kind` that the scene does not have, or None where neither edit nor undo may be met in training."""
    if kind == "trees":
        return (0, scene.kind) if scene.trees else (int(rng.integers(1, 4)), scene.kind)
    now = getattr(scene, kind)
    options = [v for v in scenes.ATTRIBUTES[kind] if v not in (now, NEVER.get(kind))]
    return None if now == NEVER.get(kind) else str(rng.choice(options))


def edit_prompts(
    scene: scenes.Scene, kind: str, value, rng: np.random.Generator, wordings: slice = scenes.ANY
) -> dict[str, str]:
    """-> dict of src, tgt, instr, undo. Both captions are in the same words but for what the edit changes."""
    now = (len(scene.trees), scene.kind) if kind == "trees" else getattr(scene, kind)
    instr, undo = (
        scenes.instruction(kind, value, rng, wordings),
        scenes.instruction(kind, now, rng, wordings),
    )
    seed = rng.integers(2**31)
    src, tgt = (
        scenes.caption(s, np.random.default_rng(seed), drop=0.0)
        for s in (scene, change(scene, kind, value))
    )
    if kind in ("weather", "style"):  # these may go unsaid, so the two captions need not be alike
        tgt = derive(instr, src)[0]
    return {"src": src, "tgt": tgt, "instr": instr, "undo": undo}


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("out", help="folder to fill")
    p.add_argument("--n", type=int, default=4000)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument(
        "--snow",
        type=float,
        default=0.0,
        help="share of the edits that are snowfall beside those that are so by chance",
    )
    p.add_argument(
        "--night",
        type=float,
        default=0.0,
        help="share of the edits that are night after sunset beside those that are so by chance",
    )
    o = p.parse_args()
    rng, out, lines = np.random.default_rng((o.seed, 2)), pathlib.Path(o.out), []
    out.mkdir(parents=True, exist_ok=True)
    styles = [s for s in scenes.ATTRIBUTES["style"] if s != UNSEEN_STYLE]
    while len(lines) < o.n:
        scene = scenes.sample_scene(rng, style=str(rng.choice(styles, p=(0.7, 0.15, 0.15))))
        kind = str(rng.choice(list(EDITS), p=list(EDITS.values())))
        value = propose(scene, kind, rng)
        if o.snow and rng.random() < o.snow:
            kind, value = "weather", "snowfall" if scene.weather != "snowfall" else None
        if o.night and rng.random() < o.night:
            kind, value = "time", "night" if scene.time == "sunset" else None
        if kind == "weather" and value != "snowfall" and rng.random() < 0.5:
            continue  # snowfall is the hardest to learn: twice as often as the other weathers
        if value is not None:
            name = f"{len(lines):05d}.png"
            Image.fromarray(scenes.render(scene)).save(out / name)
            anywhere = (
                value in FALLING or value == "night" and scene.time == "sunset"
            )  # stars, and the moon, which is not where the sun was
            lines.append(
                json.dumps(
                    {"file_name": name, "own_noise": anywhere}
                    | edit_prompts(scene, kind, value, rng, scenes.SEEN)
                )
            )
    (out / "tuples.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
