"""What GPU memory a training step needs: computed, not measured.

    python bench/memory.py                                                      # SD3.5-medium at 512 and 1024 pixels
    python bench/memory.py --base sd3-medium --size 512 --batch 1 --rank 64

Runs the very step of train.py on fake tensors, which have a shape and no data, and adds up the bytes alive at every operation
(bf16 weights, the adapter, its average and AdamW's moments in float32, activations with checkpointing). What the allocator loses
to fragmentation, the CUDA context (about half a GiB) and the libraries' workspaces come on top. The last line is one JSON object.
"""
import argparse
import json
import pathlib
import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from losses import byg_loss, identity_loss  # noqa: E402
from model import MMDiT, new_adapter  # noqa: E402
from routing import time_grid  # noqa: E402
from train import RECIPES  # noqa: E402

SD3 = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, joint_attention_dim=4096, pooled_projection_dim=2048,
           num_layers=24, num_attention_heads=24, attention_head_dim=64, pos_embed_max_size=192)
BASES = {
    "sd3-medium": SD3,
    "sd3.5-medium": SD3 | dict(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "sd3.5-large": SD3 | dict(num_layers=38, num_attention_heads=38, qk_norm="rms_norm"),
}


class Meter(TorchDispatchMode):
    """Bytes alive now and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (s := t.untyped_storage())._cdata not in self.known:
                self.known.add(s._cdata)
                self.now += s.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(s, self.freed, s._cdata, s.nbytes())
        return out

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


def step_memory(config, size, batch, rank, checkpointing=True, dtype=torch.bfloat16):
    """One step of train.py, by the paper's recipe, with identity. size in pixels -> GiB: weights, adapter (with average, gradient, moments), peak"""
    o = argparse.Namespace(routing="ste", bootstrap=True, frames=1, **RECIPES["paper"])
    ts, gib = time_grid(2, 3.), 2 ** 30                     # two Euler steps: more repeat the same memory
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        torch.set_default_dtype(dtype)
        model = MMDiT(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        model.checkpointing, weights = checkpointing, meter.now
        adapter = new_adapter(model, rank)
        average = {k: v.detach().clone() for k, v in adapter.items()}
        opt = torch.optim.AdamW(adapter.values())
        latent = (batch, model.channels, size // 8, size // 8)
        x, eps, eps_cue = (torch.randn(latent) for _ in range(3))
        prompt = tuple(torch.randn(batch, *s, dtype=dtype) for s in ((77, 2048), (2048,)))
        k, prompts = torch.zeros(batch, dtype=torch.long), {name: prompt for name in ("src", "tgt", "instr", "undo", "null")}
        for _ in range(2):                                  # the second step finds AdamW's moments there
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = identity_loss(model, adapter, x, x, torch.ones(batch), eps - x, prompts["undo"])
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, _ = byg_loss(model, adapter, average, x, prompts, eps, eps_cue, k, ts, o)
            loss.backward()
            del loss, _
            opt.step()
            opt.zero_grad()
    tensors = sum(v.numel() for v in adapter.values()) * 4
    return {"weights": round(weights / gib, 2), "adapter": round(5 * tensors / gib, 2), "peak": round(meter.peak / gib, 2)}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--base", default="sd3.5-medium", choices=BASES)
    p.add_argument("--size", type=int, nargs="+", default=[512, 1024], help="pixels a side")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    p.add_argument("--rank", type=int, default=64)
    o = p.parse_args()
    table = {}
    for size in o.size:
        for batch in o.batch:
            table[f"{size}x{batch}"] = row = step_memory(BASES[o.base], size, batch, o.rank)
            print(f"{o.base}, {size} pixels, batch {batch}, rank {o.rank}: weights {row['weights']} GiB, adapter and optimizer "
                  f"{row['adapter']} GiB, peak {row['peak']} GiB (computed)", flush=True)
    print(json.dumps({"base": o.base, "rank": o.rank, "gib": table}))


if __name__ == "__main__":
    main()
