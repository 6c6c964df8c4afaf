"""The editor: the SD3 family's MMDiT in plain torch, with an adapter that turns it into an image editor.

- One set of weights, three roles, told apart by arguments only: model(x_t, t, prompt) is the frozen base (the teacher),
  model(x_t, t, prompt, source, adapter) is the editor, and with the averaged adapter it is the bootstrap.
- The adapter is a plain dict of tensors: LoRA on every attention and MLP projection, plus a second, zero-initialised
  patch projection through which the clean source latent is added to the noisy one, and a zero-initialised gate that mixes the
  source into the clean prediction, place by place. At step 0 editor and base agree.
- Key names and numbers are diffusers' (SD3Transformer2DModel); SD3, SD3.5-medium and -large differ by config only.
- A clip is its frames, one after another in the batch: every layer of the base sees a frame alone. Between the frames of one place
  goes temporal attention, after each block; it too belongs to the adapter, and begins with a zero output.
- The absent T5 encoder means 256 zero vectors behind the CLIP context. They are identical and stay identical through all
  layers, so one token stands for them, with log 256 added to its attention logit: the same numbers, 255 tokens fewer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Adapter = dict[str, Tensor]  # new_adapter says what is in it
Prompt = tuple[Tensor, Tensor]  # context (B, L, D_text), pooled (B, P)
T5_ZEROS = 256  # diffusers' default max_sequence_length


class Linear(nn.Linear):
    """A linear layer that adds the low-rank path B A x where an adapter is given, or takes the weight W + B A that `merged` made."""

    name = ""  # within the block; set by MMDiT

    def forward(self, x: Tensor, adapter: Adapter) -> Tensor:
        y = F.linear(x, adapter.get(self.name + ".weight", self.weight), self.bias)
        down = adapter.get(self.name + ".lora_A.weight")
        return (
            y
            if down is None
            else y + F.linear(F.linear(x, down), adapter[self.name + ".lora_B.weight"])
        )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: non-affine LayerNorm, then per-sample scale and shift. x (B, N, D), shift and scale (B, D)"""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """n vectors of width d per sample, from the embedding of time and pooled text."""

    def __init__(self, d: int, n: int):
        super().__init__()
        self.n, self.linear = n, nn.Linear(d, n * d)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(temb)).chunk(self.n, dim=-1)


class FeedForward(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.net = nn.ModuleList(
            [nn.ModuleDict({"proj": Linear(d, 4 * d)}), nn.Identity(), Linear(4 * d, d)]
        )

    def forward(self, x: Tensor, adapter: Adapter) -> Tensor:
        return self.net[2](F.gelu(self.net[0]["proj"](x, adapter), approximate="tanh"), adapter)


class Attention(nn.Module):
    """Joint attention of image and text tokens, or of image tokens alone (context=None)."""

    def __init__(
        self, d: int, heads: int, qk_norm: str | None, joint: bool = True, last: bool = False
    ):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(d, d),
            Linear(d, d),
            Linear(d, d),
            nn.ModuleList([Linear(d, d)]),
        )
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                Linear(d, d),
                Linear(d, d),
                Linear(d, d),
            )
            if not last:
                self.to_add_out = Linear(d, d)
        for name in ("norm_q", "norm_k") + ("norm_added_q", "norm_added_k") * joint:
            setattr(self, name, nn.RMSNorm(d // heads, eps=1e-6) if qk_norm else nn.Identity())

    def forward(
        self, x: Tensor, context: Tensor | None, bias: Tensor | None, adapter: Adapter
    ) -> tuple[Tensor, Tensor | None]:
        split = lambda h: h.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B, N, D) -> (B, H, N, D/H)
        q, k = self.norm_q(split(self.to_q(x, adapter))), self.norm_k(split(self.to_k(x, adapter)))
        v = split(self.to_v(x, adapter))
        if context is not None:  # image tokens first, then text
            q = torch.cat([q, self.norm_added_q(split(self.add_q_proj(context, adapter)))], 2)
            k = torch.cat([k, self.norm_added_k(split(self.add_k_proj(context, adapter)))], 2)
            v = torch.cat([v, split(self.add_v_proj(context, adapter))], 2)
            bias = bias.to(q.dtype)
        h = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=bias)
        h = h.transpose(1, 2).flatten(2)  # (B, N + L, D)
        n = x.shape[1]
        text = self.to_add_out(h[:, n:], adapter) if hasattr(self, "to_add_out") else None
        return self.to_out[0](h[:, :n], adapter), text


