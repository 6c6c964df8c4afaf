"""For bench/gpu.py: a whole base of random weights, without diffusers, and steps of training on any
device, with their memory and time.
"""

import gc
import pathlib
import shutil
import statistics
import sys
import time
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from memory import (  # noqa: E402
    BASES,
    TEXTS,
    VAE_CONFIG,
    in_gib,
    random_batch,
    step_losses,
)

import losses  # noqa: E402
from data import Encoded, draw  # noqa: E402
from files.disk import read_json, write, write_tensors  # noqa: E402
from files.pictures import load_image  # noqa: E402
from frozen.load import load_base  # noqa: E402
from frozen.machine import autocast, compile_blocks  # noqa: E402
from frozen.probe import judge  # noqa: E402
from frozen.text import CLIPText  # noqa: E402
from frozen.vae import VAE, to_pixels  # noqa: E402
from model import MMDiT, new_adapter  # noqa: E402
from routing import time_grid  # noqa: E402
from sample import edit  # noqa: E402
from train import Muon, update_average  # noqa: E402

BF16 = torch.bfloat16
CAPTIONS = dict(src="a red house in autumn", tgt="a red house in winter", instr="make it winter")
CAPTIONS |= dict(undo="make it autumn", null="")
TINY = ROOT / "tiny" / "checkpoint"
EXAMPLES = ROOT / "tiny" / "examples"
# the same kind of base in small, for a machine without accelerator
SMALL = BASES["sd3.5-medium"] | dict(sample_size=8, pos_embed_max_size=8, num_layers=2)
SMALL |= dict(num_attention_heads=2, joint_attention_dim=256, pooled_projection_dim=128)
SMALL |= dict(dual_attention_layers=(0,))
SMALL_TEXT = dict(hidden_size=64, num_attention_heads=1, projection_dim=64)
SMALL_VAE = VAE_CONFIG | dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1)
SMALL_VAE |= dict(norm_num_groups=8)


# ---- memory, measured ---------------------------------------------------------------------------
def of_device(name):
    """A function of torch.accelerator or, where its version has none, of torch.cuda."""
    home = torch.accelerator if hasattr(torch.accelerator, name) else torch.cuda
    return getattr(home, name)


