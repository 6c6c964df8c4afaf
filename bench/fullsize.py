"""SD3.5-medium at its full size with random weights: diffusers writes it sharded, we load it and
take one ByG step.

    python bench/fullsize.py --size 256     # 5 GB of disk, 14 GB of memory, some minutes

The proof that nothing in the loader or the step is made for small models only; the picture that
such weights would draw is noise. Peak memory is the process's own (ru_maxrss). The last line is one
JSON object. For bench/gpu.py: a whole base of random weights, without diffusers, and steps on it on
any device.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from memory import (  # noqa: E402
    BASES,
    TEXTS,
    VAE_CONFIG,
    forward_tflop,
    in_gib,
    random_batch,
    step_losses,
    step_memory,
)

import losses  # noqa: E402
from files.disk import read_json, write, write_tensors  # noqa: E402
from frozen.load import load_part  # noqa: E402
from frozen.machine import autocast  # noqa: E402
from frozen.probe import passes  # noqa: E402
from frozen.text import CLIPText  # noqa: E402
from frozen.vae import VAE  # noqa: E402
from model import MMDiT, new_adapter  # noqa: E402
from routing import time_grid  # noqa: E402
from train import RECIPES, update_average  # noqa: E402

BF16 = torch.bfloat16
DTYPES = {"fp32": torch.float32, "bf16": BF16}
TINY = ROOT / "tiny" / "checkpoint"
# the same kind of base in small, for a machine without accelerator
SMALL = BASES["sd3.5-medium"] | dict(sample_size=8, pos_embed_max_size=8, num_layers=2)
SMALL |= dict(num_attention_heads=2, joint_attention_dim=256, pooled_projection_dim=128)
SMALL |= dict(dual_attention_layers=(0,))
SMALL_TEXT = dict(hidden_size=64, num_attention_heads=1, projection_dim=64)
SMALL_VAE = VAE_CONFIG | dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1)
SMALL_VAE |= dict(norm_num_groups=8)


# ---- from diffusers -----------------------------------------------------------------------------
def write_base(folder, config):
    """diffusers' own class and its own save_pretrained, in bf16 shards of 2 GB."""
    from diffusers import SD3Transformer2DModel

    torch.set_default_dtype(BF16)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config, caption_projection_dim=width)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    model.pos_embed.pos_embed.normal_()
    model.save_pretrained(folder, max_shard_size="2GB")


def write_apart(folder, config):
    """write_base in a process of its own: its memory is not ours."""
    spawn = multiprocessing.get_context("spawn")
    writer = spawn.Process(target=write_base, args=(folder, config))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit("fullsize.py: the shards could not be written; see above")


def peak():
    """The most memory that this process has had, in GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def load(folder, dtype):
    """-> the model in `folder`, and what loading it took"""
    shards = len(list(folder.glob("*.safetensors")))
    begun, before = time.time(), peak()
    model = load_part(MMDiT, folder, "cpu", dtype)
    weights = sum(v.nbytes for v in model.state_dict().values())
    loaded = {
        "load_seconds": round(time.time() - begun, 1),
        "load_peak_gib": peak(),
        "before_gib": before,
        "weights_gib": round(weights / 2**30, 2),
    }
    print(f"{shards} shards loaded: {loaded}", flush=True)
    return model, loaded


def step(model, size, rank, dtype):
    """One step by the paper's recipe, identity included. -> what it took"""
    recipe = RECIPES["paper"]
    model.checkpointing = True
    torch.manual_seed(0)
    adapter = new_adapter(model, rank)
    average = {name: v.detach().clone() for name, v in adapter.items()}
    opt = torch.optim.AdamW(adapter.values(), lr=recipe.lr)
    batch = random_batch(model, size, 1, recipe.n // 2)
    begun = time.time()
    ts = time_grid(recipe.n, 3.0)
    figures = step_losses(model, adapter, average, batch, ts, recipe, dtype)
    opt.step()
    figures = {name: round(value.item(), 4) for name, value in figures.items()}
    moved = sum(not torch.equal(adapter[name], average[name]) for name in adapter)
    print(f"one step: {figures}; {moved} of {len(adapter)} adapter tensors moved")
    return {
        "step_seconds": round(time.time() - begun, 1),
        "step_peak_gib": peak(),
        "finite": all(v.isfinite().all().item() for v in adapter.values()),
    }


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


# ---- the price of a step, on any device ---------------------------------------------------------
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


def size_of(module):
    return sum(v.nbytes for v in module.state_dict().values())


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


def priced(model, config, size, recipe):
    """-> memory and time of a step, shares of its parts, and TFLOP in a second"""
    device = model.proj_out.weight.device
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
    one = forward_tflop(config, size, recipe.rank)
    done = recipe.batch * passes(replace(recipe, identity_share=0)) * one
    return figures | {"tflop_s": round(done / seconds, 2)}


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


# ---- the command --------------------------------------------------------------------------------
def main():
    kind = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=kind)
    p.add_argument("--base", default="sd3.5-medium", choices=BASES)
    p.add_argument("--size", type=int, default=256, help="pixels a side")
    p.add_argument("--rank", type=int, default=64)
    half = "bf16 only where the processor computes in it"
    p.add_argument("--dtype", default="fp32", choices=DTYPES, help=half)
    stays = "where the shards are written and kept (default: a temporary folder)"
    p.add_argument("--folder", help=stays)
    o = p.parse_args()
    config, dtype = BASES[o.base], DTYPES[o.dtype]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(o.folder or temporary)
        if not (folder / "config.json").exists():
            write_apart(folder, config)
        model, loaded = load(folder, dtype)
    taken = step(model, o.size, o.rank, dtype)
    how = {"recipe": RECIPES["paper"], "dtype": dtype, "device": "cpu"}
    computed = step_memory(config, o.size, 1, o.rank, **how)["peak"]
    what = {"base": o.base, "size": o.size, "dtype": o.dtype}
    print(json.dumps(what | loaded | taken | {"computed_peak_gib": computed}))


if __name__ == "__main__":
    main()