class Block(nn.Module):
    def __init__(self, d: int, heads: int, qk_norm: str | None, dual: bool, last: bool):
        super().__init__()
        self.dual, self.last = dual, last
        self.norm1, self.norm1_context = (
            Modulation(d, 9 if dual else 6),
            Modulation(d, 2 if last else 6),
        )
        self.attn, self.ff = Attention(d, heads, qk_norm, last=last), FeedForward(d)
        if dual:
            self.attn2 = Attention(d, heads, qk_norm, joint=False)
        if not last:
            self.ff_context = FeedForward(d)

    def forward(
        self, x: Tensor, context: Tensor, temb: Tensor, bias: Tensor, adapter: Adapter, frames: int
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D) image tokens, context (B, L, D) text tokens -> both, changed; context is None after the last."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(temb)
        if self.last:
            c_scale, c_shift = self.norm1_context(temb)  # the last block's order, as published
        else:
            c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = self.norm1_context(temb)
        h, text = self.attn(
            modulate(x, shift, scale), modulate(context, c_shift, c_scale), bias, adapter
        )
        if self.dual:  # reads the same x, before attention
            shift2, scale2, gate2 = second
            h2, _ = self.attn2(modulate(x, shift2, scale2), None, None, adapter)
            x = x + gate[:, None] * h + gate2[:, None] * h2
        else:
            x = x + gate[:, None] * h
        x = temporal(
            x + gate_ff[:, None] * self.ff(modulate(x, shift_ff, scale_ff), adapter),
            frames,
            adapter,
        )
        if self.last:
            return x, None
        context = context + c_gate[:, None] * text
        return x, context + c_gate_ff[:, None] * self.ff_context(
            modulate(context, c_shift_ff, c_scale_ff), adapter
        )


