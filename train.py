"""Trains an instruction editor from unpaired pictures (Bootstrap Your Generator, arXiv 2606.03911).

    python train.py --data tiny/examples --instr "make it winter"          # a laptop, in minutes
    python train.py --data photos/ --instr "make it winter" --base bokeh   # a GPU: an SD3.5
    python train.py --data tiny/examples --instr "make it winter" --resume # goes on
    torchrun --nproc_per_node 2 -- train.py --data ... --instr ...         # the same run, shared

Writes --out: adapter.safetensors (the averaged adapter), config.json, log.jsonl, samples/, held/
(the pictures on them), README.md (the card), index.html, and checkpoint.safetensors for --resume.

Start at `main`: encode once, make what is trained, then the loop. The loss is `byg_loss` in
losses.py; what is written is in files/run.py, torchrun's ranks in files/ranks.py.
"""

import argparse
import json
import math
import os
import pathlib
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

# Before torch: waiting threads spin for a shorter while. Beside two busy processes a step takes 2.5
# times as long as alone then, not 3.5; alone it takes 1 % longer.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor

from data import check_captions, draw, encode, read_prompts
from files import ranks, run
from files.disk import UserError
from files.folder import find
from files.options import need_positive, pixels, recall
from frozen import machine, probe
from frozen.load import edit_grid
from losses import byg_loss, cosine_cue, delta_cue, identity_loss
from model import WIDE, Adapter, merged
from routing import ROUTES

