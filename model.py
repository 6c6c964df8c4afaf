"""The network: SD3's MMDiT in plain torch, and the adapter that turns it into an image editor.

What is trained is the adapter, a plain dict of tensors (`new_adapter`). It enters in three places:
- LoRA on the attention and MLP projections of every block (`Linear.forward`);
- the source's way in: a second patch projection, through which the clean source latent is added to
  the noisy one (`MMDiT.forward`); the paper's channel concatenation, written as a sum;
- for clips, attention between the frames of one patch, after each block (`temporal`).
The last matrix of each begins at zero, so at step 0 the editor is the base, bit for bit. All else
is frozen (frozen/load.py). A fourth way, `source_gate`, is of the bundled editor's file alone.

One set of weights, three roles, told apart by arguments only: model(x_t, t, prompt) is the frozen
base, the teacher of arXiv 2606.03911; model(x_t, t, prompt, source, adapter) is the editor; and
with the moving average of the adapter it is the bootstrap. Key names and numbers are diffusers'
(SD3Transformer2DModel); SD3, SD3.5-medium and -large differ by their config only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Adapter = dict[str, Tensor]  # new_adapter says what is in it
Prompt = tuple[Tensor, Tensor]  # context (B, L, D_text), pooled (B, P)
T5_ZEROS = 256  # diffusers' default max_sequence_length
TEMPORAL_HEAD = 32  # width of a head of the attention between frames
WIDE = 512  # a base wider than this is no toy: half precision, checkpointing, compile, 20 steps


class Linear(nn.Linear):
    """W x + b and, where an adapter has them, the low-rank path B A x; or, where `merged` has put
    it there, the adapter's weight W + B A in place of W."""

    name = ""  # within the block; set by MMDiT

    def forward(self, x: Tensor, adapter: Adapter) -> Tensor:
        y = F.linear(x, adapter.get(self.name + ".weight", self.weight), self.bias)
        down = adapter.get(self.name + ".lora_A.weight")
        if down is None:
            return y
        return y + F.linear(F.linear(x, down), adapter[self.name + ".lora_B.weight"])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: LayerNorm without weights, then each sample's scale and shift.
    x (B, N, D), shift and scale (B, D)"""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """n vectors of width d for each sample, from the embedding of time and pooled text."""

    def __init__(self, d: int, n: int):
        super().__init__()
        self.n = n
        self.linear = nn.Linear(d, n * d)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(temb)).chunk(self.n, dim=-1)


class FeedForward(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        up = nn.ModuleDict({"proj": Linear(d, 4 * d)})
        self.net = nn.ModuleList([up, nn.Identity(), Linear(4 * d, d)])  # Identity: a dropout

    def forward(self, x: Tensor, adapter: Adapter) -> Tensor:
        h = self.net[0]["proj"](x, adapter)
        return self.net[2](F.gelu(h, approximate="tanh"), adapter)


class Attention(nn.Module):
    """Joint attention of image and text tokens, or of image tokens alone (joint=False)."""

    def __init__(self, d: int, heads: int, qk_norm: str | None, joint=True, last=False):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(d, d)
        self.to_k = Linear(d, d)
        self.to_v = Linear(d, d)
        self.to_out = nn.ModuleList([Linear(d, d)])
        norms = ["norm_q", "norm_k"]
        if joint:
            self.add_q_proj = Linear(d, d)
            self.add_k_proj = Linear(d, d)
            self.add_v_proj = Linear(d, d)
            norms += ["norm_added_q", "norm_added_k"]
        if joint and not last:
            self.to_add_out = Linear(d, d)
        for name in norms:
            norm = nn.RMSNorm(d // heads, eps=1e-6) if qk_norm else nn.Identity()
            setattr(self, name, norm)

    def split(self, h: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, D/H)"""
        return h.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: Tensor, context: Tensor | None, adapter: Adapter
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D), context (B, L, D), its last token the absent T5's"""
        q = self.split(self.to_q(x, adapter))
        k = self.split(self.to_k(x, adapter))
        v = self.split(self.to_v(x, adapter))
        q, k = self.norm_q(q), self.norm_k(k)
        if context is not None:  # image tokens first, then text: (B, H, N + L, D/H)
            q_text = self.split(self.add_q_proj(context, adapter))
            k_text = self.split(self.add_k_proj(context, adapter))
            v_text = self.split(self.add_v_proj(context, adapter))
            q = torch.cat([q, self.norm_added_q(q_text)], 2)
            k = torch.cat([k, self.norm_added_k(k_text)], 2)
            v = torch.cat([v, v_text], 2)
        # under autocast the norms may run in float32, and leave q in another dtype than v
        q, k = q.to(v.dtype), k.to(v.dtype)
        attend = F.scaled_dot_product_attention
        if context is not None:
            attend = with_weight if x.device.type == "cpu" else with_copies
        h = attend(q, k, v)
        h = h.transpose(1, 2).flatten(2)  # (B, N + L, D)
        n = x.shape[1]
        image = self.to_out[0](h[:, :n], adapter)
        if not hasattr(self, "to_add_out"):
            return image, None
        return image, self.to_add_out(h[:, n:], adapter)


