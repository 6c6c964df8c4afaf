"""What a training step needs of a GPU, memory and time: computed, not measured. Writes
bench/results/plan.md.

    python bench/memory.py                          # SD3.5-medium at 512 and 1024 pixels
    python bench/memory.py --base sd3-medium --size 512 --batch 1 --recipe paper

Memory: runs the very step of train.py on fake tensors, which have a shape and no data, and adds up
the bytes alive at every operation: bf16 weights; the adapter, its average and the optimizer's
moments in float32; activations with checkpointing, under CUDA's rules of autocast. Likewise what
comes before the steps, encoding the pictures, and between them, the sample sheet. The most of the
three is needed. What the allocator loses to fragmentation, the CUDA context (about half a GiB) and
the libraries' workspaces come on top.

Time: a step is n forward passes of the rollout, the queries to the teacher (3, of the
paper's cue 4), and two passes with gradient: edit and way back; identity is a
third where it is drawn. Each of these is 3 forward passes: the pass, again when its activations are
needed, and the gradient's way to its inputs. Times the operations of one pass, at --efficiency of
the card's published peak, which no run of ours on a GPU has confirmed. The last line is one JSON
object.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import weakref
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as network  # noqa: E402
from data import Batch  # noqa: E402
from files.run import HELD  # noqa: E402
from frozen.probe import judge, passes  # noqa: E402
from frozen.text import CLIPText  # noqa: E402
from frozen.vae import VAE  # noqa: E402
from losses import byg_loss, cosine_cue, delta_cue, identity_loss  # noqa: E402
from model import MMDiT, merged, new_adapter  # noqa: E402
from routing import time_grid  # noqa: E402
from sample import edit  # noqa: E402
from train import RECIPES, Muon  # noqa: E402

GIB = 2**30
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
    "T4, fp16": (65, 15),
    "RTX 4070": (58, 12),
    "RTX 3090": (71, 24),
    "RTX 4090": (165, 24),
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
            if isinstance(t, torch.Tensor):
                self.count(t.untyped_storage())
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.freed, key, size)

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


# ---- what CUDA does otherwise than the CPU ------------------------------------------------------
def in_float32(norm):
    """A norm as CUDA's autocast runs it; the CPU's leaves it in half precision."""

    def cast(x, shape, *rest, **options):
        if torch.is_autocast_enabled("cpu"):
            x, rest = x.float(), tree_map_only(torch.Tensor, torch.Tensor.float, rest)
        return norm(x, shape, *rest, **options)

    return cast


def fused_rms_norm(x, shape, weight, eps):
    """CUDA's kernel, which keeps its input alone; the CPU's is made of many operations."""
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


@contextlib.contextmanager
def fake(device):
    """Fake tensors. They are the CPU's, for without a driver autograd takes no fake CUDA tensors
    backward; what CUDA does otherwise is put in place: norms in float32, no attention mask."""
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            for name, norm in (("layer_norm", F.layer_norm), ("rms_norm", fused_rms_norm)):
                stack.enter_context(mock.patch.object(F, name, in_float32(norm)))
            copies = mock.patch.object(network, "with_weight", network.with_copies)
            stack.enter_context(copies)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


# ---- memory -------------------------------------------------------------------------------------
def in_gib(size):
    return round(size / GIB, 2)


def random_prompt(model, n):
    width = model.time_text_embed["text_embedder"]["linear_1"].in_features  # of CLIP's context, too
    return torch.randn(n, 77, width), torch.randn(n, width)


def random_batch(model, size, n, k):
    """What a step of train.py sees, in random numbers. size in pixels, k: node of the time grid"""
    x, eps, eps_cue = torch.randn(3, n, model.channels, size // 8, size // 8)
    nodes = torch.full((n,), k)
    kinds = ("src", "tgt", "instr", "undo", "null")
    prompts = {kind: random_prompt(model, n) for kind in kinds}
    return Batch(x, eps, eps_cue, nodes, **prompts, frames=1)


def step_losses(model, adapter, average, batch, ts, recipe, dtype):
    """Both backward passes of a step of train.py. -> figures of its log"""
    half = torch.autocast(batch.x.device.type, dtype, enabled=dtype != torch.float32)
    with half:
        identity = identity_loss(model, merged(model, adapter), batch, ts)
    (recipe.identity * identity).backward()
    cue = cosine_cue
    if recipe.cue != "cosine":
        cue = partial(delta_cue, guidance=recipe.guidance)
    numbers = recipe.prior, recipe.cycle, recipe.routing, recipe.bootstrap
    with half:
        trained, averaged = merged(model, adapter), merged(model, average)
        loss, figures = byg_loss(model, trained, averaged, batch, ts, cue, *numbers)
    loss.backward()
    return figures | {"identity": identity.detach()}


def new_optimizer(adapter, recipe):
    """train.py's, with room for its moments: a first step of nothing."""
    kind = Muon
    if not recipe.muon:
        kind = partial(torch.optim.AdamW, foreach=True)  # as on a GPU
    opt = kind(adapter.values(), lr=recipe.lr)
    for p in adapter.values():
        p.grad = torch.zeros_like(p)
    opt.step()
    opt.zero_grad()
    return opt


