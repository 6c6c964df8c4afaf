"""AutoencoderKL of the SD3 family in plain torch: pixels in [-1, 1] <-> latents, with diffusers' key names.

Follows the public file format of `vae/` (config.json + safetensors): residual blocks with GroupNorm (eps 1e-6) and SiLU,
one single-head attention in the middle, factor 2 per level. ByG never trains it; tiny/pretrain.py trains the small one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

AT_ONCE = 2**18  # pixels: one picture of 512 x 512 takes the SD3 decoder .7 GiB


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = (
            nn.GroupNorm(groups, c_in, eps=1e-6),
            nn.Conv2d(c_in, c_out, 3, padding=1),
        )
        self.norm2, self.conv2 = (
            nn.GroupNorm(groups, c_out, eps=1e-6),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        h = F.scaled_dot_product_attention(
            *(f(h)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        )[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as SD was trained


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    def __init__(self, c, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)] if attention else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution unless it is the last level."""

    def __init__(self, c_in, c_out, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)]
        )
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for change in [*getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]:
            x = change(x)
        return x


class Encoder(nn.Module):
    def __init__(self, channels, latent, layers, groups, attention, c_in):
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(c_in, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Level(channels[max(i - 1, 0)], c, layers, groups, down=i < last)
                for i, c in enumerate(channels)
            ]
        )
        self.mid_block = MidBlock(channels[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent, 3, padding=1)  # mean | logvar

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, channels, latent, layers, groups, attention, c_out):
        super().__init__()
        channels = channels[::-1]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(latent, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, attention)
        self.up_blocks = nn.ModuleList(
            [
                Level(channels[max(i - 1, 0)], c, layers + 1, groups, up=i < last)
                for i, c in enumerate(channels)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], c_out, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config):
        """config: the dict of diffusers' vae/config.json; absent keys take diffusers' defaults."""
        super().__init__()
        get = config.get
        channels, groups = list(get("block_out_channels", [64])), get("norm_num_groups", 32)
        layers, latent, attention = (
            get("layers_per_block", 1),
            get("latent_channels", 4),
            get("mid_block_add_attention", True),
        )
        self.latent_channels, self.factor = latent, 2 ** (len(channels) - 1)
        self.scaling, self.shift = get("scaling_factor", 0.18215), get("shift_factor") or 0.0
        self.encoder = Encoder(channels, latent, layers, groups, attention, get("in_channels", 3))
        self.decoder = Decoder(channels, latent, layers, groups, attention, get("out_channels", 3))
        if get("use_quant_conv", True):
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        if get("use_post_quant_conv", True):
            self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def moments(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> mean, logvar of the posterior, unscaled, each (B, C, H/f, W/f)."""
        h = self.encoder(pixels)
        return (self.quant_conv(h) if hasattr(self, "quant_conv") else h).chunk(2, dim=1)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> x (B, C, H/f, W/f): the posterior's mean, scaled to about unit variance."""
        parts = pixels.split(max(1, AT_ONCE // (pixels.shape[2] * pixels.shape[3])))
        return (torch.cat([self.moments(part)[0] for part in parts]) - self.shift) * self.scaling

    def decode(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> pixels (B, 3, h*f, w*f), about [-1, 1] (not clamped)."""
        z = x / self.scaling + self.shift
        z = self.post_quant_conv(z) if hasattr(self, "post_quant_conv") else z
        return torch.cat(
            [
                self.decoder(part)
                for part in z.split(max(1, AT_ONCE // (z.shape[2] * z.shape[3] * self.factor**2)))
            ]
        )


def to_pixels(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [-1, 1]"""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) float -> (B, H, W, 3) uint8 numpy array"""
    return (
        ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    )
