"""The embedded base, from scratch: world -> autoencoder -> MMDiT with its text encoders.

    python tiny/pretrain.py render --n 60000    # pictures of the world, in tiny/work: a minute
    python tiny/pretrain.py vae --minutes 12    # the autoencoder; then encodes every picture once
    python tiny/pretrain.py flow --minutes 60   # flow matching; run again to go on where it stopped
    python tiny/pretrain.py export              # writes tiny/checkpoint, in diffusers' layout
    python tiny/pretrain.py restore             # after render: the committed checkpoint, to go on
    python tiny/pretrain.py all --n 200000 --minutes 8    # the first four; for an accelerator

Two CPU cores do. An accelerator, where there is one, trains in bf16, compiled, in larger batches.
Every stage saves to tiny/work and continues from there; Ctrl-C loses at most a minute.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import scenes  # noqa: E402
from frozen.load import load_base  # noqa: E402
from frozen.machine import choose_device  # noqa: E402
from frozen.vae import VAE, to_pixels  # noqa: E402
from tiny.parts import MMDIT_CONFIG, MODEL_INDEX, SCHEDULER_CONFIG, VAE_CONFIG, build  # noqa: E402
from train import Muon  # noqa: E402

CHECKPOINT = ROOT / "tiny" / "checkpoint"


def save(tensors, path, **meta):
    tmp = path.with_suffix(".tmp")
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    save_file(tensors, tmp, {k: str(v) for k, v in meta.items()})
    tmp.replace(path)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2))


def begins(prefix, tensors):
    """The tensors whose names begin with prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# ---- the machine ---------------------------------------------------------------------------------
def accelerated(device):
    """Whether to train in bf16, compiled, with workers, in large batches."""
    return device.type != "cpu"


def half(device):
    """bf16 on an accelerator. The CPU stays in float32: compiled bf16 gave NaN on an Intel Xeon."""
    return torch.autocast(device.type, torch.bfloat16, enabled=accelerated(device))


def on_all_cores(function, n):
    """Yields function(numbers) for the scenes 0 to n - 1, 500 at a time, in order."""
    parts = [range(i, min(i + 500, n)) for i in range(0, n, 500)]
    with multiprocessing.Pool() as pool:
        yield from pool.imap(function, parts)


@torch.no_grad()
def update_average(average, now, decay):
    """now: the weights, by the same names in the same order."""
    torch._foreach_lerp_(list(average.values()), list(now.values()), 1 - decay)


# ---- the world -----------------------------------------------------------------------------------
def records(numbers):
    """Scenes of the training world, a generator for each: scene i does not depend on how many."""
    return [scenes.sample_scene(np.random.default_rng((0, i))) for i in numbers]


def pictures(numbers):
    """-> (n, 64, 64, 3) uint8"""
    return np.stack([scenes.render(scene) for scene in records(numbers)])


def cmd_render(args):
    args.work.mkdir(parents=True, exist_ok=True)
    shape = args.n, 64, 64, 3
    out = np.lib.format.open_memmap(args.work / "images.npy", "w+", np.uint8, shape)
    first = 0
    for part in on_all_cores(pictures, args.n):
        out[first : first + len(part)] = part
        first += len(part)
    out.flush()