def wait(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def bytes_on(device):
    """-> bytes on the device now; of the CPU they are not known"""
    return 0 if device.type == "cpu" else of_device("memory_allocated")()


def peak_of(device, call):
    """-> the most bytes on the device while `call` runs"""
    if device.type == "cpu":
        call()
        return 0
    wait(device)
    of_device("reset_peak_memory_stats")()
    call()
    wait(device)
    return of_device("max_memory_allocated")()


def size_of(module):
    return sum(v.nbytes for v in module.state_dict().values())


# ---- a whole base of random weights -------------------------------------------------------------
def write_part(folder, kind, config, device):
    """A part of it; diffusers' names are ours."""
    with torch.device("meta"):
        state = kind(config).state_dict()
    tensors = {}
    for name, v in state.items():
        scale = 0.02 if v.ndim < 2 else v[0].numel() ** -0.5
        tensors[name] = scale * torch.randn(v.shape, dtype=BF16, device=device)
    write_tensors(folder / "model.safetensors", tensors)
    write(folder / "config.json", config)


def write_random_base(folder, device, small=False):
    """SD3.5-medium, drawn on the device, which is faster. CLIP has few layers and the embedded
    base's words."""
    config, vae, texts = BASES["sd3.5-medium"], VAE_CONFIG, TEXTS
    if small:
        config, vae, texts = SMALL, SMALL_VAE, (SMALL_TEXT, SMALL_TEXT)
    write_part(folder / "transformer", MMDiT, config, device)
    write_part(folder / "vae", VAE, vae, device)
    few = {"num_hidden_layers": 2, "vocab_size": 720}
    for text, end in zip(texts, ("", "_2")):
        write_part(folder / f"text_encoder{end}", CLIPText, text | few, device)
        shutil.copytree(TINY / f"tokenizer{end}", folder / f"tokenizer{end}")
        words = folder / f"tokenizer{end}" / "tokenizer_config.json"
        write(words, read_json(words) | {"model_max_length": 77})
    write(folder / "scheduler" / "scheduler_config.json", {"shift": 3.0})
    write(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline"})


# ---- steps on any device ------------------------------------------------------------------------
def apart(a, b):
    """|a - b| / |b|, whatever their devices"""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float(f"{(a - b).norm() / b.norm():.3g}")


def cosine(a, b):
    return round(F.cosine_similarity(a.double().cpu(), b.double().cpu(), 0).item(), 6)


def flat(tensors):
    return torch.cat([v.detach().float().flatten() for v in tensors])


def small_step(device, half, recipe, frames):
    """A step on the embedded base, all that is random drawn on the CPU. -> tensors by name"""
    weights = None if device.type == "cpu" else half  # as `machine.open_base`
    model, vae, text, shift = load_base("tiny", device, weights)
    torch.manual_seed(0)
    pictures = [load_image(EXAMPLES / f"{i:03d}.png") for i in range(recipe.batch)]
    adapter = new_adapter(model, recipe.rank, video=frames > 1)
    for v in adapter.values():
        v.data += 0.02 * torch.randn(v.shape).to(device)
    before = flat(adapter.values())
    average = {name: v.detach().clone() for name, v in adapter.items()}
    with torch.no_grad():
        x = vae.encode(to_pixels(np.stack(pictures)).to(device))
        out = {"encode": x, "decode": vae.decode(x)}
        out["context"], out["pooled"] = texts = text(list(CAPTIONS.values()))
    ids = {kind: torch.full((recipe.batch,), i) for i, kind in enumerate(CAPTIONS)}
    latents = [z.expand(frames, *z.shape) for z in x.cpu()]  # of a clip all frames are one
    data = Encoded([], latents, tuple(v.cpu() for v in texts), ids)
    rng, rows = torch.Generator().manual_seed(0), torch.arange(recipe.batch)
    batch = draw(data, rows, recipe, frames, rng, slice(None), device)
    ts = time_grid(recipe.n, shift).to(device)
    with torch.no_grad(), autocast(device, half):
        out["edit"] = edit(model, adapter, batch.x, batch.instr, batch.eps, ts, frames)
    out |= step_losses(model, adapter, average, batch, ts, recipe, half or torch.float32)
    out["gradient"] = flat(v.grad for v in adapter.values())
    torch.nn.utils.clip_grad_norm_(adapter.values(), 1.0)
    kind = Muon if recipe.muon else torch.optim.AdamW
    kind(adapter.values(), lr=recipe.lr).step()
    return out | {"moved": flat(adapter.values()) - before}


def seconds_of(device, call, rounds=3):
    """-> median of the seconds that `call` takes"""
    times = []
    for _ in range(rounds):
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def steps_of(model, size, recipe):
    """-> functions, each a step of the optimizer: supervised, which is what identity costs; ByG
    without identity; ByG with it"""
    device = model.proj_out.weight.device
    half = autocast(device, BF16)
    with device:
        batch = random_batch(model, size, recipe.batch, recipe.n // 2)
    adapter = new_adapter(model, recipe.rank)
    average = {name: v.detach().clone() for name, v in adapter.items()}
    params = list(adapter.values())
    opt = torch.optim.AdamW(params, lr=recipe.lr)
    ts = time_grid(recipe.n, 3.0).to(device)
    cue = partial(losses.delta_cue, guidance=recipe.guidance)

    def finish():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        update_average(average, adapter, recipe.ema, 1)
        opt.zero_grad()

    def supervised():
        with half:
            loss = losses.identity_loss(model, adapter, batch, ts)
        loss.backward()
        finish()

    def byg():
        with half:
            loss, _ = losses.byg_loss(model, adapter, average, batch, ts, cue)
        loss.backward()
        finish()

    def whole():
        step_losses(model, adapter, average, batch, ts, recipe, BF16)
        finish()

    return supervised, byg, whole


def timed(device, name, spent):
    """Wraps a function that byg_loss calls, to add to `spent` what each call takes."""
    call = getattr(losses, name)

    def wrapped(*args):
        out = []
        spent.append(seconds_of(device, lambda: out.append(call(*args)), 1))
        return out[0]

    return mock.patch.object(losses, name, wrapped)


def priced(model, size, recipe):
    """-> memory and time of a step of ByG, the shares of its parts"""
    device = model.proj_out.weight.device
    gc.collect()  # of the steps before
    rest = bytes_on(device) - size_of(model)
    supervised, byg, whole = steps_of(model, size, recipe)
    whole()  # from now on there are moments
    figures = {"peak_gib": in_gib(peak_of(device, whole) - rest)}
    seconds = seconds_of(device, byg)
    figures["step_seconds"] = round(seconds, 3)
    figures["of_supervised"] = round(seconds / seconds_of(device, supervised), 2)
    for name in ("rollout", "teacher"):
        spent = []
        with timed(device, name, spent):
            byg()
        figures[f"{name}_share"] = round(spent[0] / seconds, 3)
    return figures


def merged_gain(model, size, recipe):
    """-> a forward pass with the adapter, in units of one with W + B A in place of each W"""
    device, adapter = model.proj_out.weight.device, new_adapter(model, recipe.rank)
    together = {"source_proj.weight": adapter["source_proj.weight"]}
    for name, module in model.named_modules():
        down = adapter.get(f"{name}.lora_A.weight")
        if down is not None:
            weight = torch.addmm(module.weight.float(), adapter[f"{name}.lora_B.weight"], down)
            together[f"{name}.weight"] = weight.detach().to(module.weight.dtype)
    with device:
        batch = random_batch(model, size, recipe.batch, 1)
        t = torch.full((recipe.batch,), 0.5)
    seconds = []
    with torch.no_grad(), autocast(device, BF16):
        for weights in (adapter, together):
            forward = partial(model, batch.x, t, batch.instr, batch.x, weights)
            forward()
            seconds.append(seconds_of(device, forward))
    return round(seconds[0] / seconds[1], 3)


def compiled(model, size, recipe):
    """torch.compile. -> seconds of the first step, graphs after each of three steps with a sheet;
    losses, gradient and time beside eager's"""
    device = model.proj_out.weight.device
    with device:
        batch = random_batch(model, size, recipe.batch, 1)
    adapter, ts = new_adapter(model, recipe.rank), time_grid(recipe.n, 3.0).to(device)
    few = slice(recipe.batch * 3 // 4)  # six of eight, as on a sheet
    x, eps, prompt = batch.x[few], batch.eps[few], tuple(a[few] for a in batch.tgt)

    def step():
        for v in adapter.values():
            v.grad = None
        parts = step_losses(model, adapter, adapter, batch, ts, recipe, BF16)
        return torch.stack(list(parts.values())), flat(v.grad for v in adapter.values())

    stats, graphs, times = torch._dynamo.utils.counters["stats"], [], []
    stats.clear()
    compile_blocks(model, device)
    for _ in range(3):
        times.append(seconds_of(device, step, 1))
        with torch.no_grad(), autocast(device, BF16):
            judge(model, x, edit(model, adapter, x, prompt, eps, ts), prompt, prompt)
        graphs.append(stats["unique_graphs"])
    eager = torch.compiler.set_stance("force_eager")(step)
    (parts, slope), (eager_parts, eager_slope) = step(), eager()
    gain = seconds_of(device, eager) / seconds_of(device, step)
    figures = {"first_step_seconds": round(times[0], 1), "graphs": graphs, "gain": round(gain, 3)}
    return figures | {"losses": apart(parts, eager_parts), "gradient": cosine(slope, eager_slope)}
