"""How good is the embedded base? Reconstruction, and whether a generated picture shows what its caption says.

    python bench/base.py --n 256 --seed 5

The geometry of a generated picture is unknown, so the renderer cannot judge it. Instead a small convolutional reader is
trained here, on freshly drawn scenes only (never on generated pictures), to tell season, time and house colour; its own
accuracy on held-out scenes is printed first. Captions name all three, style plain. Writes a contact sheet beside the
figures; the last line is one JSON object.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import scenes  # noqa: E402
from frozen.load import load_base  # noqa: E402
from frozen.vae import to_images, to_pixels  # noqa: E402
from routing import time_grid  # noqa: E402
from sample import generate  # noqa: E402

KINDS = ("season", "time", "house")


def draw(rng, n):
    world = [scenes.sample_scene(rng, style="plain") for _ in range(n)]
    labels = torch.tensor(
        [[scenes.ATTRIBUTES[k].index(getattr(s, k)) for k in KINDS] for s in world]
    )
    return world, to_pixels(np.stack([scenes.render(s) for s in world])), labels


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        conv = lambda a, b: [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]  # noqa: E731
        self.body = nn.Sequential(
            *conv(3, 32), *conv(32, 64), *conv(64, 128), nn.AdaptiveMaxPool2d(2), nn.Flatten()
        )
        self.heads = nn.ModuleList(nn.Linear(512, len(scenes.ATTRIBUTES[k])) for k in KINDS)

    def forward(self, pixels):
        h = self.body(pixels)
        return [head(h) for head in self.heads]


def train_reader(rng, steps):
    reader = Reader()
    opt = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    for _ in range(steps):
        _, pixels, labels = draw(rng, 64)
        pixels = pixels + 0.06 * torch.rand(64, 1, 1, 1) * torch.randn_like(
            pixels
        )  # generated pictures are not as clean
        loss = sum(F.cross_entropy(y, labels[:, i]) for i, y in enumerate(reader(pixels)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return reader.eval()


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--base", default="tiny")
    p.add_argument("--n", type=int, default=256)
    p.add_argument("--seed", type=int, default=5)
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--reader-steps", type=int, default=500)
    p.add_argument("--out", default=str(ROOT / "tiny" / "contact_sheet.png"))
    o = p.parse_args()
    torch.manual_seed(o.seed)
    rng = np.random.default_rng((o.seed, 2))
    reader = train_reader(rng, o.reader_steps)
    model, vae, text, shift = load_base(o.base)
    with torch.no_grad():
        world, pixels, labels = draw(rng, o.n)
        agree = lambda x: {
            k: round((y.argmax(1) == labels[:, i]).float().mean().item(), 4)  # noqa: E731
            for i, (k, y) in enumerate(zip(KINDS, reader(x)))
        }
        decoded = vae.decode(vae.encode(pixels)).clamp(-1, 1)
        psnr = (10 * torch.log10(4 / ((decoded - pixels) ** 2).mean((1, 2, 3)))).mean().item()
        print(
            f"reader on {o.n} held-out drawn scenes: {agree(pixels)}; on their reconstructions: {agree(decoded)}"
        )
        print(f"autoencoder on those scenes: {psnr:.2f} dB")
        captions, drawn = [scenes.caption(s, rng, drop=0.0) for s in world], []
        for i in range(0, o.n, 32):
            some = captions[i : i + 32]
            eps = torch.randn(len(some), model.channels, model.sample_size, model.sample_size)
            null = tuple(a.expand(len(some), *a.shape[1:]) for a in text([""]))
            drawn.append(
                vae.decode(
                    generate(model, text(some), null, eps, time_grid(o.steps, shift), o.guidance)
                ).clamp(-1, 1)
            )
        drawn = torch.cat(drawn)
        read = agree(drawn)
    pictures = to_images(drawn[:48])
    scenes.sheet([list(pictures[i : i + 12]) for i in range(0, len(pictures), 12)]).save(o.out)
    print(f"contact sheet of the first {len(pictures)}: {o.out}; first captions: {captions[:3]}")
    print(
        json.dumps(
            {
                "reconstruction_db": round(psnr, 2),
                "agreement": read,
                "mean_agreement": round(sum(read.values()) / 3, 4),
                "n": o.n,
                "seed": o.seed,
                "guidance": o.guidance,
            }
        )
    )


if __name__ == "__main__":
    main()