def load_array(path, device):
    """A .npy file on the device; on the CPU it stays on the disk ("c": the file never changes)."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).to(device)


# ---- the autoencoder -----------------------------------------------------------------------------
def cmd_vae(args):
    start, device = time.time(), choose_device()
    images = load_array(args.work / "images.npy", device)
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).to(device, memory_format=torch.channels_last)
    torch.seed()  # every sitting draws anew
    if (args.work / "vae.safetensors").exists():
        vae.load_state_dict(load_file(args.work / "vae.safetensors"))
    now = vae.state_dict()
    average = {k: v.clone() for k, v in now.items()}
    opt = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    step = 0

    def loss_of(pixels):
        mean, logvar = vae.moments(pixels)
        logvar = logvar.float().clamp(-12, 4)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        error = vae.decoder(z).float() - pixels
        kl = 0.5 * (mean.float() ** 2 + logvar.exp() - 1 - logvar).mean()
        return (error**2).mean(), error.abs().mean(), kl

    while (gone := (time.time() - start) / 60 / args.minutes) < 1:
        cosine = 0.5 * (1 + math.cos(math.pi * gone))
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        picked = torch.randint(len(images), (args.batch // 8,), device=device)
        pixels = to_pixels(images[picked]).to(memory_format=torch.channels_last)
        with half(device):
            mse, l1, kl = loss_of(pixels)
        loss = mse + 0.2 * l1 + 5e-5 * kl
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        step += 1
        update_average(average, now, decay=min(0.998, step / (step + 20)))
        if step % 100 == 0:
            psnr, seconds = 10 * math.log10(4 / mse.item()), time.time() - start
            print(f"{step} {seconds:.0f}s psnr {psnr:.2f} kl {kl.item():.2f}", flush=True)
    vae.load_state_dict(average)
    z = encode_all(vae, images)
    shift, scaling = round(z.mean().item(), 5), round(1 / z.std().item(), 5)
    spread = [round(s, 2) for s in z.std((0, 2, 3)).tolist()]
    print(f"shift {shift} scaling {scaling} channel std {spread}")
    latents = (z - shift) * scaling  # zero mean, unit variance
    np.save(args.work / "latents.npy", latents.half().cpu().numpy())
    config = VAE_CONFIG | {"shift_factor": shift, "scaling_factor": scaling}
    write_json(args.work / "vae.json", config)
    decoded = vae.decoder(z[:200]).clamp(-1, 1)
    error = F.mse_loss(decoded, to_pixels(images[:200]), reduction="none").mean((1, 2, 3))
    print(f"reconstruction {(10 * torch.log10(4 / error)).mean():.2f} dB")
    save(vae.state_dict(), args.work / "vae.safetensors")


@torch.no_grad()
def encode_all(vae, images):
    """Encodes the whole world once. -> (n, 8, 16, 16), not yet normalised"""
    out = []
    for i in range(0, len(images), 250):
        out.append(vae.moments(to_pixels(images[i : i + 250]))[0].half())
    return torch.cat(out).float()


# ---- the MMDiT and its text encoders -------------------------------------------------------------
def save_flow(state, both, average, step):
    tensors = {f"now.{k}": v for k, v in both.state_dict().items()}
    tensors |= {f"avg.{k}": v for k, v in average.items()}
    save(tensors | {"step": torch.tensor(step)}, state)


def words_for(scene, u, rng):
    """The text of a sample, by its u in [0, 1]: 10 % none, 20 % wishes, else captions."""
    if u < 0.1:
        return ""
    if u < 0.3:
        return scenes.wish(scene, rng)
    return scenes.caption(scene, rng)


class Samples(IterableDataset):
    """Batches without end: numbers of scenes (B,), and a fresh text of each as the ids of every
    tokenizer, (B, 24)."""

    def __init__(self, world, tokenizers, batch):
        self.world, self.tokenizers, self.batch = world, tokenizers, batch

    def __iter__(self):
        rng = np.random.default_rng()  # another in every worker and sitting
        plain = np.array([s.style == "plain" for s in self.world])
        share = np.where(plain, 1.0, 0.35)  # the plain style is what must be best
        share /= share.sum()
        while True:
            pick = rng.choice(len(self.world), self.batch, p=share)
            u = rng.random(self.batch)
            texts = [words_for(self.world[i], r, rng) for i, r in zip(pick, u)]
            yield pick, *[tokenizer(texts) for tokenizer in self.tokenizers]


def draw_samples(n, tokenizers, batch, device):
    """Samples of the first n scenes; for an accelerator drawn by workers, 17,000 a second each."""
    world = []
    for part in on_all_cores(records, n):
        world += part
    fast = accelerated(device)
    workers = max(1, os.cpu_count() - 2) if fast else 0
    samples = Samples(world, tokenizers, batch)
    return iter(DataLoader(samples, batch_size=None, num_workers=workers, pin_memory=fast))


def flow_optimizers(both, lr):
    """Muon for the blocks' matrices, AdamW for all else."""
    hidden, ids = [], set()
    for n, p in both["model"].transformer_blocks.named_parameters():
        if p.ndim == 2 and ".norm" not in n:
            hidden.append(p)
            ids.add(id(p))
    rest = [p for p in both.parameters() if id(p) not in ids]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(hidden, lr=lr, weight_decay=0.01), adamw]


