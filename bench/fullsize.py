"""SD3.5-medium at its full size with random weights: diffusers writes it sharded, we load it and take one ByG step.

    python bench/fullsize.py --size 256                                         # 5 GB of disk, 14 GB of memory, some minutes

The proof that nothing in the loader or the step is made for small models only; the picture that such weights would draw is noise.
Peak memory is the process's own (ru_maxrss). The last line is one JSON object.
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
from memory import BASES, step_memory  # noqa: E402

from frozen.load import load_part  # noqa: E402
from losses import byg_loss, identity_loss  # noqa: E402
from model import MMDiT, new_adapter  # noqa: E402
from routing import time_grid  # noqa: E402
from train import RECIPES  # noqa: E402


def write_base(folder, config):
    """diffusers' own class and its own save_pretrained, in bf16 shards of 2 GB."""
    from diffusers import SD3Transformer2DModel

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            **config,
            caption_projection_dim=config["num_attention_heads"] * config["attention_head_dim"],
        )
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    model.pos_embed.pos_embed.normal_()
    model.save_pretrained(folder, max_shard_size="2GB")


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--base", default="sd3.5-medium", choices=BASES)
    p.add_argument("--size", type=int, default=256, help="pixels a side")
    p.add_argument("--rank", type=int, default=64)
    p.add_argument(
        "--dtype",
        default="fp32",
        choices=["fp32", "bf16"],
        help="bf16 only where the processor computes in it",
    )
    p.add_argument(
        "--folder", help="where the shards are written and kept (default: a temporary folder)"
    )
    o = p.parse_args()
    recipe = argparse.Namespace(routing="ste", bootstrap=True, frames=1, **RECIPES["paper"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[o.dtype]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(o.folder or temporary)
        if not (folder / "config.json").exists():  # in a process of its own: its memory is not ours
            writer = multiprocessing.get_context("spawn").Process(
                target=write_base, args=(folder, BASES[o.base])
            )
            writer.start()
            writer.join()
            if writer.exitcode:
                sys.exit("fullsize.py: the shards could not be written; see above")
        shards, peak = (
            len(list(folder.glob("*.safetensors"))),
            lambda: round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        )
        begun, before = time.time(), peak()
        model = load_part(MMDiT, folder, "cpu", dtype)
        loaded = {
            "load_seconds": round(time.time() - begun, 1),
            "load_peak_gib": peak(),
            "before_gib": before,
            "weights_gib": round(sum(v.nbytes for v in model.state_dict().values()) / 2**30, 2),
        }
    print(f"{shards} shards loaded: {loaded}", flush=True)
    model.checkpointing = True
    torch.manual_seed(0)
    adapter = new_adapter(model, o.rank)
    average = {k: v.detach().clone() for k, v in adapter.items()}
    opt = torch.optim.AdamW(adapter.values(), lr=3e-4)
    x, eps, eps_cue = torch.randn(3, 1, model.channels, o.size // 8, o.size // 8)
    prompts = {
        name: (torch.randn(1, 77, 2048), torch.randn(1, 2048))
        for name in ("src", "tgt", "instr", "undo", "null")
    }
    k, ts, begun = torch.tensor([recipe.n // 2]), time_grid(recipe.n, 3.0), time.time()
    with torch.autocast("cpu", torch.bfloat16, enabled=o.dtype == "bf16"):
        identity = identity_loss(
            model,
            adapter,
            x,
            torch.lerp(x, eps, ts[k][:, None, None, None]),
            ts[k],
            eps - x,
            prompts["undo"],
        )
    identity.backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=o.dtype == "bf16"):
        loss, figures = byg_loss(model, adapter, average, x, prompts, eps, eps_cue, k, ts, recipe)
    loss.backward()
    opt.step()
    moved = sum(not torch.equal(adapter[k], average[k]) for k in adapter)
    figures = {k: round(v.item(), 4) for k, v in figures.items()} | {
        "identity": round(identity.item(), 4)
    }
    print(f"one step: {figures}; {moved} of {len(adapter)} adapter tensors moved")
    print(
        json.dumps(
            {"base": o.base, "size": o.size, "dtype": o.dtype}
            | loaded
            | {
                "step_seconds": round(time.time() - begun, 1),
                "step_peak_gib": peak(),
                "finite": all(v.isfinite().all().item() for v in adapter.values()),
                "computed_peak_gib": step_memory(BASES[o.base], o.size, 1, o.rank, dtype=dtype)[
                    "peak"
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