# delta-own: under the state's noise, for snowfall and the like; winter loses 19 points (measured)
CUES = ("delta", "delta-own", "cosine")


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. "Measured": the table is in docs/method.md; else by taste."""

    steps: int = 200  # of the optimizer; 4 minutes on two cores
    batch: int = 16  # pictures or clips in a step
    lr: float = 1e-2  # for Muon; by taste
    muon: bool = True  # AdamW at 4e-3 succeeds 39 points less often (measured)
    weight_decay: float = 1e-2  # the paper's
    warmup: int = 20  # steps of rising rate, times a cosine to zero
    ema: float = 0.98  # of the averaged adapter: over about 50 steps
    rank: int = 32  # of the LoRA; the base is 192 wide
    n: int = 8  # Euler steps of the rollout
    cue: str = "delta"  # the paper's cosine loses the source on this base (measured)
    guidance: float = 3.0  # of the target in the cue; with 1, none, 10 points less (measured)
    prior: float = 4.0  # weights of Eq. 5; half or twice made no difference (measured)
    cycle: float = 2.0
    identity: float = 2.0
    identity_first: int = 0  # steps of identity alone
    identity_share: float = 0.25  # of the later steps have identity, too
    routing: str = "ste"  # Eq. 4
    bootstrap: bool = True  # False: train on noised sources


RECIPES = {
    "default": Recipe(),  # on a base wider than the embedded one "sd3.5"
    "sd3.5": Recipe(  # untried on its base; on the embedded one: docs/method.md
        steps=2_000,  # the paper sees edits from about 1,000 on
        batch=8,  # the paper's; 9.2 GiB at 512 pixels, computed
        lr=3e-4,  # the paper's; its 1,536 inputs move an output together, so no faster
        muon=False,  # its rate was found on the embedded base alone
        warmup=100,
        ema=0.99,  # over about 100 steps, a twentieth of the run
        rank=64,  # the paper's
    ),
    "paper": Recipe(  # arXiv 2606.03911; ema is not published, the re-implementations take 0.999
        steps=30_000,
        batch=8,
        lr=3e-4,
        muon=False,
        warmup=100,
        ema=0.999,
        rank=64,
        n=10,
        cue="cosine",
        guidance=1.0,
        prior=1.0,
        cycle=1.0,
        identity=0.2,
        identity_first=200,
        identity_share=0.15,
    ),
}
CLIPS = {  # what differs for clips
    "default": {"batch": 4, "identity_first": 10},
    "sd3.5": {"batch": 1, "identity_first": 10},  # eight frames are eight pictures
    "paper": {"steps": 750, "lr": 1e-4, "identity_share": 0.1},
}
NUMBERS = (  # options that change a recipe
    ("steps", int, "optimizer steps"),
    ("batch", int, "pictures or clips in a step"),
    ("lr", float, "learning rate"),
    ("rank", int, "of the LoRA"),
    ("n", int, "Euler steps of the rollout"),
    ("guidance", float, "of the target in the delta cue; 1 is none"),
    ("prior", float, "weight of the teacher's cue"),
    ("cycle", float, "weight of the cycle"),
    ("identity", float, "weight of identity"),
)


# ---- options -----------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = p.add_argument_group("what to learn")
    what.add_argument("--data", required=True, help="folder of pictures or clips, with captions")
    what.add_argument("--instr", help='the edit, e.g. "make it winter"; or write tuples.jsonl')
    what.add_argument("--src", help="caption of every source (the picture's own)")
    what.add_argument("--tgt", help="caption of the result (derived by the grammar)")
    what.add_argument("--undo", help="the reverse instruction (derived)")
    what.add_argument("--size", type=pixels, default=(512, 512), help="pixels, N or HxW (512)")
    what.add_argument("--frames", type=int, help="of a clip, edited together (8; pictures 1)")

    method = p.add_argument_group("the method", f"numbers: of {', '.join(RECIPES)}")
    which = "which numbers (default; on SD3.5 and its like sd3.5)"
    method.add_argument("--recipe", choices=RECIPES, default="default", help=which)
    for name, kind, meaning in NUMBERS:
        of_each = ", ".join(f"{getattr(recipe, name):g}" for recipe in RECIPES.values())
        method.add_argument(f"--{name}", type=kind, help=f"{meaning} ({of_each})")
    less = "of the time grid (the base's, less for smaller pictures)"
    method.add_argument("--shift", type=float, help=less)
    method.add_argument("--cue", choices=CUES, help="how the teacher is followed (delta; cosine)")
    method.add_argument("--routing", choices=ROUTES, help="what the cycle sees (ste)")
    states = "train on the editor's rollouts, not on noised sources (yes)"
    method.add_argument("--bootstrap", action=argparse.BooleanOptionalAction, help=states)

    whole = p.add_argument_group("the run")
    whole.add_argument("--base", default="auto", help="tiny, bokeh, ..., a folder, a Hub id (auto)")
    whole.add_argument("--init", help="begin with the editor of this run")
    whole.add_argument("--out", default="out", help="folder for everything that is written (out)")
    whole.add_argument("--resume", action="store_true", help="go on with the run in --out")
    whole.add_argument("--every", type=int, default=100, help="steps between saves, sheets (100)")
    whole.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    whole.add_argument("--device", help="cpu, cuda, mps, xpu (the machine's accelerator)")
    halves = "(a GPU's bf16 or fp16; CPU and embedded base fp32)"
    whole.add_argument("--dtype", choices=machine.DTYPES, help=halves)
    whole.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(on a GPU)")
    whole.add_argument("--no-probe", action="store_true", help="do not ask if the base knows it")
    return p


def options() -> tuple[argparse.Namespace, list[pathlib.Path], bool]:
    """-> options, the files of --data, whether they are clips"""
    p = parser()
    o = p.parse_args()
    out = pathlib.Path(o.out)
    if o.resume and (out / "checkpoint.safetensors").exists():  # its options, but for those given
        recall(p, o)
        o = p.parse_args()
    need_positive(p, o, ["steps", "batch", "lr", "rank", "n", "shift", "every", "frames"])
    paths, clips = find(o.data, o.frames, [out / "held", out / "samples"])
    if o.frames is None:
        o.frames = 8 if clips else 1
    if (o.frames > 1) != clips:
        kind = "clips" if clips else "pictures, no clips"
        p.error(f"--frames {o.frames}, but {o.data} holds {kind}")
    return o, paths, clips


def choose_recipe(o: argparse.Namespace, wide: bool, clips: bool) -> Recipe:
    """The recipe that suits the base, with what the options change; o.recipe becomes its name."""
    if o.recipe == "default" and wide:
        o.recipe = "sd3.5"
    recipe = RECIPES[o.recipe]
    if clips:
        recipe = replace(recipe, **CLIPS[o.recipe])
    given = {k: v for k, v in vars(o).items() if hasattr(recipe, k) and v is not None}
    recipe = replace(recipe, **given)
    if not recipe.bootstrap:  # nothing is rolled out, so there is no end to route
        recipe = replace(recipe, routing="onestep")
    if recipe.batch % ranks.RANKS:
        shared = f"--batch {recipe.batch} cannot be shared evenly by {ranks.RANKS} ranks"
        raise UserError(shared, 2)
    return recipe


# ---- what is trained, and how ------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """The update is the momentum's nearest orthogonal matrix, so that all its directions are learnt
    at one rate (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), scaled to AdamW's
    size of step (arXiv 2502.16982). torch's own computes in bfloat16, a hundred times slower on a
    processor without it; here equally shaped matrices go together."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                self.update([p for p in group["params"] if p.shape == shape], group)

    def update(self, params: list[Tensor], group: dict) -> None:
        grads = [p.grad for p in params]
        momenta = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(momenta, grads, 0.05)
        u = torch.stack(grads).lerp(torch.stack(momenta), 0.95)  # Nesterov
        u = u.flatten(2)  # (K, m, n)
        tall = u.shape[1] > u.shape[2]
        u = u.mT if tall else u
        u = u / u.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        for _ in range(5):  # Newton-Schulz, its published coefficients
            a = u @ u.mT
            u = 3.4445 * u + (-4.775 * a + 2.0315 * a @ a) @ u
        u = u.mT if tall else u
        u = 0.2 * max(u.shape[1:]) ** 0.5 * u
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        updates = list(u.reshape(-1, *params[0].shape).unbind())
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def set_rate(opt: torch.optim.Optimizer, step: int, recipe: Recipe) -> float:
    """Warm-up times a cosine to zero. -> the rate"""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    rate = recipe.lr * min(1, step / max(1, recipe.warmup)) * cosine
    for group in opt.param_groups:
        group["lr"] = rate
    return rate