def cmd_flow(args):
    """Flow matching: x_t = (1-t) x + t eps, target eps - x, logit-normal t."""
    start, device = time.time(), choose_device()
    latents = load_array(args.work / "latents.npy", device)
    torch.manual_seed(0)
    model, text, _ = build(args.work)
    torch.seed()  # every sitting draws anew
    samples = draw_samples(len(latents), text.tokenizers, args.batch, device)
    both = torch.nn.ModuleDict({"model": model, "text": text}).to(device)
    opts = flow_optimizers(both, args.lr)
    now = both.state_dict()
    average = {k: v.clone() for k, v in now.items()}
    step, state = 0, args.work / "flow.safetensors"
    if state.exists():  # weights and average; the optimizers warm up anew
        saved = load_file(state, str(device))
        both.load_state_dict(begins("now.", saved))
        average = {k: saved["avg." + k] for k in now}
        step = int(saved["step"])
    make_fast(model, text, device)
    begun, reported, losses = step, start, deque(maxlen=200)
    while (gone := (time.time() - start) / 60 / args.minutes) < 1:
        lr = args.lr * min(1, (step - begun + 1) / 60) * min(1, max(0.02, (1 - gone) / args.cool))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr
        pick, *ids = [a.to(device, non_blocking=True) for a in next(samples)]
        x = latents[pick].float()
        eps = torch.randn_like(x)
        t = torch.randn(len(x), device=device)
        t = torch.sigmoid(t + math.log(2))  # shifted by 2, as sampling is
        x_t = torch.lerp(x, eps, t[:, None, None, None])
        with half(device):
            v = model(x_t, t, text.encode(ids))
        loss = F.mse_loss(v.float(), eps - x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        losses.append(loss.detach())
        update_average(average, now, decay=min(args.ema, (step + 1) / (step + 10)))
        if time.time() - reported > 30:
            recent, reported = torch.stack(list(losses)).mean().item(), time.time()
            print(f"{step} {reported - start:.0f}s loss {recent:.4f} lr {lr:.1e}", flush=True)
            assert math.isfinite(recent), f"the last good state is in {state}"
            save_flow(state, both, average, step)
    save_flow(state, both, average, step)


def make_fast(model, text, device):
    """Compiles what is worth it. On the CPU the blocks alone."""
    for block in model.transformer_blocks:
        block.compile()
    if accelerated(device):
        torch.set_float32_matmul_precision("high")  # TF32, for Muon's products
        for encoder in text.encoders:
            encoder.compile()


# ---- checkpoints ---------------------------------------------------------------------------------
def cmd_restore(args):
    """tiny/checkpoint -> tiny/work: what `vae` and `flow` would have left, so that another sitting
    of `flow` can follow."""
    device = choose_device()
    model, vae, text, _ = load_base("tiny", device)
    z = encode_all(vae, load_array(args.work / "images.npy", device))
    latents = (z - vae.shift) * vae.scaling
    np.save(args.work / "latents.npy", latents.half().cpu().numpy())
    save(vae.state_dict(), args.work / "vae.safetensors")
    config = CHECKPOINT / "vae" / "config.json"
    (args.work / "vae.json").write_text(config.read_text())
    both = torch.nn.ModuleDict({"model": model, "text": text})
    average = {k: v.clone() for k, v in both.state_dict().items()}
    save_flow(args.work / "flow.safetensors", both, average, args.step)


def cmd_export(args):
    """tiny/work -> tiny/checkpoint in diffusers layout, float16."""
    out = args.out
    _, _, configs = build(out)
    average = begins("avg.", load_file(args.work / "flow.safetensors"))
    vae_config = json.loads((args.work / "vae.json").read_text())
    diffusion, clip = "diffusion_pytorch_model.safetensors", "model.safetensors"
    parts = [
        ("transformer", begins("model.", average), MMDIT_CONFIG, diffusion),
        ("vae", load_file(args.work / "vae.safetensors"), vae_config, diffusion),
    ]
    for i, name in enumerate(("text_encoder", "text_encoder_2")):
        weights = {}
        for k, v in begins(f"text.encoders.{i}.", average).items():
            prefix = "" if k.startswith("text_proj") else "text_model."
            weights[prefix + k] = v
        parts.append((name, weights, configs[i], clip))
    for name, weights, config, file in parts:
        (out / name).mkdir(parents=True, exist_ok=True)
        save({k: v.half() for k, v in weights.items()}, out / name / file, format="pt")
        write_json(out / name / "config.json", config)
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(out / "model_index.json", MODEL_INDEX)


def cmd_all(args):
    """Everything, in args.minutes: the autoencoder takes a fifth of what rendering leaves."""
    end = time.time() + 60 * args.minutes
    cmd_render(args)
    args.minutes = 0.2 * (end - time.time()) / 60
    cmd_vae(args)
    args.minutes = 0.96 * (end - time.time()) / 60
    cmd_flow(args)
    cmd_export(args)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", choices=["render", "vae", "flow", "export", "restore", "all"])
    parser.add_argument("--n", type=int, default=60000, help="scenes in the training world")
    sitting = "of wall clock for this sitting"
    parser.add_argument("--minutes", type=float, default=12.0, help=sitting)
    parser.add_argument("--lr", type=float, default=2e-3)
    size = "of flow (128; 1024 on an accelerator); of vae an eighth of it"
    parser.add_argument("--batch", type=int, help=size)
    falls = "the last share of the sitting in which flow's rate falls to 0"
    parser.add_argument("--cool", type=float, default=0.35, help=falls)
    parser.add_argument("--ema", type=float, default=0.995, help="decay of flow's weight average")
    behind = "of restore: how many steps the committed checkpoint has behind it"
    parser.add_argument("--step", type=int, default=7545, help=behind)
    work = ROOT / "tiny" / "work"
    parser.add_argument("--work", type=pathlib.Path, default=work, help="what the stages keep")
    parser.add_argument("--out", type=pathlib.Path, default=CHECKPOINT, help="of export")
    args = parser.parse_args()
    args.batch = args.batch or (1024 if accelerated(choose_device()) else 128)
    globals()["cmd_" + args.stage](args)


if __name__ == "__main__":
    main()
