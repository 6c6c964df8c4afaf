"""Edits pictures and clips with a trained adapter, or draws from a base.

python sample.py                                            # what the last run held back
python sample.py --input photo.jpg --instr "make it winter" --output x.png
python sample.py --input folder/ --output edited/
python sample.py --input clip.mp4 --output edited.mp4       # or .webp, .gif, a folder of frames
python sample.py --base tiny --prompt "a red house in winter" --output house.png
"""

import argparse
import math
import os
import pathlib
import sys
from dataclasses import dataclass

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is imported, as in train.py

import numpy as np
import torch
from torch import Tensor

from files.clips import edit_clip, write_sheets
from files.disk import UserError, note
from files.folder import free_name, jobs, load_rows
from files.options import need_positive, pixels
from files.pictures import crop, load_image, pad, write_image
from files.ranks import guard
from files.run import find_run, load_adapter, read_run
from frozen import machine
from frozen.load import edit_grid, edit_size
from frozen.text import Text
from frozen.vae import VAE, to_images, to_pixels
from model import WIDE, Adapter, MMDiT, Prompt, merged
from routing import Velocity, editor, integrate, noise, time_grid


def guided(v: Velocity, v_null: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance: v_null + guidance (v - v_null), where v_null is without words."""

    def velocity(y, t):
        nothing = v_null(y, t)
        return nothing + guidance * (v(y, t) - nothing)

    return velocity


def base(model: MMDiT, prompt: Prompt) -> Velocity:
    """The frozen base under a caption, as a velocity to integrate."""
    return lambda y, t: model(y, t, prompt).float()


def edit(model, adapter, x, prompt, eps, ts, frames=1, null=None, guidance=1.0) -> Tensor:
    """The edit of the sources x (B, C, H, W), every `frames` of them a clip, as in training's
    rollout; adapter also `merged`. Guidance (1: none) needs null, no words. -> (B, C, H, W)"""
    velocity = editor(model, adapter, prompt, x, frames)
    if guidance != 1:
        velocity = guided(velocity, editor(model, adapter, null, x, frames), guidance)
    *_, y = integrate(velocity, eps, ts)
    return y


def generate(model, prompt, null, eps, ts, guidance: float) -> Tensor:
    """Text to image with the base alone. -> (B, C, H, W)"""
    *_, x = integrate(guided(base(model, prompt), base(model, null), guidance), eps, ts)
    return x


# ---- the command --------------------------------------------------------------------------------
@dataclass
class Loaded:  # what an edit needs
    model: MMDiT
    vae: VAE
    text: Text
    adapter: Adapter
    run: pathlib.Path
    config: dict  # of the run
    shift: float  # of the base's time grid
    o: argparse.Namespace  # its seed is of the noise of every edit: each comes out as alone
    autocast: torch.autocast

    def edit(self, pictures, instruction: str) -> np.ndarray:
        """A picture, or the frames of a clip, (h, w, 3) uint8 -> (F, h, w, 3) uint8"""
        device = self.model.proj_out.weight.device
        x = self.vae.encode(to_pixels(np.stack(pictures)).to(device))
        frames = len(x)
        rng = torch.Generator().manual_seed(self.o.seed)
        eps = noise(1, frames, x.shape[1:], rng).to(device)
        asked = [instruction, ""] if self.o.guidance != 1 else [instruction]
        words = [tuple(a.expand(frames, *a.shape[1:]) for a in self.text([w])) for w in asked]
        prompt, null = words[0], words[-1]  # without guidance null is not looked at
        ts = edit_grid(x, self.model, self.shift, self.config.get("shift"), self.o.steps)
        with self.autocast:
            y = edit(self.model, self.adapter, x, prompt, eps, ts, frames, null, self.o.guidance)
        return to_images(self.vae.decode(y))

    def size_of(self, frame: np.ndarray) -> tuple[int, int]:  # of a clip: the area of training
        return edit_size(frame, self.model, self.vae, self.o.size or self.config["size"])

    def edit_alone(self, picture: np.ndarray, instruction: str) -> np.ndarray:
        """A picture (h, w, 3) of any size. -> its edit, of that very size where the base can"""
        h, w = picture.shape[:2]
        whole = pad(picture, self.model.patch * self.vae.factor)
        if edit_size(whole, self.model, self.vae, self.o.size) == whole.shape[:2]:
            return self.edit([whole], instruction)[0][:h, :w]
        high, wide = edit_size(picture, self.model, self.vae, self.o.size)
        note(f"{w}x{h} pixels edited at {wide}x{high}, about the base's own area (--size)")
        return self.edit([crop(picture, (high, wide))], instruction)[0]


def load(o: argparse.Namespace) -> Loaded:
    """The run of --run with its base. Raises UserError where there is none, or no instruction."""
    run = find_run(o.run)
    config = read_run(run)
    own = config["instr"]
    if o.input and not pathlib.Path(o.input).exists():
        raise UserError(f"--input {o.input}: there is no such file or folder", 2)
    if o.input and not (o.instr or own):
        raise UserError(f'{run} takes many instructions: say which, --instr "make it winter"', 2)
    model, vae, text, shift, autocast = machine.open_chosen(o.base or config["base"], o)
    if own and o.instr not in (None, own):
        note(f'{run} was trained for "{own}" alone; "{o.instr}" may do nothing, or that')
    if o.input and model.width <= WIDE:
        note("the embedded base knows only its own world of little houses, and no photographs")
    with autocast:
        adapter = merged(model, load_adapter(run / "adapter.safetensors", model))
    return Loaded(model, vae, text, adapter, run, config, shift, o, autocast)


def draw_prompt(o: argparse.Namespace) -> str:
    """One picture of the base alone. -> what to print"""
    model, vae, text, shift, autocast = machine.open_chosen(o.base or "auto", o)
    generator = torch.Generator().manual_seed(o.seed)
    eps = torch.randn(1, model.channels, *[model.sample_size] * 2, generator=generator)
    eps, ts = eps.to(model.proj_out.weight.device), time_grid(o.steps or 28, shift)
    with autocast:
        x = generate(model, text([o.prompt]), text([""]), eps, ts, o.guidance)
    target = o.output or "drawn.png"
    write_image(target, to_images(vae.decode(x))[0])
    return f"drawn: {target}"


def edit_held(e: Loaded, o: argparse.Namespace, frames: int) -> str:
    """What the run held back: source, edit and, of the run's own edit, the edit undone."""
    rows = [row | {"path": e.run / row["path"]} for row in e.config["held"]]
    clips, asked = [], []
    for pictures, row in load_rows(rows, e.config["size"], frames):
        asked.append(o.instr or row["instr"])
        states = [pictures[:frames], e.edit(pictures[:frames], asked[-1])]
        if not o.instr:  # how another edit is undone only its caption would say
            states.append(e.edit(states[-1], row["undo"]))
        clips.append(states)
    columns = [np.concatenate(states) for states in zip(*clips)]
    target = pathlib.Path(o.output or ("edited.webp" if frames > 1 else "edited.png"))
    write_sheets(target, columns, frames)
    shown = ("source", "edit", "edit undone")[: len(columns)]
    return f'"{", ".join(dict.fromkeys(asked))}": {target.resolve()} ({", ".join(shown)})'


def edit_files(e: Loaded, o: argparse.Namespace, frames: int) -> str:
    """The file or folder of --input; of a folder what cannot be read is left out with a warning."""
    instr = o.instr or e.config["instr"]
    source = pathlib.Path(o.input)
    target, todo, clips = jobs(source, o.output, frames, o.frames)
    written = set()
    for path, where in todo:
        try:
            if clips:
                edit_clip(path, where, frames, e.size_of, lambda window: e.edit(window, instr))
            else:
                where = where if path == source else free_name(where, written)
                write_image(where, e.edit_alone(load_image(path), instr))
            written.add(where)
        except UserError as error:
            if path == source:
                raise
            print(f"warning: skipped {error}", file=sys.stderr)
    if not written:
        raise UserError(f"nothing in {source} could be edited")
    return f'"{instr}": {len(written)} edited, {target.resolve()}'


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", help="folder that train.py wrote (out, else the bundled tiny/editor)")
    p.add_argument("--input", help="picture, clip or folder of them (what the run held back)")
    p.add_argument("--output", help="file, or folder for a folder (edited.png, or as the input)")
    p.add_argument("--instr", help="the edit (the run's own)")
    p.add_argument("--frames", type=int, help="of a clip edited together (as in training)")
    p.add_argument("--prompt", help="draw this with the base alone, no editing")
    p.add_argument("--base", help="base to use (the run's own)")
    p.add_argument("--steps", type=int, help="Euler steps (20; embedded base 8; --prompt 28)")
    p.add_argument("--guidance", type=float, help="1: none, half the passes (1; --prompt 4.5)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    p.add_argument("--size", type=pixels, help="pixels, N or HxW: edit at this area (the input's)")
    p.add_argument("--device", help="cpu, cuda, mps, xpu (the machine's accelerator)")
    p.add_argument("--dtype", choices=machine.DTYPES, help="(as in train.py)")
    o = p.parse_args()
    need_positive(p, o, ["steps", "frames"])
    if o.guidance is None:
        o.guidance = 1.0 if o.prompt is None else 4.5
    if not 0 <= o.guidance < math.inf:
        p.error(f"--guidance must be 0 or more, not {o.guidance}")
    return o


@torch.no_grad()
def main():
    o = options()
    if o.prompt is not None:
        return print(draw_prompt(o))
    e = load(o)
    frames = e.config["frames"]  # 1: an editor of pictures takes a clip frame by frame
    frames = o.frames or frames if frames > 1 else 1
    print(edit_files(e, o, frames) if o.input else edit_held(e, o, frames))


if __name__ == "__main__":
    guard("sample.py", main)
