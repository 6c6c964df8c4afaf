"""SD3.5-medium at its full size with random weights: diffusers writes it sharded, we load it and
take one ByG step.

    python bench/fullsize.py --size 256     # 5 GB of disk, 14 GB of memory, some minutes

The proof that nothing in the loader or the step is made for small models only; the picture that
such weights would draw is noise. Peak memory is the process's own (ru_maxrss). The last line is one
JSON object.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import sys
import tempfile
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from memory import BASES, random_batch, step_losses, step_memory  # noqa: E402

from frozen.load import load_part  # noqa: E402
from model import MMDiT, new_adapter  # noqa: E402
from routing import time_grid  # noqa: E402
from train import RECIPES  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_base(folder, config):
    """diffusers' own class and its own save_pretrained, in bf16 shards of 2 GB."""
    from diffusers import SD3Transformer2DModel

    torch.set_default_dtype(torch.bfloat16)
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
