"""Edits pictures and clips with a trained adapter, or draws from a base.

python sample.py                                                        # what the last run held back
python sample.py --input photo.jpg --instr "make it winter" --output x.png
python sample.py --input folder/ --output edited/
python sample.py --input clip.mp4 --output edited.mp4                   # or .webp, .gif, a folder of numbered frames
python sample.py --base tiny --prompt "a red house in winter" --output house.png
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
from files.clips import VIDEOS, animated, read_frames, windows, write_clip, write_sheets
from files.disk import UserError
from files.pictures import SUFFIXES, contact_sheet, crop, load_image, write_image
from files.run import load_adapter, read_run
from frozen.load import choose_base, load_base
from frozen.vae import VAE, to_images, to_pixels
from losses import fade
from model import Adapter, MMDiT, Prompt, fold, merged
from routing import Velocity, integrate, noise, steady, time_grid


def answers(
    model: MMDiT,
    prompt: Prompt,
    null: Prompt,
    x: Tensor | None = None,
    adapter: Adapter | None = None,
    frames: int = 1,
) -> Callable:
    """The base's velocities or, with x and adapter, an editor's, without the words and with them, asked as one batch.
    prompt, null: (context, pooled), null of as many or of 1 -> f(y, t) -> v(null), v(prompt)"""
    both = tuple(torch.cat((n.expand_as(p), p)) for n, p in zip(null, prompt))
    x = None if x is None else x.repeat(2, 1, 1, 1)
    return lambda y, t: (
        model(y.repeat(2, 1, 1, 1), t.repeat(2), both, x, adapter, frames).float().chunk(2)
    )


def guided(both: Callable, guidance: float) -> Velocity:
    """Classifier-free guidance, v(null) + guidance (v(prompt) - v(null)), of `answers`."""

    def velocity(y, t):
        v_null, v = both(y, t)
        return v_null + guidance * (v - v_null)

    return velocity


def edit(
    model: MMDiT,
    adapter: Adapter,
    x: Tensor,
    prompt: Prompt,
    eps: Tensor,
    ts: Tensor,
    frames: int = 1,
    null: Prompt | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """The edit: the editor's rollout from eps, unguided exactly as in training. x (B, C, H, W) source, every `frames` of them a clip; the adapter
    may be `merged`. guidance, for which null (no words) is needed: above 1 the words count for more, at four times the cost; below 1 for less. Above
    1 what they change in the clean picture is bounded, for the excess alone, to a root mean square of .2: night is driven no further into the dark.
    And the frozen base, which knows words that the editor was never trained with, is asked, too: what they change for it is added, six times
    (guidance - 1), fading with noise as in training. Both were measured on the embedded base (tiny/README.md). -> (B, C, H, W)"""
    adapter = merged(model, adapter)
    if guidance == 1:
        velocity = lambda y, t: model(y, t, prompt, x, adapter, frames)  # noqa: E731
    elif guidance < 1:  # and nothing of the base: fewer words are not the opposite words
        velocity = guided(answers(model, prompt, null, x, adapter, frames), guidance)
    else:
        editor, base = (
            answers(model, prompt, null, x, adapter, frames),
            answers(model, prompt, null),
        )

        def velocity(y, t):
            v_null, v = editor(y, t)
            change = v - v_null
            size = (
                t[:, None, None, None] * change.square().mean((1, 2, 3), keepdim=True).sqrt()
            )  # (B, 1, 1, 1), in the clean picture
            v, w = (
                v + (guidance - 1) * (0.2 / size).clamp(max=1) * change,
                fade(1 + 6 * (guidance - 1), t) - 1,
            )
            if w.any():  # not at the first, noisiest times
                v_null, v_words = base(y, t)
                v = v + w * (v_words - v_null)
            return v

    *_, y = integrate(steady(velocity, x, frames), eps, ts)
    return y


def generate(
    model: MMDiT, prompt: Prompt, null: Prompt, eps: Tensor, ts: Tensor, guidance: float
) -> Tensor:
    """Text to image with the base alone. -> (B, C, H, W)"""
    *_, x = integrate(guided(answers(model, prompt, null), guidance), eps, ts)
    return x


def working_size(h: int, w: int, model: MMDiT, vae: VAE, limit: float) -> tuple[int, int]:
    """The size an h x w picture is edited at: its aspect, about limit x limit pixels, whole patches of the base."""
    unit = model.patch * vae.factor
    scale = limit / (h * w) ** 0.5
    return tuple(min(max(unit, round(s * scale / unit) * unit), model.grid * unit) for s in (h, w))


def own_steps(model: MMDiT) -> int:
    """The Euler steps of an edit that asks for none: the paper's 20, but on the embedded base 8, as many as the rollouts in training have:
    there they are as good (tiny/NOTES.md)."""
    return 8 if model.width < 512 else 20


def own_guidance(instr: str | None) -> float:
    """The guidance of an edit that asks for none. instr: the run's own, or None for many: then it helps most where words are new to the
    editor (tiny/README.md). The winter of the README's own run is nearly the same without any words: nothing for guidance to amplify."""
    return 1.0 if instr else 1.5


