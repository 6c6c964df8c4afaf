"""Trains an instruction editor from unpaired pictures (Bootstrap Your Generator, arXiv 2606.03911).

    python train.py --data tiny/examples --instr "make it winter"           # laptop: the embedded base, minutes
    python train.py --data photos/ --instr "make it winter" --base bokeh    # CUDA: a pretrained SD3.5
    python train.py --data tiny/examples --instr "make it winter" --resume  # goes on where it stopped, with the options it had
    torchrun --nproc_per_node 2 -- train.py --data ... --instr ...          # several GPUs, or processor cores: the same run, shared

Writes --out: adapter.safetensors (the averaged adapter), config.json, log.jsonl, samples/, held/ (the pictures on them), README.md
(the card), and checkpoint.safetensors for --resume.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
from files.clips import write_sheets
from files.disk import UserError, read_tensors, replacing, why, write, write_tensors
from files.pictures import write_image
from files.run import card, claim, cut_log, key_in_file, load_adapter, origin, page, read_run
from frozen.load import choose_base, load_base
from frozen.vae import VAE, to_images, to_pixels
from losses import byg_loss, fade, follow, identity_loss
from model import Adapter, merged, new_adapter
from routing import ROUTES, noise, time_grid
from sample import edit, own_steps, working_size

RANK, RANKS = (
    int(os.environ.get("RANK", 0)),
    int(os.environ.get("WORLD_SIZE", 1)),
)  # set by torchrun
LOCAL = int(os.environ.get("LOCAL_RANK", RANK))  # rank in this machine; its first speaks for all
# The paper's numbers, and what this repository measured to be better on the embedded base (README, "The embedded recipe").
RECIPES = {
    "paper": dict(
        steps=30000,
        batch=8,
        lr=3e-4,
        n=10,
        rank=64,
        prior=1.0,
        reverse=1.0,
        cycle=1.0,
        identity=0.2,
        alpha=0.1,
        guidance=1.0,
        identity_first=200,
        identity_share=0.15,
        imitate=0.0,
        ema=0.999,
        warmup=100,
        views=1,
        states=1,
        source_rate=1.0,
        weight_decay=1e-2,
        cue="cosine",
        antithetic=False,
        muon=False,
    ),
    "tiny": dict(
        steps=300,
        batch=16,
        lr=1e-2,
        n=8,
        rank=32,
        prior=4.0,
        reverse=0.0,
        cycle=2.0,
        identity=2.0,
        alpha=0.1,
        guidance=3.0,
        identity_first=0,
        identity_share=0.25,
        imitate=0.5,
        ema=0.98,
        warmup=20,
        views=8,
        states=2,
        source_rate=2.0,
        weight_decay=1e-2,
        cue="delta",
        antithetic=False,
        muon=True,
    ),
}
CLIPS = {
    "paper": dict(steps=750, lr=1e-4, identity_share=0.1),
    "tiny": dict(batch=4, views=1, identity_first=10),
}  # what differs for clips


def pixels(text: str) -> tuple[int, int]:
    """ "512" or "512x768" -> (height, width)"""
    h, _, w = text.partition("x")
    if min(size := (int(h), int(w or h))) < 16:
        raise ValueError
    return size


def options() -> tuple[argparse.Namespace, list[pathlib.Path]]:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--data",
        required=True,
        help="folder of images or clips; captions in metadata.jsonl or .txt, or tuples.jsonl",
    )
    p.add_argument(
        "--frames",
        type=int,
        help="frames of a clip that are edited together (default: 8 where --data holds clips, else 1)",
    )
    p.add_argument("--stride", type=int, default=1, help="take every n-th frame of a clip")
    p.add_argument(
        "--shared-noise",
        type=float,
        default=1.0,
        help="share of the noise's variance that the frames of a clip have in common",
    )
    p.add_argument(
        "--init", help="begin with the editor of this run, e.g. of pictures for one of clips"
    )
    p.add_argument("--instr", help='the edit, e.g. "make it winter"; not needed with tuples.jsonl')
    p.add_argument("--src", help="caption of every source (default: the image's own)")
    p.add_argument(
        "--tgt", help="caption of the result (default: derived from the caption and --instr)"
    )
    p.add_argument("--undo", help="the reverse instruction (default: derived)")
    p.add_argument(
        "--base",
        default="auto",
        help="auto, tiny, sd3-medium, sd3.5-medium, sd3.5-large, bokeh, a folder or a Hub id",
    )
    p.add_argument("--out", default="out", help="folder for everything that is written")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument(
        "--recipe",
        default="auto",
        choices=["auto", *RECIPES],
        help="defaults for the numbers below; auto: tiny for the embedded base",
    )
    for name, kind, meaning in (
        ("steps", int, "optimizer steps"),
        ("batch", int, "samples (pictures or clips) in a step"),
        ("lr", float, "learning rate"),
        ("n", int, "Euler steps of the rollout"),
        ("rank", int, "of the LoRA"),
        ("prior", float, "weight of the teacher cue"),
        ("reverse", float, "weight of the reverse cue, cosine only; 0 saves its queries"),
        ("cycle", float, "weight of the cycle"),
        ("identity", float, "weight of identity"),
        ("alpha", float, "weight of the anchor in the cosine cue"),
        (
            "guidance",
            float,
            "of the teacher (delta: for the target, fading to none at t = .92); 1 = none",
        ),
        ("identity-first", int, "steps of identity alone"),
        ("identity-share", float, "share of later steps with identity"),
        (
            "imitate",
            float,
            "share of the steps, from the first on, that imitate edits made by following the delta cue before training; 0 to 1",
        ),
        ("ema", float, "decay of the averaged adapter"),
        ("warmup", int, "steps until the full rate"),
        (
            "states",
            int,
            "training states taken from each rollout; batch / states rollouts in a step",
        ),
        ("source-rate", float, "learning rate of what reads the source, in --lr"),
        ("weight-decay", float, "of the LoRA, towards the base"),
        (
            "views",
            int,
            "random crops and mirrorings of each picture; 1: the picture alone (words like left need that)",
        ),
    ):
        p.add_argument(f"--{name}", type=kind, help=f"{meaning} (from the recipe)")
    p.add_argument(
        "--bootstrap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train on the editor's rollouts; no: on noised sources",
    )
    p.add_argument(
        "--fresh-noise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the delta cue under other noise than the state's, "
        "which keeps more; no: under the same, and trusted everywhere, for what begins at random places (snowfall)",
    )
    p.add_argument(
        "--cue",
        choices=["cosine", "delta", "anchor"],
        help="how the teacher is followed, losses.py (from the recipe)",
    )
    p.add_argument(
        "--antithetic",
        action=argparse.BooleanOptionalAction,
        help="delta cue: the mean under a noise and its negative (from the recipe)",
    )
    p.add_argument(
        "--muon",
        action=argparse.BooleanOptionalAction,
        help="train with Muon, not AdamW (from the recipe)",
    )
    p.add_argument(
        "--routing", default="ste", choices=ROUTES, help="what the cycle sees (routing.py)"
    )
    p.add_argument(
        "--accumulate", type=int, default=1, help="batches in an optimizer step, for less memory"
    )
    p.add_argument(
        "--size",
        type=pixels,
        default=(512, 512),
        metavar="N|HxW",
        help="pixels; rounded to whole patches, and shrunk to the area of the base's own pictures where it is larger",
    )
    p.add_argument("--every", type=int, default=100, help="steps between sample sheets and saves")
    p.add_argument(
        "--held", type=int, default=6, help="images kept out of training, for the sample sheets"
    )
    p.add_argument(
        "--cache", help="folder to keep encoded pictures in, for further runs (default: none)"
    )
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the blocks: minutes first, then faster steps (default: on a GPU)",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="auto: bf16 on a GPU that computes in it, else fp32",
    )
    o = p.parse_args()
    if (
        o.resume and (pathlib.Path(o.out) / "checkpoint.safetensors").exists()
    ):  # the run's own options, but for those given now
        begun = read_run(pathlib.Path(o.out))
        begun |= {
            "out": o.out,
            "size": "x".join(map(str, begun["size"])),
            "held": len(begun["held"]),
        }
        p.set_defaults(
            **{
                k: v if isinstance(v, bool) else str(v)
                for k, v in begun.items()
                if k in vars(o) and v is not None
            }
        )
        o = p.parse_args()
    paths, clips = data.find(
        o.data, o.frames, [pathlib.Path(o.out) / "held", pathlib.Path(o.out) / "samples"]
    )
    o.frames, o.base = o.frames or (8 if clips else 1), choose_base(o.base)
    o.recipe = o.recipe if o.recipe != "auto" else "tiny" if o.base == "tiny" else "paper"
    asked = o.imitate
    vars(o).update(
        {
            k: v
            for k, v in (RECIPES[o.recipe] | (CLIPS[o.recipe] if clips else {})).items()
            if getattr(o, k) is None
        }
    )
    for k in (
        "steps",
        "batch",
        "n",
        "rank",
        "views",
        "states",
        "accumulate",
        "every",
        "held",
        "lr",
        "frames",
        "stride",
    ):
        if getattr(o, k) <= 0:
            p.error(f"--{k} must be above 0, not {getattr(o, k)}")
    o.imitate *= o.cue == "delta" and not clips
    if asked and not o.imitate or o.antithetic and o.cue != "delta":
        p.error("--imitate needs --cue delta and pictures, --antithetic needs --cue delta")
    for k in ("imitate", "shared_noise", "identity_share", "weight_decay"):
        if not 0 <= getattr(o, k) <= 1:
            p.error(f"--{k.replace('_', '-')} must lie between 0 and 1, not {getattr(o, k)}")
    if (o.frames > 1) != clips:
        p.error(
            f"--frames {o.frames}, but {o.data} holds {'clips' if clips else 'pictures, no clips'}"
        )
    if o.batch % (RANKS * o.states):
        p.error(
            f"--batch {o.batch} cannot be shared evenly by --states {o.states}"
            + f" and {RANKS} ranks" * (RANKS > 1)
        )
    return o, paths


def encode(
    vae: VAE, views: np.ndarray, device: torch.device, cache: str | None, known: bytes
) -> Tensor:
    """views (V, H, W, 3) uint8 -> latents (V, C, h, w), on the CPU. They are kept in the folder cache under a name made of the pixels and of
    `known`, a digest of the autoencoder, so none is ever stale; what is damaged there is made anew."""
    if cache:
        file = pathlib.Path(
            cache,
            hashlib.sha256(known + repr(views.shape).encode() + views.tobytes()).hexdigest()
            + ".safetensors",
        )
        with contextlib.suppress(UserError, LookupError):
            return read_tensors(file)[0]["z"]
    z = torch.cat(
        [vae.encode(to_pixels(views[i : i + 8]).to(device)).cpu() for i in range(0, len(views), 8)]
    )
    if cache and RANK == 0:
        try:
            write_tensors(file, {"z": z})
        except UserError:
            if not file.exists():  # else another run has just written the same
                raise
    return z


def share(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks of torchrun: the gradient of the whole batch."""
    if RANKS > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise UserError(
                f"another rank of this run has ended ({why(error)}); go on from the last save with --resume"
            )
        for t, mean in zip(tensors, (flat / RANKS).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


class Muon(torch.optim.Optimizer):
    """AdamW's rival for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the momentum's nearest orthogonal matrix
    is the update, so that all its directions are learnt at one rate. Scaled as in arXiv 2502.16982 to AdamW's size of step. torch's own
    works in bfloat16, which a processor without such arithmetic does a hundred times slower; here equally shaped matrices go together."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                params = [p for p in group["params"] if p.shape == shape]
                grads, momenta = (
                    [p.grad for p in params],
                    [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params],
                )
                torch._foreach_lerp_(momenta, grads, 0.05)
                u = (
                    torch.stack(grads).lerp(torch.stack(momenta), 0.95).flatten(2)
                )  # Nesterov; (K, m, n)
                tall = u.shape[1] > u.shape[2]
                u = u.mT if tall else u
                u = u / u.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
                for _ in range(5):  # Newton-Schulz, its published coefficients
                    a = u @ u.mT
                    u = 3.4445 * u + (-4.775 * a + 2.0315 * a @ a) @ u
                u = (u.mT if tall else u) * 0.2 * max(u.shape[1:]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    params, list(u.reshape(-1, *shape).unbind()), alpha=-group["lr"]
                )


def new_optimizer(adapter: Adapter, o: argparse.Namespace) -> torch.optim.Optimizer:
    """Muon or AdamW; what reads the source, which starts from nothing, learns at o.source_rate times the rate."""
    kind = Muon if o.muon else torch.optim.AdamW
    return kind(
        [
            {
                "params": [p for k, p in adapter.items() if k.startswith("source_") == source],
                "scale": scale,
                "weight_decay": decay,
            }
            for source, scale, decay in ((False, 1.0, o.weight_decay), (True, o.source_rate, 1e-2))
        ]
    )


def set_rate(opt: torch.optim.Optimizer, step: int, o: argparse.Namespace) -> float:
    """Warm-up, then a cosine to zero. -> the rate"""
    rate = o.lr * min(1, step / max(1, o.warmup)) * 0.5 * (1 + math.cos(math.pi * step / o.steps))
    for group in opt.param_groups:
        group["lr"] = rate * group["scale"]
    return rate


def restore(
    path: pathlib.Path,
    adapter: Adapter,
    average: Adapter,
    opt: torch.optim.Optimizer,
    rng: torch.Generator,
) -> int:
    """Puts everything back as it was saved. -> the step"""
    state, meta = read_tensors(path)
    fit = lambda v, like: v.to(like, copy=True).view_as(like)  # noqa: E731  (copied: Windows writes over no file that is mapped)
    try:
        rng.set_state(state["rng"])
        parts = {key.split(".")[0] for key in state} - {
            "rng",
            "now",
            "avg",
        }  # of the optimizer; none before its first step
        if parts and parts != (
            {"exp_avg"} if isinstance(opt, Muon) else {"step", "exp_avg", "exp_avg_sq"}
        ):
            raise ValueError("it was trained by another optimizer, or by an older nanoByG")
        for k, p in adapter.items():
            with torch.no_grad():
                p.copy_(fit(state[f"now.{k}"], p)), average[k].copy_(fit(state[f"avg.{k}"], p))
            if parts:
                opt.state[p] = {
                    part: fit(state[f"{part}.{k}"], torch.tensor(0.0) if part == "step" else p)
                    for part in parts
                }
        return int(meta["step"])
    except (LookupError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path}: does not fit this run ({why(error)}); give the options it was begun with, or another --out to begin anew"
        )


def main():
    quiet = contextlib.redirect_stderr(open(os.devnull, "w")) if LOCAL else contextlib.nullcontext()
    device = torch.device("cuda", LOCAL) if torch.cuda.is_available() else torch.device("cpu")
    with quiet:
        o, paths = options()
        out = pathlib.Path(o.out)
        if (out / "checkpoint.safetensors").exists() != o.resume:
            raise UserError(
                f"{out} holds no run to resume; leave --resume away to begin one"
                if o.resume
                else f"{out} holds a run already: add --resume to go on with it, or choose another --out",
                2,
            )
        rows = data.read_prompts(o.data, paths, o.instr, o.src, o.tgt, o.undo)
        lock = claim(out) if RANK == 0 else None  # noqa: F841  (held until the process ends)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        half = (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else None
        )
        amp = {"auto": half, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[
            o.dtype
        ]  # of autocast; None: float32
        model, vae, text, shift = load_base(
            o.base, device, amp if device.type == "cuda" and amp else torch.float32
        )
        size = working_size(
            *o.size, model, vae, min(vae.factor * model.sample_size, math.prod(o.size) ** 0.5)
        )
        if o.resume and read_run(out)["size"] == list(o.size):
            size = o.size  # already such a size, and rounded again it might be another
        # Encode everything once; the encoders are not needed after that.
        latents, read, digest, block = [], [], hashlib.sha256(), []
        known = (
            hashlib.sha256(
                b"".join(v.cpu().numpy().tobytes() for v in vae.state_dict().values())
            ).digest()
            if o.cache
            else b""
        )
        for views, row in data.load_rows(rows, size, o.views, o.seed, o.frames, o.stride):
            z = encode(vae, views, device, o.cache, known)
            if len(block) < len(
                z
            ):  # kept in blocks: small tensors among the encoder's large ones would tear
                block = z.new_empty(
                    max(64, len(z)), *z.shape[1:]
                )  # the memory to pieces, 300 KiB for each picture
            latents.append(block[: len(z)].copy_(z))
            block = block[len(z) :]
            read.append(row)
            digest.update(views.tobytes() + json.dumps(row | {"path": row["path"].name}).encode())
        rows, shape = read, latents[0].shape[1:]  # latents: for each row (views or T, C, h, w)
    if RANKS > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    torch.manual_seed(o.seed)
    texts = sorted({"", *(r[k] for r in rows for k in ("src", "tgt", "instr", "undo"))})
    context, pooled = (
        torch.cat(a)
        for a in zip(*(map(Tensor.cpu, text(texts[i : i + 64])) for i in range(0, len(texts), 64)))
    )
    index = {s: i for i, s in enumerate(texts)}
    ids = {
        k: torch.tensor([index[r.get(k, "")] for r in rows])
        for k in ("src", "tgt", "instr", "undo", "null")
    }
    alike = [
        r
        for r in rows
        if all(
            a[index[r["src"]]].allclose(a[index[r["tgt"]]], atol=1e-3) for a in (pooled, context)
        )
    ]
    told = f"{len(alike)} of {len(rows)} target captions read like their source's and teach nothing: long ones are cut; shorten them"
    if len(alike) == len(rows):
        raise UserError(told)
    if alike and RANK == 0:
        print(f"warning: {told}", file=sys.stderr)
    own_noise = torch.tensor([r.get("own_noise", False) or not o.fresh_noise for r in rows])
    prompt = lambda which: (context[which].to(device), pooled[which].to(device))  # noqa: E731
    del text, vae.encoder
    order = torch.randperm(
        len(rows), generator=torch.Generator().manual_seed(0)
    )  # the same images held back for any seed
    held = order[: min(o.held, max(1, len(rows) // 8))]
    train_on = order[len(held) :] if len(rows) > len(held) else order

    begin = (
        load_adapter(pathlib.Path(o.init) / "adapter.safetensors", model)[0]
        if o.init and not o.resume
        else {}
    )
    o.rank = max((len(v) for k, v in begin.items() if "lora_A" in k), default=o.rank)
    adapter = {
        k: begin.get(k, v).requires_grad_()
        for k, v in new_adapter(model, o.rank, o.frames > 1).items()
    }
    average, params = {k: v.detach().clone() for k, v in adapter.items()}, list(adapter.values())
    opt = new_optimizer(adapter, o)
    scaler = torch.amp.GradScaler(enabled=amp == torch.float16)
    rng, ts = torch.Generator().manual_seed(o.seed), time_grid(o.n, shift)
    first = restore(out / "checkpoint.safetensors", adapter, average, opt, rng) if o.resume else 0
    if device.type == "cuda":
        model.checkpointing = model.width > 512  # large bases: memory before speed
    if device.type == "cuda" if o.compile is None else o.compile:
        torch._dynamo.config.recompile_limit = (
            64  # a block's kinds times adapter none, with and without gradient
        )
        try:
            torch.compile(torch.sin)(
                torch.ones(1, device=device)
            )  # fails for want of Triton, on Windows, say, or of a C compiler
            for block in model.transformer_blocks:
                block.compile()
        except Exception as error:
            if RANK == 0:
                print(
                    f"warning: torch.compile does not work here ({why(error)}); training goes on without",
                    file=sys.stderr,
                )
    if RANK == 0:
        shown = []
        for n, i in enumerate(
            held.tolist()
        ):  # copied: a run can be moved or published, and --data be gone
            path = rows[i]["path"]
            for file in filter(pathlib.Path.is_file, [path, *path.glob("*")]):
                with replacing(out / "held" / str(n) / file.relative_to(path.parent)) as tmp:
                    shutil.copyfile(file, tmp)  # piecewise: a film may be larger than the memory
            shown.append(rows[i] | {"path": f"held/{n}/{path.name}"})
        made = origin() | {"fingerprint": digest.hexdigest()[:16]}  # of all pictures and prompts
        if o.resume and made["fingerprint"] not in (out / "config.json").read_text("utf-8"):
            print(
                f"warning: these are not the pictures and prompts that the run in {out} was begun with",
                file=sys.stderr,
            )
        write(out / "config.json", vars(o) | {"size": size, "held": shown, "made": made})
        write(out / "README.md", card(o, made))

    def save(step):
        write_tensors(
            out / "adapter.safetensors",
            {key_in_file(k): v for k, v in average.items()},
            base=o.base,
            rank=o.rank,
            step=step,
            format="pt",
            note="nanoByG adapter: LoRA (alpha = rank), source_proj and source_gate; without these two it does not edit",
        )
        moments = {
            f"{part}.{k}": v for k, p in adapter.items() for part, v in opt.state.get(p, {}).items()
        }
        write_tensors(
            out / "checkpoint.safetensors",
            {f"now.{k}": v for k, v in adapter.items()}
            | moments
            | {f"avg.{k}": v for k, v in average.items()}
            | {"rng": rng.get_state()},
            step=step,
        )
        page(out)

    def draw(step):
        """The sample sheet: source, edit, edit undone; warns where the edit is none or has lost the source."""
        x, frames = (
            torch.cat([latents[i][: o.frames] for i in held]).to(device),
            held.repeat_interleave(o.frames),
        )
        eps = (
            noise(len(held), o.frames, shape, o.shared_noise, torch.Generator().manual_seed(1))
            .flatten(0, 1)
            .to(device)
        )
        grid = time_grid(own_steps(model), shift)
        with torch.no_grad(), autocast:
            y = edit(model, average, x, prompt(ids["instr"][frames]), eps, grid, o.frames)
            back = edit(model, average, y, prompt(ids["undo"][frames]), eps, grid, o.frames)
        pictures = [to_images(vae.decode(a)) for a in (x, y, back)]
        sheet = write_sheets(
            out / "samples" / f"latest.{'webp' if o.frames > 1 else 'png'}", pictures, o.frames
        )
        for name in [f"{step:06d}.png"] + ["latest.png"] * (
            o.frames > 1
        ):  # of pictures the latest is written
            write_image(out / "samples" / name, sheet)
        change = (
            (y - x) ** 2
        ).mean().item() / x.var().item()  # 0: a copy, about 2: unrelated pictures
        if step > o.identity_first and not 0.02 < change < 1.5:
            what, advice = (
                ("is nearly the source", "raise --prior")
                if change < 1
                else ("has lost the source", "raise --cycle or --identity")
            )
            say(f"warning: step {step}: the edit {what} (relative change {change:.3f}); {advice}")
        return change

    say = lambda text: tqdm.write(text, file=sys.stderr)
    if RANK:
        save = draw = say = lambda _: 0.0  # rank 0 alone writes and speaks
    edits, own, imitated = (
        [],
        torch.Generator().manual_seed(o.seed),
        round(o.imitate * o.steps),
    )  # an edit for each row, the same in every rank
    todo = torch.arange(len(rows)).split(o.batch) if max(first, o.identity_first) < imitated else ()
    for i in tqdm(
        todo, "following the cue", file=sys.stderr, unit="batch", disable=RANK > 0 or not todo
    ):
        x, prompts = (
            torch.stack([latents[j][0] for j in i]).to(device),
            {name: prompt(which[i]) for name, which in ids.items()},
        )
        with autocast:
            edits += follow(
                model, x, prompts, lambda t: fade(o.guidance, t), ts, own, own_noise=own_noise[i]
            ).cpu()
    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            s, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL))
        )
    if first == 0:
        draw(0)
    elif RANK == 0:
        cut_log(out / "log.jsonl", first)
    bar = tqdm(
        range(first + 1, o.steps + 1),
        initial=first,
        total=o.steps,
        file=sys.stderr,
        unit="step",
        disable=RANK > 0,
    )
    log, begun, bad, step = (
        open(os.devnull if RANK else out / "log.jsonl", "a" if o.resume else "w", buffering=1),
        time.time(),
        0,
        first,
    )
    mine = slice(RANK, None, RANKS)  # every rank draws the whole batch and takes its share
    for step in bar:
        rate, figures = set_rate(opt, step, o), collections.defaultdict(list)
        times = o.states if step > imitated else 1  # states of one picture and trajectory
        for _ in range(o.accumulate):
            b = train_on[torch.randint(len(train_on), (o.batch // times,), generator=rng)].repeat(
                times
            )
            k = (
                (torch.rand((), generator=rng) + torch.arange(o.batch) / o.batch) % 1 * o.n
            ).long()  # nodes, evenly spread: t = 1 in, t = 0 out
            with_id = (
                torch.rand((), generator=rng).item() < o.identity_share or step <= o.identity_first
            )
            view = torch.randint(o.views if o.frames == 1 else 2**31, (o.batch,), generator=rng)
            view = (
                view if o.frames == 1 else view[: o.batch // times].repeat(times)
            )  # one trajectory, one window of the clip
            eps = noise(o.batch // times, o.frames, shape, o.shared_noise, rng).repeat(
                times, 1, 1, 1, 1
            )
            eps_cue = torch.where(
                own_noise[b, None, None, None, None],
                eps,
                noise(o.batch, o.frames, shape, o.shared_noise, rng),
            )
            some = lambda i, v: latents[i][v % (len(latents[i]) - o.frames + 1) :][: o.frames]
            window = lambda at: torch.cat([*map(some, b[mine], at[mine])]).to(device)
            other = window(view)  # a crop of the picture, or the clip from some moment on
            x = other if o.frames > 1 else window(0 * view)
            b, k = (a[mine].repeat_interleave(o.frames) for a in (b, k))
            eps, eps_cue = (a[mine].flatten(0, 1).to(device) for a in (eps, eps_cue))
            prompts = {name: prompt(i[b]) for name, i in ids.items()}
            if with_id:  # an independent graph: its own backward
                t = ts[k].to(device)
                x_t = torch.lerp(other, eps, t[:, None, None, None])
                with autocast:
                    loss = identity_loss(
                        model,
                        merged(model, adapter),
                        other,
                        x_t,
                        t,
                        eps - other,
                        prompts["undo"],
                        o.frames,
                    )
                scaler.scale(o.identity * loss / o.accumulate).backward()
                figures["identity"].append(loss.item())
            if step > o.identity_first:
                known = torch.stack([edits[i] for i in b]).to(device) if step <= imitated else None
                with autocast:
                    loss, parts = byg_loss(
                        model,
                        merged(model, adapter),
                        merged(model, average),
                        x,
                        prompts,
                        eps,
                        eps_cue,
                        k,
                        ts,
                        o,
                        known,
                    )
                scaler.scale(loss / o.accumulate).backward()
                for name, v in parts.items():
                    figures[name].append(v.item())
        share([p.grad for p in params])
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        bad = 0 if math.isfinite(norm) else bad + 1
        if bad:
            say(f"warning: step {step} skipped: the gradient is not finite")
        else:
            scaler.step(opt)
            torch._foreach_lerp_(
                list(average.values()),
                [p.detach() for p in params],
                1 - min(o.ema, step / (step + 10)),
            )
        scaler.update()
        opt.zero_grad()
        shared = torch.tensor(
            [*(sum(v) / len(v) for v in figures.values()), len(stop)], device=device
        )
        share([shared])
        figures, halt = dict(zip(figures, shared.tolist())), shared[-1].item()
        bar.set_postfix({a: f"{v:.3f}" for a, v in figures.items()}, refresh=False)
        if step % o.every == 0 or step == o.steps:
            figures["change"] = draw(step)
        log.write(
            json.dumps(
                {"step": step, "lr": rate, "norm": norm, "seconds": round(time.time() - begun, 2)}
                | figures
            )
            + "\n"
        )
        if "change" in figures or halt or bad >= 5:
            save(step)  # after its line, so that a kill between the two leaves none out: cut_log
        if bad >= 5:
            raise UserError(
                "five steps in a row had no finite gradient; the last good state is saved. Try a lower --lr, or --dtype fp32"
            )
        if halt:
            say(f"stopped at step {step}; everything is saved, go on with --resume")
            sys.exit(128 + (stop or [signal.SIGINT])[0])
    if RANK == 0:
        print(
            f"done: {out}/adapter.safetensors; pictures in {out}/samples; edit with: python sample.py --run {out}"
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        if not LOCAL:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:  # while pictures are read; in the loop the step is ended and saved
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