def temporal(x: Tensor, frames: int, adapter: Adapter) -> Tensor:
    """Attention over the frames of one place, for what they differ in: sum_j a_ij (v_j - v_i). So a still clip stays what it was, and
    a single frame exactly. x (B F, N, D); the frames' places in time enter q and k as sines and cosines. -> x, changed"""
    if frames == 1 or "temporal.qkv.weight" not in adapter:
        return x
    n, d = x.shape[1:]
    h = F.layer_norm(x, (d,), eps=1e-6).unflatten(0, (-1, frames)).transpose(1, 2)  # (B, N, F, D)
    place = torch.arange(frames, device=x.device)[:, None] * 1e3 ** (
        -torch.arange(d // 2, device=x.device) / (d // 2)
    )
    qk, v = adapter["temporal.qkv.weight"].tensor_split(
        [adapter["temporal.out.weight"].shape[1] * 2]
    )
    heads = lambda a: a.flatten(0, 1).unflatten(-1, (-1, 32)).transpose(1, 2)  # noqa: E731  (B N, heads, F, 32)
    q, k = map(
        heads, F.linear(h + torch.cat([place.sin(), place.cos()], -1).to(h.dtype), qk).chunk(2, -1)
    )
    v = heads(F.linear(h, v))
    h = (F.scaled_dot_product_attention(q, k, v) - v).transpose(1, 2).flatten(2)  # (B N, F, W)
    return x + F.linear(h, adapter["temporal.out.weight"]).unflatten(0, (-1, n)).transpose(
        1, 2
    ).flatten(0, 1)


class MMDiT(nn.Module):
    def __init__(self, config: dict):
        """config: the dict of transformer/config.json; absent keys take diffusers' defaults."""
        super().__init__()
        get = config.get
        layers, heads = get("num_layers", 18), get("num_attention_heads", 18)
        d = self.width = heads * get("attention_head_dim", 64)
        self.channels, self.patch, self.context_dim = (
            get("in_channels", 16),
            get("patch_size", 2),
            get("joint_attention_dim", 4096),
        )
        self.grid, self.sample_size, self.checkpointing = (
            get("pos_embed_max_size", 96),
            get("sample_size", 128),
            False,
        )
        dual, qk_norm = get("dual_attention_layers") or (), get("qk_norm")
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(self.channels, d, self.patch, stride=self.patch)
        self.pos_embed.register_buffer("pos_embed", torch.zeros(1, self.grid**2, d))
        pair = lambda n: nn.ModuleDict({"linear_1": nn.Linear(n, d), "linear_2": nn.Linear(d, d)})  # noqa: E731
        self.time_text_embed = nn.ModuleDict(
            {
                "timestep_embedder": pair(256),
                "text_embedder": pair(get("pooled_projection_dim", 2048)),
            }
        )
        self.context_embedder = nn.Linear(self.context_dim, d)
        self.transformer_blocks = nn.ModuleList(
            Block(d, heads, qk_norm, i in dual, i == layers - 1) for i in range(layers)
        )
        self.norm_out = Modulation(d, 2)
        self.proj_out = nn.Linear(d, self.patch**2 * (get("out_channels") or self.channels))
        for block in (
            self.transformer_blocks
        ):  # names within the block: all blocks are then one code to torch.compile
            for name, module in block.named_modules():
                if isinstance(module, Linear):
                    module.name = name

    def positions(self, h: int, w: int) -> Tensor:
        """The centre h x w of the sin-cos table. -> (1, h*w, D)"""
        top, left = (self.grid - h) // 2, (self.grid - w) // 2
        table = self.pos_embed.pos_embed.unflatten(1, (self.grid, self.grid))
        return table[:, top : top + h, left : left + w].flatten(1, 2)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        prompt: Prompt,
        source: Tensor | None = None,
        adapter: Adapter | None = None,
        frames: int = 1,
    ) -> Tensor:
        """The velocity v, which points from data to noise (eps - x).

        x_t (B, C, H, W) noisy latent; t (B,) in [0, 1], 0 clean, 1 noise; prompt: context (B, L, D_text) and pooled
        (B, P) from frozen/text.py; source (B, C, H, W) clean latent and adapter (dict), for the editor only; frames F: every F
        samples are one clip.
        """
        p, (h, w) = self.patch, (x_t.shape[-2] // self.patch, x_t.shape[-1] // self.patch)
        context, pooled = prompt
        x = self.pos_embed.proj(x_t).flatten(2).transpose(1, 2) + self.positions(
            h, w
        )  # (B, h*w, D)
        if source is not None:
            x = x + F.conv2d(source, adapter["source_proj.weight"], stride=p).flatten(2).transpose(
                1, 2
            )
        frequency = torch.exp(-math.log(1e4) * torch.arange(128, device=t.device) / 128)
        angle = 1000 * t.float()[:, None] * frequency  # (B, 128)
        embed = lambda m, y: m["linear_2"](F.silu(m["linear_1"](y.to(m["linear_1"].weight.dtype))))  # noqa: E731
        temb = embed(
            self.time_text_embed["timestep_embedder"], torch.cat([angle.cos(), angle.sin()], -1)
        ) + embed(self.time_text_embed["text_embedder"], pooled)  # (B, D)
        context = F.pad(
            context, (0, self.context_dim - context.shape[-1], 0, 1)
        )  # + one token of T5's zeros
        context = self.context_embedder(context)  # (B, L + 1, D)
        bias = torch.zeros(1, 1, 1, x.shape[1] + context.shape[1], device=x.device)
        bias[..., -1] = math.log(T5_ZEROS)
        for block, part in zip(
            self.transformer_blocks, per_block(adapter, len(self.transformer_blocks))
        ):
            args = (x, context, temb, bias, part, frames)
            keep = self.checkpointing and torch.is_grad_enabled()
            # non-reentrant: the reentrant kind drops the adapter's gradient where the inputs need none
            x, context = checkpoint(block, *args, use_reentrant=False) if keep else block(*args)
        scale, shift = self.norm_out(temb)
        x = modulate(x, shift, scale)
        unfold = lambda y: (
            y.unflatten(1, (h, w))
            .unflatten(-1, (p, p, -1))
            .permute(0, 5, 1, 3, 2, 4)
            .flatten(4, 5)
            .flatten(2, 3)
        )  # noqa: E731
        v = unfold(self.proj_out(x))  # (B, h*w, p*q*C) -> (B, C, H, W)
        if source is None:
            return v
        # The gate m: how much of the clean prediction x_t - t v is the source itself. So copying need not be learnt.
        m = unfold(F.linear(x, adapter["source_gate.weight"]))
        return v + m * ((x_t - source) / t[:, None, None, None] - v)


def sincos(d: int, size: int, base: float = 1e4) -> Tensor:
    """The 2-D sin-cos position table for a square grid. -> (1, size*size, d)"""
    omega = base ** (-torch.arange(d // 4) / (d // 4))
    angle = torch.arange(size)[:, None] * omega  # (size, d/4)
    one = torch.cat([angle.sin(), angle.cos()], -1)  # (size, d/2)
    return torch.cat(
        [one[None].expand(size, -1, -1), one[:, None].expand(-1, size, -1)], -1
    ).flatten(0, 1)[None]


# ---- the adapter -----------------------------------------------------------------------------------------------
def new_adapter(model: MMDiT, rank: int, video: bool = False) -> Adapter:
    """LoRA pairs (A random, B zero, so alpha = rank and no scale), the zero source projection and gate and, for video, temporal attention
    of a third of the width, in heads of 32, with a zero output; in float32."""
    adapter, device = {}, model.proj_out.weight.device
    for name, module in model.named_modules():
        # the last block's text queries cannot reach the picture: its text output is thrown away
        if (
            isinstance(module, Linear)
            and name != f"transformer_blocks.{len(model.transformer_blocks) - 1}.attn.add_q_proj"
        ):
            r = min(rank, *module.weight.shape)
            adapter[name + ".lora_A.weight"] = (
                torch.randn(r, module.in_features, device=device) / module.in_features**0.5
            )
            adapter[name + ".lora_B.weight"] = torch.zeros(module.out_features, r, device=device)
    adapter["source_proj.weight"] = torch.zeros_like(
        model.pos_embed.proj.weight, dtype=torch.float32
    )
    adapter["source_gate.weight"] = torch.zeros_like(model.proj_out.weight, dtype=torch.float32)
    for i in range(len(model.transformer_blocks) if video else 0):
        d, w = model.width, max(32, model.width // 96 * 32)
        adapter[f"transformer_blocks.{i}.temporal.qkv.weight"] = (
            torch.randn(3 * w, d, device=device) / d**0.5
        )
        adapter[f"transformer_blocks.{i}.temporal.out.weight"] = torch.zeros(d, w, device=device)
    return {k: v.requires_grad_() for k, v in adapter.items()}


def merged(model: MMDiT, adapter: Adapter) -> Adapter:
    """The adapter with W + B A in place of each B, A, differentiable: in float32 cheaper than the detour through the low rank, if
    it is used for many tokens or passes. The adapter stays as it is in half precision, where W + B A would lose a small B A, and on
    large bases, whose weights one does not want twice."""
    weight = model.proj_out.weight
    if (
        model.width > 512
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled(weight.device.type)
    ):
        return adapter
    out = {k: v for k, v in adapter.items() if "lora_" not in k}
    for name, module in model.named_modules():
        if (down := adapter.get(name + ".lora_A.weight")) is not None:
            out[name + ".weight"] = torch.addmm(
                module.weight, adapter[name + ".lora_B.weight"], down
            )
    return out


def fold(model: MMDiT, adapter: Adapter) -> Adapter:
    """Adds every B A to the base's own weight, for an editor beside which the base itself is asked no more: its passes then cost what the
    base's do, and no weight is there twice. Half precision rounds the sums as it has rounded the weights. -> what is left of the adapter: the
    source's ways in and temporal attention"""
    for name, module in model.named_modules():
        if (down := adapter.get(name + ".lora_A.weight")) is not None:
            weight = torch.addmm(module.weight.float(), adapter[name + ".lora_B.weight"], down)
            module.weight = nn.Parameter(
                weight.to(module.weight), requires_grad=False
            )  # a new one: the old may be a mapped file
    return {k: v for k, v in adapter.items() if "lora_" not in k}


def per_block(adapter: Adapter | None, n: int) -> list[Adapter]:
    """The adapter of each of n blocks, empty where there is none, by names within the block:
    "transformer_blocks.3.attn.to_q.lora_A.weight" -> [3]["attn.to_q.lora_A.weight"]"""
    parts = [{} for _ in range(n)]
    for key, v in (adapter or {}).items():
        if key.startswith("transformer_blocks."):
            _, i, name = key.split(".", 2)
            parts[int(i)][name] = v
    return parts


# ---- reading a base --------------------------------------------------------------------------------------------