def options():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--run",
        help="folder that train.py wrote (default: out or, before there is one, the editor that comes along, tiny/editor)",
    )
    p.add_argument(
        "--input", help="image, clip or folder of them (default: what the run held back)"
    )
    p.add_argument(
        "--output", help="file, or folder for a folder (default: edited.png, or as the input)"
    )
    p.add_argument(
        "--frames", type=int, help="of a clip that are edited together (default: as in training)"
    )
    p.add_argument("--instr", help="the edit (default: the run's own)")
    p.add_argument("--prompt", help="draw this with the base alone, no editing")
    p.add_argument("--base", help="base to use (default: the run's own)")
    p.add_argument(
        "--steps",
        type=int,
        help="Euler steps (default: 20, with --prompt 28, for an editor of the embedded base 8)",
    )
    p.add_argument(
        "--guidance",
        type=float,
        help="how much the words count; 1: no guidance, 8 passes for 28 (default: 4.5 with --prompt, "
        "1 for an editor of one instruction, 1.5 for one of many)",
    )
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    for k in ("steps", "frames"):
        if getattr(o, k) is not None and getattr(o, k) < 1:
            p.error(f"--{k} must be above 0, not {getattr(o, k)}")
    if o.guidance is not None and not 0 <= o.guidance < math.inf:
        p.error(f"--guidance must be 0 or more, not {o.guidance}")
    return o