def step_memory(
    config,
    size,
    batch,
    rank,
    recipe=RECIPES["sd3.5"],
    checkpointing=True,
    dtype=torch.bfloat16,
    device="cuda",
):
    """One step of train.py, with identity; size in pixels. -> GiB: weights, adapter (with average,
    gradient, moments), peak"""
    ts = time_grid(2, 3.0)  # two Euler steps: more repeat the same memory
    with fake(device), Meter() as meter:
        torch.set_default_dtype(dtype)
        model = MMDiT(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        model.checkpointing = checkpointing
        weights = meter.now
        adapter = new_adapter(model, rank)
        average = {name: v.detach().clone() for name, v in adapter.items()}
        opt = new_optimizer(adapter, recipe)
        meter.peak = meter.now
        drawn = random_batch(model, size, batch, 0)
        step_losses(model, adapter, average, drawn, ts, recipe, dtype)
        opt.step()
    tensors = 4 * sum(v.numel() for v in adapter.values())
    copies = 4 if recipe.muon else 5
    figures = {"weights": weights, "adapter": copies * tensors, "peak": meter.peak}
    return {name: in_gib(value) for name, value in figures.items()}


def other_memory(config, size, rank, held=HELD, copies=3):
    """What train.py does besides its steps, in bf16 with the autoencoder in float32; size in
    pixels; held: pictures edited at once; copies: of the adapter, its average and moments. -> GiB:
    encoding a picture while the text encoders are there, too; drawing and judging the sample sheet;
    the decoder alone"""
    ts = time_grid(2, 3.0)
    with fake("cuda"), torch.no_grad(), Meter() as meter:
        torch.set_default_dtype(torch.bfloat16)
        model, texts = MMDiT(config), [CLIPText(c) for c in TEXTS]
        torch.set_default_dtype(torch.float32)
        vae = VAE(VAE_CONFIG)
        vae.encode(torch.randn(1, 3, size, size))
        encoding = meter.peak
        del texts, vae.encoder
        adapter = new_adapter(model, rank)
        kept = [{name: v.clone() for name, v in adapter.items()} for _ in range(copies)]
        meter.peak = meter.now
        x = torch.randn(held, model.channels, size // 8, size // 8)
        prompt = random_prompt(model, held)
        with torch.autocast("cpu", torch.bfloat16):
            y = edit(model, kept[0], x, prompt, torch.randn_like(x), ts)
            judge(model, x, y, prompt, prompt)
        vae.decode(y)
        decoder = sum(p.nbytes for p in vae.parameters())
    figures = {"encoding": encoding, "sheet": meter.peak, "decoder": decoder}
    return {name: in_gib(value) for name, value in figures.items()}


# ---- time ---------------------------------------------------------------------------------------
def forward_tflop(config, size, rank):
    """Operations (multiplications and additions) of the editor's forward pass over one picture of
    size x size pixels, in 10^12"""
    counter = FlopCounterMode(display=False)
    seen = sdpa_kernel(SDPBackend.MATH)  # the only attention that it counts here
    with torch.device("meta"), counter, seen:
        model = MMDiT(config).requires_grad_(False)
        x = torch.randn(1, model.channels, size // 8, size // 8)
        model(x, torch.ones(1), random_prompt(model, 1), x, new_adapter(model, rank))
    return counter.get_total_flops() / 1e12


def hours(card, row, recipe, efficiency):
    """How long the recipe takes on a card, as a cell of the table."""
    peak, gib = CARDS[card]
    if row["most"] + 1.5 >= gib:
        return "too large"
    return f"{recipe.steps * row['tflop'] / (efficiency * peak) / 3600:.1f} h"


# ---- the table ----------------------------------------------------------------------------------
def say(o, size, batch, row):
    print(
        f"{o.base}, {size} pixels, batch {batch}, rank {o.rank}: weights {row['weights']} GiB, "
        f"adapter and optimizer {row['adapter']} GiB, peak of a step {row['peak']} GiB, of "
        f"encoding {row['encoding']}, of the sample sheet {row['sheet']}, the most {row['most']}, "
        f"{row['tflop']} TFLOP a step (computed)",
        flush=True,
    )


def write_plan(o, recipe, lines):
    sizes = " ".join(map(str, o.size))
    batches = " ".join(map(str, o.batch))
    which = f"--recipe {o.recipe} --base {o.base} --size {sizes} --batch {batches}"
    options = f"{which} --rank {o.rank} --efficiency {o.efficiency}"
    cards = [f" {name} ({peak}) |" for name, (peak, _) in CARDS.items()]
    page = [
        f"`python bench/memory.py {options}`",
        "",
        f"**Computed, not measured**: hours of the {recipe.steps:,} steps of the recipe "
        f"`{o.recipe}` on one card, for {o.base} with rank {o.rank}, were every card to reach "
        f"{100 * o.efficiency:.0f} % of its published peak (in brackets, TFLOP/s). Memory without "
        "the CUDA context and fragmentation, for which 1.5 GiB are set aside; the most: during the "
        "steps the decoder is on the card, too.",
        "",
        "| pixels | batch | a step, GiB | encoding | sample sheet | the most | TFLOP a step |"
        + "".join(cards),
        "|---|---|---|---|---|---|---|" + "---|" * len(CARDS),
        *lines,
    ]
    (ROOT / "bench" / "results" / "plan.md").write_text("\n".join(page) + "\n")


def computed(config, size, batch, rank, recipe):
    """-> a row's figures: GiB, and TFLOP of a step"""
    copies = 2 if recipe.muon else 3
    other = other_memory(config, size, rank, min(HELD, batch), copies)
    row = step_memory(config, size, batch, rank, recipe) | other
    most = max(row["peak"] + other["decoder"], other["encoding"], other["sheet"])
    tflop = batch * passes(recipe) * forward_tflop(config, size, rank)
    return row | {"most": round(most, 2), "tflop": round(tflop, 1)}


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--recipe", default="sd3.5", choices=RECIPES, help="of train.py (sd3.5)")
    p.add_argument("--base", default="sd3.5-medium", choices=BASES, help="(sd3.5-medium)")
    p.add_argument("--size", type=int, nargs="+", default=[512, 1024], help="pixels (512 1024)")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="(1 4 8)")
    p.add_argument("--rank", type=int, help="of the LoRA (the recipe's)")
    share = "share of the peak that is reached: an assumption (0.4)"
    p.add_argument("--efficiency", type=float, default=0.4, help=share)
    o = p.parse_args()
    o.rank = o.rank or RECIPES[o.recipe].rank
    return o


def main():
    o = options()
    recipe, config = RECIPES[o.recipe], BASES[o.base]
    table, lines = {}, []
    for size in o.size:
        for batch in o.batch:
            row = computed(config, size, batch, o.rank, recipe)
            table[f"{size}x{batch}"] = row
            cells = [row[name] for name in ("peak", "encoding", "sheet", "most", "tflop")]
            cells += [hours(card, row, recipe, o.efficiency) for card in CARDS]
            lines.append(f"| {' | '.join(map(str, [size, batch, *cells]))} |")
            say(o, size, batch, row)
    write_plan(o, recipe, lines)
    what = {"recipe": o.recipe, "base": o.base, "rank": o.rank}
    print(json.dumps(what | {"steps": table}))


if __name__ == "__main__":
    main()