# The third text encoder, T5, is absent: 256 zero vectors behind CLIP's. They are identical and stay
# so in all layers, so one token, the last, stands for them; as a key it counts 256 times.
def with_weight(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """log 256 on the last key's logit: the fewest numbers. (B, H, N, D/H) -> the same"""
    bias = torch.zeros(1, 1, 1, k.shape[2], dtype=q.dtype, device=q.device)
    bias[..., -1] = math.log(T5_ZEROS)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def with_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last key and value 256 times, for accelerators: their fastest kernels take no mask, and
    bf16 would round log 256 to 252 tokens. (B, H, N, D/H) -> the same"""
    copies = (-1, -1, T5_ZEROS - 1, -1)
    k = torch.cat([k, k[:, :, -1:].expand(copies)], 2)
    v = torch.cat([v, v[:, :, -1:].expand(copies)], 2)
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self, d: int, heads: int, qk_norm: str | None, dual: bool, last: bool):
        super().__init__()
        self.dual = dual
        self.last = last
        self.norm1 = Modulation(d, 9 if dual else 6)
        self.norm1_context = Modulation(d, 2 if last else 6)
        self.attn = Attention(d, heads, qk_norm, last=last)
        self.ff = FeedForward(d)
        if dual:
            self.attn2 = Attention(d, heads, qk_norm, joint=False)
        if not last:
            self.ff_context = FeedForward(d)

    def forward(
        self, x: Tensor, context: Tensor, temb: Tensor, adapter: Adapter, frames: int
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D) image tokens, context (B, L, D) text tokens -> both, changed; the last
        block's context is None."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(temb)
        if self.last:
            c_scale, c_shift = self.norm1_context(temb)  # in this order, as published
        else:
            c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = self.norm1_context(temb)
        h = modulate(x, shift, scale)
        h_text = modulate(context, c_shift, c_scale)
        h, h_text = self.attn(h, h_text, adapter)
        if self.dual:  # a second attention reads the same x
            shift2, scale2, gate2 = second
            h2 = modulate(x, shift2, scale2)
            h2, _ = self.attn2(h2, None, adapter)
            x = x + gate[:, None] * h + gate2[:, None] * h2
        else:
            x = x + gate[:, None] * h
        h = self.ff(modulate(x, shift_ff, scale_ff), adapter)
        x = temporal(x + gate_ff[:, None] * h, frames, adapter)
        if self.last:
            return x, None
        context = context + c_gate[:, None] * h_text
        h_text = self.ff_context(modulate(context, c_shift_ff, c_scale_ff), adapter)
        return x, context + c_gate_ff[:, None] * h_text


def temporal(x: Tensor, frames: int, adapter: Adapter) -> Tensor:
    """Attention over the frames of one patch, for what they differ in: sum_j a_ij (v_j - v_i). So
    a still clip stays what it was. The paper's video editor needs such layers; here they have not
    been seen to help (docs/clips.md). x (B F, N, D), a clip's frames one after another -> x"""
    if frames == 1 or "temporal.qkv.weight" not in adapter:
        return x
    n, d = x.shape[1:]
    out = adapter["temporal.out.weight"]  # (D, W)
    qk_weight, v_weight = adapter["temporal.qkv.weight"].tensor_split([2 * out.shape[1]])
    h = F.layer_norm(x, (d,), eps=1e-6)
    h = h.unflatten(0, (-1, frames)).transpose(1, 2)  # (B, N, F, D)
    q, k = F.linear(h + frame_positions(frames, d, x), qk_weight).chunk(2, -1)
    v = F.linear(h, v_weight)
    q, k, v = (frame_heads(a) for a in (q, k, v))  # (B N, heads, F, 32)
    h = F.scaled_dot_product_attention(q, k, v) - v
    h = h.transpose(1, 2).flatten(2)  # (B N, F, W)
    h = F.linear(h, out)
    h = h.unflatten(0, (-1, n)).transpose(1, 2)  # (B, F, N, D)
    return x + h.flatten(0, 1)


def frame_heads(a: Tensor) -> Tensor:
    """(B, N, F, W) -> (B N, heads, F, TEMPORAL_HEAD)"""
    return a.flatten(0, 1).unflatten(-1, (-1, TEMPORAL_HEAD)).transpose(1, 2)


def frame_positions(frames: int, d: int, like: Tensor) -> Tensor:
    """The frames' places in time as sines and cosines. -> (F, d), device and dtype of `like`"""
    frequency = 1e3 ** (-torch.arange(d // 2, device=like.device) / (d // 2))
    angle = torch.arange(frames, device=like.device)[:, None] * frequency  # (F, d/2)
    return torch.cat([angle.sin(), angle.cos()], -1).to(like.dtype)


class Embedding(nn.ModuleDict):
    """Two linear layers: time or pooled text, (B, n) -> (B, d)."""

    def __init__(self, n: int, d: int):
        super().__init__({"linear_1": nn.Linear(n, d), "linear_2": nn.Linear(d, d)})

    def forward(self, y: Tensor) -> Tensor:
        y = y.to(self["linear_1"].weight.dtype)
        return self["linear_2"](F.silu(self["linear_1"](y)))


class MMDiT(nn.Module):
    def __init__(self, config: dict):
        """config: the dict of transformer/config.json; absent keys take diffusers' defaults."""
        super().__init__()
        get = config.get
        layers = get("num_layers", 18)
        heads = get("num_attention_heads", 18)
        d = heads * get("attention_head_dim", 64)
        self.width = d
        self.channels = get("in_channels", 16)
        self.patch = get("patch_size", 2)
        self.grid = get("pos_embed_max_size", 96)  # patches of the largest picture's side
        self.sample_size = get("sample_size", 128)  # latent pixels of the usual picture's side
        self.context_dim = get("joint_attention_dim", 4096)
        self.checkpointing = False
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(self.channels, d, self.patch, stride=self.patch)
        self.pos_embed.register_buffer("pos_embed", torch.zeros(1, self.grid**2, d))
        pooled = get("pooled_projection_dim", 2048)
        self.time_text_embed = nn.ModuleDict(
            {"timestep_embedder": Embedding(256, d), "text_embedder": Embedding(pooled, d)}
        )
        self.context_embedder = nn.Linear(self.context_dim, d)
        dual = get("dual_attention_layers") or ()
        self.transformer_blocks = nn.ModuleList(
            Block(d, heads, get("qk_norm"), dual=i in dual, last=i == layers - 1)
            for i in range(layers)
        )
        self.norm_out = Modulation(d, 2)
        self.proj_out = nn.Linear(d, self.patch**2 * (get("out_channels") or self.channels))
        # Names within the block, so that all blocks are one code to torch.compile.
        for block in self.transformer_blocks:
            for name, module in block.named_modules():
                if isinstance(module, Linear):
                    module.name = name

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        prompt: Prompt,
        source: Tensor | None = None,
        adapter: Adapter | None = None,
        frames: int = 1,
    ) -> Tensor:
        """The velocity v (B, C, H, W), which points from data to noise (eps - x).

        x_t (B, C, H, W) noisy latent; t (B,) in [0, 1], 0 clean, 1 noise; prompt: context (B, L,
        D_text) and pooled (B, P) of frozen/text.py; for the editor alone source (B, C, H, W), a
        clean latent, and adapter; frames F: every F samples are one clip."""
        h, w = x_t.shape[-2:]
        size = h // self.patch, w // self.patch
        x = tokens(self.pos_embed.proj(x_t)) + self.positions(*size)  # (B, N, D)
        if source is not None:
            source_tokens = F.conv2d(source, adapter["source_proj.weight"], stride=self.patch)
            x = x + tokens(source_tokens)
        context, pooled = prompt
        embed = self.time_text_embed
        temb = embed["timestep_embedder"](time_frequencies(t))
        temb = temb + embed["text_embedder"](pooled)  # (B, D)
        absent_t5 = (0, self.context_dim - context.shape[-1], 0, 1)  # features, and a token more
        context = self.context_embedder(F.pad(context, absent_t5))  # (B, L + 1, D)
        for block, part in zip(self.transformer_blocks, self.per_block(adapter)):
            x, context = self.run_block(block, x, context, temb, part, frames)
        scale, shift = self.norm_out(temb)  # in this order, as published
        x = modulate(x, shift, scale)
        v = self.unpatchify(self.proj_out(x), size)
        if source is not None and "source_gate.weight" in adapter:  # the bundled editor has one
            share = self.unpatchify(F.linear(x, adapter["source_gate.weight"]), size)
            to_source = (x_t - source) / t[:, None, None, None]  # the velocity that ends there
            v = v + share * (to_source - v)
        return v

    def positions(self, h: int, w: int) -> Tensor:
        """The centre h x w of the sin-cos table. -> (1, h*w, D)"""
        top = (self.grid - h) // 2
        left = (self.grid - w) // 2
        table = self.pos_embed.pos_embed
        table = table.unflatten(1, (self.grid, self.grid))
        centre = table[:, top : top + h, left : left + w]
        return centre.flatten(1, 2)

    def per_block(self, adapter: Adapter | None) -> list[Adapter]:
        """Each block's part of the adapter, by names within the block:
        "transformer_blocks.3.attn.to_q.lora_A.weight" -> [3]["attn.to_q.lora_A.weight"]"""
        parts = [{} for _ in self.transformer_blocks]
        for key, v in (adapter or {}).items():
            if key.startswith("transformer_blocks."):
                _, i, name = key.split(".", 2)
                parts[int(i)][name] = v
        return parts

    def run_block(self, block: Block, *args) -> tuple[Tensor, Tensor | None]:
        """A block, checkpointed where asked. Not by the reentrant kind, which drops the adapter's
        gradient where the inputs need none."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def unpatchify(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Patches back in place. (B, h*w, p*p*C) -> (B, C, h*p, w*p)"""
        p = self.patch
        x = x.unflatten(1, size).unflatten(-1, (p, p, -1))  # (B, h, w, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
        return x.flatten(4, 5).flatten(2, 3)


def tokens(x: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h*w, D)"""
    return x.flatten(2).transpose(1, 2)


def time_frequencies(t: Tensor) -> Tensor:
    """t (B,) in [0, 1] -> cosines and sines of 1000 t (B, 256)"""
    frequency = torch.exp(-math.log(1e4) * torch.arange(128, device=t.device) / 128)
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


# ---- what is trained ----------------------------------------------------------------------------
def new_adapter(model: MMDiT, rank: int, video: bool = False) -> Adapter:
    """LoRA pairs (A random, B zero, scale 1), the zero source projection and, for video, temporal
    attention of a third of the width with a zero output. All in float32; over a base in half
    precision autocast casts them. Drawn on the CPU: a seed means the same on every device."""
    # The last block's text queries cannot reach the picture: its text output is thrown away.
    idle = f"transformer_blocks.{len(model.transformer_blocks) - 1}.attn.add_q_proj"
    adapter = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != idle:
            m, n = module.weight.shape
            r = min(rank, m, n)
            adapter[name + ".lora_A.weight"] = torch.randn(r, n) / n**0.5
            adapter[name + ".lora_B.weight"] = torch.zeros(m, r)
    shape = model.pos_embed.proj.weight.shape  # (D, C, p, p)
    adapter["source_proj.weight"] = torch.zeros(shape)
    if video:
        d = model.width
        heads = max(1, d // 3 // TEMPORAL_HEAD)
        w = heads * TEMPORAL_HEAD
        for i in range(len(model.transformer_blocks)):
            name = f"transformer_blocks.{i}.temporal"
            adapter[name + ".qkv.weight"] = torch.randn(3 * w, d) / d**0.5
            adapter[name + ".out.weight"] = torch.zeros(d, w)
    device = model.proj_out.weight.device
    return {k: v.to(device).requires_grad_() for k, v in adapter.items()}


def merged(model: MMDiT, adapter: Adapter) -> Adapter:
    """The adapter with W + B A in place of each B, A, differentiable: one product a layer in each
    of a rollout's many passes. Left as it is in half precision, where W + B A would lose a small
    B A, and on wide bases, whose weights one does not want twice."""
    weight = model.proj_out.weight
    half = weight.dtype != torch.float32
    half = half or torch.is_autocast_enabled(weight.device.type)
    if half or model.width > WIDE:
        return adapter
    out = {k: v for k, v in adapter.items() if "lora_" not in k}
    for name, module in model.named_modules():
        down = adapter.get(name + ".lora_A.weight")
        if down is not None:
            up = adapter[name + ".lora_B.weight"]
            out[name + ".weight"] = torch.addmm(module.weight, up, down)
    return out
