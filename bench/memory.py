"""What a training step needs of a GPU, memory and time: computed, not measured. Writes bench/results/plan.md.

    python bench/memory.py                                                      # SD3.5-medium at 512 and 1024 pixels
    python bench/memory.py --base sd3-medium --size 512 --batch 1 --rank 64

Memory: runs the very step of train.py on fake tensors, which have a shape and no data, and adds up the bytes alive at every operation
(bf16 weights, the adapter, its average and AdamW's moments in float32, activations with checkpointing); likewise what comes before the
steps, encoding the pictures, and between them, the sample sheet. The most of the three is needed. What the allocator loses
to fragmentation, the CUDA context (about half a GiB) and the libraries' workspaces come on top.
Time: a step of the paper's recipe is n forward passes of the rollout, 4 queries to the teacher, and two passes with gradient (edit and
way back; identity is a third where it is drawn), each of 3 forward passes: the pass, again when its activations are needed, and the
gradient's way to its inputs. Times the operations of one pass, at --efficiency of the card's published peak, which no run of ours on a
GPU has confirmed. The last line is one JSON object.
"""

import argparse
import json
import pathlib
import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from frozen.text import CLIPText  # noqa: E402
from frozen.vae import VAE  # noqa: E402
from losses import byg_loss, identity_loss  # noqa: E402
from model import MMDiT, new_adapter  # noqa: E402
from routing import time_grid  # noqa: E402
from sample import edit  # noqa: E402
from train import RECIPES  # noqa: E402