@torch.no_grad()
def main():
    o = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )
    generator, autocast = (
        torch.Generator().manual_seed(o.seed),
        torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16),
    )
    if o.prompt is not None:
        model, vae, text, shift = load_base(choose_base(o.base or "auto"), device, dtype)
        eps = torch.randn(
            1, model.channels, model.sample_size, model.sample_size, generator=generator
        ).to(device)
        with autocast:
            x = generate(
                model,
                text([o.prompt]),
                text([""]),
                eps,
                time_grid(o.steps or 28, shift),
                4.5 if o.guidance is None else o.guidance,
            )
        write_image(o.output or "drawn.png", to_images(vae.decode(x))[0])
        return print(f"drawn: {o.output or 'drawn.png'}")
    run = pathlib.Path(o.run or "out")
    if not (o.run or run.exists()):
        run = pathlib.Path(__file__).resolve().parent / "tiny" / "editor"
        print(
            "note: nothing is trained yet (out); this is the editor of many instructions that comes along (tiny/editor)",
            file=sys.stderr,
        )
    if not (run / "adapter.safetensors").exists():
        raise UserError(
            f"{run} holds no trained adapter: train one first (python train.py --data tiny/examples "
            '--instr "make it winter"), or name its folder with --run',
            2,
        )
    config = read_run(run)
    if o.input and not pathlib.Path(o.input).exists():
        raise UserError(f"--input {o.input}: there is no such file or folder", 2)
    model, vae, text, shift = load_base(choose_base(o.base or config["base"]), device, dtype)
    instr, guidance = (
        o.instr or config["instr"],
        own_guidance(config["instr"]) if o.guidance is None else o.guidance,
    )
    adapter = load_adapter(run / "adapter.safetensors", model)[0]
    adapter = (
        merged(model, adapter) if guidance > 1 else fold(model, adapter)
    )  # once; above 1 the base is asked, too
    null = text([""]) if guidance != 1 else None
    if config["instr"] and instr != config["instr"]:
        print(
            f'note: {run} was trained for "{config["instr"]}" alone; "{instr}" may do nothing, or that',
            file=sys.stderr,
        )
    if o.input and not instr:
        raise UserError(
            f'{run} takes many instructions: say which, as in --instr "make it winter"', 2
        )
    if o.input and model.width < 512:
        print(
            "note: the embedded base knows only its own world of little houses; expect nothing true of photographs",
            file=sys.stderr,
        )

    def run_edit(images, instructions, frames=1):
        """images: those of a clip one after another, `frames` for each instruction"""
        x = vae.encode(to_pixels(np.stack(images)).to(device))
        eps = (
            noise(len(instructions), frames, x.shape[1:], config["shared_noise"], generator)
            .flatten(0, 1)
            .to(device)
        )
        prompt = tuple(a.repeat_interleave(frames, 0) for a in text(instructions))
        with autocast:
            return edit(
                model,
                adapter,
                x,
                prompt,
                eps,
                time_grid(o.steps or own_steps(model), shift),
                frames,
                null,
                guidance,
            )

    length = (
        o.frames or config["frames"] if config["frames"] > 1 else 1
    )  # an editor of pictures takes a clip frame by frame
    if not o.input:
        held, target = (
            config["held"],
            o.output or ("edited.png" if config["frames"] == 1 else "edited.webp"),
        )
        if config["frames"] == 1:
            columns = [[load_image(run / row["path"], config["size"]) for row in held]]
        else:
            load = lambda path: next(
                data.load_rows(
                    [{"path": path}], config["size"], frames=length, stride=config["stride"]
                )
            )[0]
            columns = [[picture for row in held for picture in load(run / row["path"])[:length]]]
        columns.append(
            to_images(
                vae.decode(run_edit(columns[0], [o.instr or row["instr"] for row in held], length))
            )
        )
        if not o.instr:  # how another edit is undone only its caption would say
            columns.append(
                to_images(vae.decode(run_edit(columns[1], [row["undo"] for row in held], length)))
            )
        write_sheets(target, columns, length)
        asked = '", "'.join(dict.fromkeys(o.instr or row["instr"] for row in held))
        return print(
            f'"{asked}": {pathlib.Path(target).resolve()} (source, edit{", edit undone" if not o.instr else ""})'
        )

    def edit_clip(path, where):
        """Window by window; the noise that frames share is the same in all. Writes a sheet of the first window beside the clip."""
        first = []

        def change(pictures):
            h, w = working_size(
                *pictures[0].shape[:2], model, vae, math.prod(config["size"]) ** 0.5
            )
            generator.manual_seed(o.seed)
            y = to_images(
                vae.decode(run_edit([crop(p, (h, w)) for p in pictures], [instr], len(pictures)))
            )
            if not first:
                first.extend((pictures, y))
            return [
                np.asarray(
                    Image.fromarray(p).resize(pictures[0].shape[1::-1], Image.Resampling.LANCZOS),
                    np.float32,
                )
                for p in y
            ]

        write_clip(where, windows(read_frames(path), length, change), like=path)
        pictures, y = first
        small = [crop(p, y[0].shape[:2]) for p in pictures]
        write_image(where.with_name(where.stem[:50] + ".sheet.png"), contact_sheet([small, y]))

    source = pathlib.Path(o.input)
    inside = (
        [p for p in source.iterdir() if p.suffix.lower() in SUFFIXES | VIDEOS.keys()]
        if length > 1 and source.is_dir()
        else []
    )
    numbered = bool(inside) and all(
        p.stem.isdigit() and p.suffix.lower() in SUFFIXES and not animated(p) for p in inside
    )  # one clip
    many = source.is_dir() and not numbered
    paths, clips = (
        data.find(source, length if length > 1 or o.frames == 1 else None, [o.output or "edited"])
        if many
        else ([source], numbered or source.suffix.lower() in VIDEOS or animated(source))
    )
    target, written = (
        pathlib.Path(
            o.output
            or ("edited" if source.is_dir() else f"edited{source.suffix if clips else '.png'}")
        ),
        set(),
    )
    if target.resolve() == source.resolve():
        raise UserError(f"--output {target} would overwrite the input; choose another", 2)
    for path in paths:
        path = source / path if many else path
        where = target / path.relative_to(source) if many else target
        try:
            if clips:
                edit_clip(path, where)
            else:
                image = load_image(path)
                h, w = working_size(*image.shape[:2], model, vae, math.prod(config["size"]) ** 0.5)
                y = run_edit([crop(image, (h, w))], [instr])
                if (
                    many and (where := where.with_suffix(".png")) in written
                ):  # a.jpg and a.png: the second becomes a.png.png
                    where = where.with_name(f"{path.name}.png")
                write_image(where, to_images(vae.decode(y))[0])
            written.add(where)
        except UserError as error:
            if not many:
                raise
            print(f"warning: skipped {error}", file=sys.stderr)
    if not written:
        raise UserError(f"nothing in {source} could be edited")
    print(
        f'"{instr}": {len(written)} {"clip" if clips else "picture"}{"s" * (len(written) > 1)}, {target.resolve()}'
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