def update_average(average: Adapter, adapter: Adapter, decay: float, step: int) -> None:
    """The moving average of the bootstrap; the first steps are forgotten sooner."""
    now = [v.detach() for v in adapter.values()]
    torch._foreach_lerp_(list(average.values()), now, 1 - min(decay, step / (step + 10)))


# ---- the run -----------------------------------------------------------------------------------
def main():
    with ranks.quiet():
        o, paths, clips = options()
        out = pathlib.Path(o.out)
        device = machine.choose_device(o.device, o.base)
        o.base = machine.choose_base(o.base, device)
        of_photos = not machine.is_embedded(o.base)
        rows = read_prompts(o.data, paths, o.instr, o.src, o.tgt, o.undo, of_photos)
        run.claim(out, o.resume)
        model, vae, text, shift, half = machine.open_base(o.base, device, o.dtype)
        wide = model.width > WIDE
        recipe = choose_recipe(o, wide, clips)
        size = run.training_size(o.size, model, vae, out if o.resume else None)
        check_captions(rows, text)
        data = encode(rows, size, o.frames, vae, text, device)
    ranks.meet(device)
    del text, vae.encoder  # everything is encoded
    held_rows, train_rows = run.split_rows(len(data.rows))

    # What is trained: the adapter, in float32; its moving average is the bootstrap and the result.
    torch.manual_seed(o.seed)
    adapter = run.begin_adapter(model, recipe.rank, o)
    params = list(adapter.values())
    average = {name: v.detach().clone() for name, v in adapter.items()}
    kind = Muon if recipe.muon else torch.optim.AdamW
    opt = kind(params, lr=recipe.lr, weight_decay=recipe.weight_decay)
    scaler = torch.amp.GradScaler(device.type, 2.0**10, enabled=half == torch.float16)
    rng = torch.Generator().manual_seed(o.seed)  # of everything that is drawn in the loop
    first = run.restore(out, adapter, average, opt, rng) if o.resume else 0

    grid = partial(edit_grid, data.latents[0], model, shift, o.shift)
    ts = grid(recipe.n).to(device)
    cue = cosine_cue
    if recipe.cue != "cosine":
        cue = partial(delta_cue, guidance=recipe.guidance)
    autocast = machine.autocast(device, half)
    model.checkpointing = wide  # memory before speed
    config = vars(o) | asdict(recipe) | {"size": size, "rank": run.rank_of(adapter)}
    with ranks.quiet():
        if first == 0 and not o.no_probe:  # before any training: does the base know this edit?
            with autocast:
                config["probe"] = probe.say(model, adapter, data, train_rows, recipe, o.frames)
        if o.compile or o.compile is None and wide and device.type in ("cuda", "xpu"):
            machine.compile_blocks(model, device)

    # What a run's folder begins with; rank 0 alone writes.
    run.begin(out, config, data, held_rows)
    how = o.frames, recipe.batch // ranks.RANKS, grid(), autocast
    write_sheet = partial(run.sheet, out, model, vae, average, data, held_rows, how)
    if first == 0:
        write_sheet(0)
    stop = ranks.catch_signals()
    log = run.open_log(out, first)
    mine = slice(ranks.RANK, None, ranks.RANKS)  # of a batch
    begun = saved = time.time()
    bad, seen = 0, {}
    for step in (bar := ranks.progress(first, recipe.steps)):
        rate = set_rate(opt, step, recipe)
        batch = draw(data, train_rows, recipe, o.frames, rng, mine, device)
        figures, with_identity = {}, torch.rand((), generator=rng).item() < recipe.identity_share
        if with_identity or step <= recipe.identity_first:  # a graph, hence a backward, of its own
            with autocast:
                loss = identity_loss(model, merged(model, adapter), batch, ts)
            scaler.scale(recipe.identity * loss).backward()
            figures["identity"] = loss.detach()
        if step > recipe.identity_first:
            numbers = recipe.prior, recipe.cycle, recipe.routing, recipe.bootstrap
            with autocast:
                trained, averaged = merged(model, adapter), merged(model, average)
                loss, parts = byg_loss(model, trained, averaged, batch, ts, cue, *numbers)
            scaler.scale(loss).backward()
            figures |= parts

        ranks.share([p.grad for p in params])
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        bad = 0 if math.isfinite(norm) else bad + 1
        if bad:
            ranks.say(f"warning: step {step} skipped: the gradient is not finite")
        else:
            scaler.step(opt)
            update_average(average, adapter, recipe.ema, step)
        scaler.update()
        opt.zero_grad()

        figures, halt = ranks.agree(figures, stop, device)
        due = step % o.every == 0 or step == recipe.steps
        if due:
            seen = write_sheet(step, late=step > recipe.steps // 2)
            figures |= seen
        ranks.show(bar, seen | figures)
        line = {"step": step, "lr": rate, "norm": norm, "seconds": round(time.time() - begun, 2)}
        log.write(json.dumps(line | figures) + "\n")
        # A wide base's save is 2 GB, so there is one in 20 minutes at most.
        rare = wide and step < recipe.steps and time.time() - saved < 1200
        if due and not rare or halt or bad == 5:  # after its line: no saved run lacks one
            run.save(out, adapter, average, opt, rng, step, o.base)
            saved = time.time()
        if due or halt:
            run.page(out)
        if bad == 5:
            raise UserError(
                "five steps in a row had no finite gradient; the last good state is saved. "
                "Try a lower --lr, or --dtype fp32"
            )
        if halt:
            ranks.say(f"stopped at step {step}; everything is saved, go on with --resume")
            sys.exit(128 + (stop or [signal.SIGINT])[0])
    if ranks.RANK == 0:
        print(f"done: {out}/adapter.safetensors; edit with: python sample.py --run {out}")


if __name__ == "__main__":
    ranks.guard("train.py", main)