SD3 = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
    num_layers=24,
    num_attention_heads=24,
    attention_head_dim=64,
    pos_embed_max_size=192,
)
BASES = {
    "sd3-medium": SD3,
    "sd3.5-medium": SD3
    | dict(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "sd3.5-large": SD3 | dict(num_layers=38, num_attention_heads=38, qk_norm="rms_norm"),
}
VAE_CONFIG = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
TEXTS = [
    dict(
        hidden_size=d,
        intermediate_size=4 * d,
        num_hidden_layers=layers,
        num_attention_heads=d // 64,
        projection_dim=d,
    )
    for d, layers in ((768, 12), (1280, 32))
]
# Makers' figures: bf16 with float32 sums, dense, in TFLOP/s, and GiB of memory.
CARDS = {
    "RTX 3090": (71, 24),
    "RTX 4090": (165, 24),
    "L40S": (362, 45),
    "A100": (312, 80),
    "H100 SXM": (989, 80),
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
    ts, gib = time_grid(2, 3.0), 2**30  # two Euler steps: more repeat the same memory
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        torch.set_default_dtype(dtype)
        model = MMDiT(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        model.checkpointing, weights = checkpointing, meter.now
        adapter = new_adapter(model, rank)
        average = {k: v.detach().clone() for k, v in adapter.items()}
        opt = torch.optim.AdamW(adapter.values())
        for p in adapter.values():
            p.grad = torch.zeros_like(p)
        opt.step()  # from now on its moments are there
        opt.zero_grad()
        meter.peak = meter.now
        latent = (batch, model.channels, size // 8, size // 8)
        x, eps, eps_cue = (torch.randn(latent) for _ in range(3))
        prompt = tuple(torch.randn(batch, *s, dtype=dtype) for s in ((77, 2048), (2048,)))
        k, prompts = (
            torch.zeros(batch, dtype=torch.long),
            {name: prompt for name in ("src", "tgt", "instr", "undo", "null")},
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = identity_loss(model, adapter, x, x, torch.ones(batch), eps - x, prompts["undo"])
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = byg_loss(model, adapter, average, x, prompts, eps, eps_cue, k, ts, o)
        loss.backward()
        opt.step()
    tensors = sum(v.numel() for v in adapter.values()) * 4
    return {
        "weights": round(weights / gib, 2),
        "adapter": round(5 * tensors / gib, 2),
        "peak": round(meter.peak / gib, 2),
    }


def other_memory(config, size, rank, held=6):
    """What train.py does besides its steps, in bf16 with the autoencoder in float32. size in pixels -> GiB: encoding a picture while the text
    encoders are there, too, and drawing the sample sheet"""
    ts = time_grid(2, 3.0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Meter() as meter:
        torch.set_default_dtype(torch.bfloat16)
        model, texts = MMDiT(config), [CLIPText(c) for c in TEXTS]
        torch.set_default_dtype(torch.float32)
        vae = VAE(VAE_CONFIG)
        vae.encode(torch.randn(1, 3, size, size))
        encoding, gib = meter.peak, 2**30
        del texts, vae.encoder
        adapter = new_adapter(model, rank)
        others = [
            {k: v.clone() for k, v in adapter.items()} for _ in range(3)
        ]  # its average and AdamW's moments
        meter.peak = meter.now
        x = torch.randn(held, model.channels, size // 8, size // 8)
        with torch.autocast("cpu", torch.bfloat16):
            y = edit(
                model,
                others[0],
                x,
                (torch.randn(held, 77, 2048), torch.randn(held, 2048)),
                torch.randn_like(x),
                ts,
            )
        vae.decode(y)
        decoder = sum(p.nbytes for p in vae.parameters())
    return {
        "encoding": round(encoding / gib, 2),
        "sheet": round(meter.peak / gib, 2),
        "decoder": round(decoder / gib, 2),
    }


def forward_tflop(config, size, rank):
    """Operations (multiplications and additions) of the editor's forward pass over one picture of size x size pixels, in 10^12"""
    with (
        torch.device("meta"),
        FlopCounterMode(display=False) as count,
        sdpa_kernel(SDPBackend.MATH),
    ):  # the only one that it counts here
        model = MMDiT(config).requires_grad_(False)
        x = torch.randn(1, model.channels, size // 8, size // 8)
        model(
            x,
            torch.ones(1),
            (torch.randn(1, 77, 2048), torch.randn(1, 2048)),
            x,
            new_adapter(model, rank),
        )
    return count.get_total_flops() / 1e12


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--base", default="sd3.5-medium", choices=BASES)
    p.add_argument("--size", type=int, nargs="+", default=[512, 1024], help="pixels a side")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    p.add_argument("--rank", type=int, default=64)
    p.add_argument(
        "--efficiency",
        type=float,
        default=0.4,
        help="share of the peak that is reached: an assumption",
    )
    o = p.parse_args()
    run, table, lines = RECIPES["paper"], {}, []
    for size in o.size:
        one, other = (
            forward_tflop(BASES[o.base], size, o.rank),
            other_memory(BASES[o.base], size, o.rank),
        )
        for batch in o.batch:
            row = table[f"{size}x{batch}"] = step_memory(BASES[o.base], size, batch, o.rank) | other
            row["most"] = round(
                max(row["peak"] + other["decoder"], other["encoding"], other["sheet"]), 2
            )
            row["tflop"] = round(batch * one * (run["n"] + 4 + 3 * (2 + run["identity_share"])), 1)
            hours = [
                f"{run['steps'] * row['tflop'] / (o.efficiency * peak) / 3600:.0f} h"
                if row["most"] + 1.5 < gib
                else "too large"
                for peak, gib in CARDS.values()
            ]
            cells = [
                size,
                batch,
                *(row[k] for k in ("peak", "encoding", "sheet", "most", "tflop")),
                *hours,
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(
                f"{o.base}, {size} pixels, batch {batch}, rank {o.rank}: weights {row['weights']} GiB, adapter and optimizer "
                f"{row['adapter']} GiB, peak of a step {row['peak']} GiB, of encoding {row['encoding']}, of the sample sheet "
                f"{row['sheet']}, the most {row['most']}, {row['tflop']} TFLOP a step (computed)",
                flush=True,
            )
    sizes, batches = (" ".join(map(str, a)) for a in (o.size, o.batch))
    (ROOT / "bench" / "results" / "plan.md").write_text(
        "\n".join(
            [
                f"`python bench/memory.py --base {o.base} --size {sizes} --batch {batches} --rank {o.rank} --efficiency {o.efficiency}`",
                "",
                f"**Computed, not measured**: hours of the paper's {run['steps']:,} steps on one card, for {o.base} with rank {o.rank}, were every card to "
                f"reach {100 * o.efficiency:.0f} % of its published peak (in brackets, TFLOP/s). Memory without the CUDA context and fragmentation, "
                "for which 1.5 GiB are set aside; the most: during the steps the decoder is on the card, too.",
                "",
                "| pixels | batch | a step, GiB | encoding | sample sheet | the most | TFLOP a step |"
                + "".join(f" {name} ({peak}) |" for name, (peak, _) in CARDS.items()),
                "|---|---|---|---|---|---|---|" + "---|" * len(CARDS),
                *lines,
            ]
        )
        + "\n"
    )
    print(json.dumps({"base": o.base, "rank": o.rank, "steps": table}))


if __name__ == "__main__":
    main()
