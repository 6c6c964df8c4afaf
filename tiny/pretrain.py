"""The embedded base, from scratch on two CPU cores: world -> autoencoder -> MMDiT with its text
encoders.

    python tiny/pretrain.py render --n 60000    # pictures and their records, in tiny/work: minutes
    python tiny/pretrain.py vae --minutes 12    # the autoencoder; then encodes every picture once
    python tiny/pretrain.py flow --minutes 60   # flow matching; run again to go on where it stopped
    python tiny/pretrain.py export              # writes tiny/checkpoint, in diffusers' layout
    python tiny/pretrain.py restore             # after render: the committed checkpoint, to go on

Every stage saves to tiny/work and continues from there; Ctrl-C loses at most a minute.
"""

import argparse
import json
import math
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import scenes  # noqa: E402
from frozen.load import load_base  # noqa: E402
from frozen.text import CLIPText, Text, Tokenizer, byte_symbols, split_words  # noqa: E402
from frozen.vae import VAE, to_pixels  # noqa: E402
from model import MMDiT, sincos  # noqa: E402
from train import Muon  # noqa: E402

WORK = ROOT / "tiny" / "work"
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "sample_size": 64,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "force_upcast": True,
}

TOKENS = 24  # longest caption of the world has 23 words
MMDIT_CONFIG = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "joint_attention_dim": 256,
    "caption_projection_dim": 192,
    "pooled_projection_dim": 256,
    "pos_embed_max_size": 16,
    "dual_attention_layers": [],
    "qk_norm": "rms_norm",
}
CLIP_CONFIG = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 2.0,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save(tensors, path, **meta):
    tmp = path.with_suffix(".tmp")
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    save_file(tensors, tmp, {k: str(v) for k, v in meta.items()})
    tmp.replace(path)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2))


def begins(prefix, tensors):
    """The tensors whose names begin with prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def records(n, seed=0):
    """The n scenes of the training world, one generator each: scene i never depends on n."""
    return [scenes.sample_scene(np.random.default_rng((seed, i))) for i in range(n)]


def cmd_render(args):
    WORK.mkdir(parents=True, exist_ok=True)
    out = np.lib.format.open_memmap(WORK / "images.npy", "w+", np.uint8, (args.n, 64, 64, 3))
    for i, scene in enumerate(records(args.n)):
        out[i] = scenes.render(scene)
    out.flush()


def cmd_vae(args):
    images = np.load(WORK / "images.npy", mmap_mode="r")
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).to(memory_format=torch.channels_last)
    if (WORK / "vae.safetensors").exists():
        vae.load_state_dict(load_file(WORK / "vae.safetensors"))
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    opt = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    step, start, rng = 0, time.time(), np.random.default_rng(time.time_ns())

    def loss_of(pixels):
        mean, logvar = vae.moments(pixels)
        logvar = logvar.float().clamp(-12, 4)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        error = vae.decoder(z).float() - pixels
        kl = 0.5 * (mean.float() ** 2 + logvar.exp() - 1 - logvar).mean()
        return (error**2).mean(), error.abs().mean(), kl

    while (gone := (time.time() - start) / 60 / args.minutes) < 1:
        cosine = 0.5 * (1 + math.cos(math.pi * gone))
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        picked = images[np.sort(rng.integers(0, len(images), 16))]
        pixels = to_pixels(picked).to(memory_format=torch.channels_last)
        mse, l1, kl = loss_of(pixels)
        loss = mse + 0.2 * l1 + 5e-5 * kl
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        with torch.no_grad():
            for k, v in vae.state_dict().items():
                average[k].lerp_(v, 1 - decay)
        if step % 100 == 0:
            psnr, seconds = 10 * math.log10(4 / mse.item()), time.time() - start
            print(f"{step} {seconds:.0f}s psnr {psnr:.2f} kl {kl.item():.2f}", flush=True)
    vae.load_state_dict(average)
    z = encode_all(vae, images)
    shift, scaling = round(z.mean().item(), 5), round(1 / z.std().item(), 5)
    spread = [round(s, 2) for s in z.std((0, 2, 3)).tolist()]
    print(f"shift {shift} scaling {scaling} channel std {spread}")
    latents = (z - shift) * scaling  # zero mean, unit variance
    np.save(WORK / "latents.npy", latents.half().numpy())
    write_json(WORK / "vae.json", VAE_CONFIG | {"shift_factor": shift, "scaling_factor": scaling})
    decoded = vae.decoder(z[:200]).clamp(-1, 1)
    error = F.mse_loss(decoded, to_pixels(images[:200]), reduction="none").mean((1, 2, 3))
    print(f"reconstruction {(10 * torch.log10(4 / error)).mean():.2f} dB")
    save(vae.state_dict(), WORK / "vae.safetensors")


@torch.no_grad()
def encode_all(vae, images):
    """Encodes the whole world once. -> (n, 8, 16, 16), not yet normalised"""
    out = []
    for i in range(0, len(images), 250):
        out.append(vae.moments(to_pixels(images[i : i + 250]))[0].half())
    return torch.cat(out).float()


def count_words():
    """How often each word occurs in captions and wishes of the world."""
    rng, words = np.random.default_rng(0), {}
    for scene in records(4000, seed=7):
        texts = scenes.caption(scene, rng), scenes.wish(scene, rng)
        for text in (*texts, "change remove add the trees undo it"):
            for word in split_words(text):
                words[word] = words.get(word, 0) + 1
    return words


def learn_merges(words):
    """Byte-pair merges until every word is one symbol. -> [(left, right), ...]"""
    parts = {w: [*w[:-1], w[-1] + "</w>"] for w in words}  # the world's words are plain ASCII
    merges = []
    while True:
        pairs = {}
        for w, p in parts.items():
            for pair in zip(p, p[1:]):
                pairs[pair] = pairs.get(pair, 0) + words[w]
        if not pairs:
            return merges
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for p in parts.values():
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = ["".join(best)]
                i += 1


def make_tokenizers(folder):
    """Byte-pair merges learnt from the world's own words, written in CLIP's format: one token per
    word of the world. -> vocabulary"""
    merges = learn_merges(count_words())
    symbols = list(byte_symbols().values())
    vocab = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = json.dumps({v: i for i, v in enumerate(vocab)}, ensure_ascii=False)
    lines = "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n"
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "vocab.json").write_text(ids, "utf-8")
        (path / "merges.txt").write_text(lines, "utf-8")
        special = {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": pad,
        }
        write_json(path / "special_tokens_map.json", special)
        kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}
        write_json(path / "tokenizer_config.json", kind | {"do_lower_case": True} | special)
    return vocab


def build():
    vocab = make_tokenizers(WORK)
    end = len(vocab) - 1
    words = {"vocab_size": len(vocab), "bos_token_id": end - 1, "eos_token_id": end}
    configs = []
    for act, pad in (("quick_gelu", end), ("gelu", 0)):
        configs.append(CLIP_CONFIG | words | {"hidden_act": act, "pad_token_id": pad})
    tokenizers = [Tokenizer(WORK / n) for n in ("tokenizer", "tokenizer_2")]
    text = Text(tokenizers, [CLIPText(c) for c in configs])
    model = MMDiT(MMDIT_CONFIG)
    table = sincos(model.width, model.grid, base=100.0)  # 8 x 8 tokens: no need for base 1e4
    model.pos_embed.pos_embed.copy_(table)
    for name, p in list(model.named_parameters()) + list(text.named_parameters()):
        if "embedding.weight" in name:
            torch.nn.init.normal_(p, std=0.5 if "token" in name else 0.1)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif "norm" not in name:
            torch.nn.init.zeros_(p)
    for name, p in model.named_parameters():  # adaLN-zero: every block begins as identity
        if name.startswith(("norm_out", "proj_out")) or ".norm1" in name:
            torch.nn.init.zeros_(p)
    return model, text, configs


def save_flow(state, both, average, step):
    tensors = {f"now.{k}": v for k, v in both.state_dict().items()}
    tensors |= {f"avg.{k}": v for k, v in average.items()}
    save(tensors | {"step": torch.tensor(step)}, state)


def words_for(scene, u, rng):
    """The text of a sample, by its u in [0, 1]: 10 % none, 20 % wishes, else captions."""
    if u < 0.1:
        return ""
    if u < 0.3:
        return scenes.wish(scene, rng)
    return scenes.caption(scene, rng)


def flow_optimizers(both, lr):
    """Muon for the blocks' matrices, AdamW for all else."""
    hidden, ids = [], set()
    for n, p in both["model"].transformer_blocks.named_parameters():
        if p.ndim == 2 and ".norm" not in n:
            hidden.append(p)
            ids.add(id(p))
    rest = [p for p in both.parameters() if id(p) not in ids]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(hidden, lr=lr, weight_decay=0.01), adamw]


def cmd_flow(args):
    """Flow matching: x_t = (1-t) x + t eps, target eps - x, logit-normal t."""
    torch.manual_seed(0)
    latents = torch.from_numpy(np.load(WORK / "latents.npy"))
    world = records(len(latents))
    plain = np.array([s.style == "plain" for s in world])
    share = np.where(plain, 1.0, 0.35)  # the plain style is what must be best
    share /= share.sum()
    model, text, _ = build()
    both = torch.nn.ModuleDict({"model": model, "text": text})
    opts = flow_optimizers(both, args.lr)
    average = {k: v.clone() for k, v in both.state_dict().items()}
    step, state = 0, WORK / "flow.safetensors"
    if state.exists():  # weights and average; the optimizers warm up anew
        saved = load_file(state)
        both.load_state_dict(begins("now.", saved))
        average = begins("avg.", saved)
        step = int(saved["step"])
    for block in model.transformer_blocks:
        block.compile()
    begun, start, rng, losses = step, time.time(), np.random.default_rng(time.time_ns()), []
    while (gone := (time.time() - start) / 60 / args.minutes) < 1:
        lr = args.lr * min(1, (step - begun + 1) / 60) * min(1, max(0.02, (1 - gone) / args.cool))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr
        pick = rng.choice(len(latents), args.batch, p=share)
        u = rng.random(args.batch)
        texts = [words_for(world[i], r, rng) for i, r in zip(pick, u)]
        ids = [tokenizer(texts) for tokenizer in text.tokenizers]
        x = latents[pick].float()
        eps = torch.randn_like(x)
        t = torch.sigmoid(torch.randn(len(x)) + math.log(2))  # shifted by 2, as sampling is
        x_t = torch.lerp(x, eps, t[:, None, None, None])
        v = model(x_t, t, text.encode(ids))
        loss = F.mse_loss(v, eps - x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        losses.append(loss.item())
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for k, v in both.state_dict().items():
                average[k].lerp_(v, 1 - decay)
        if step % 50 == 0:
            seconds, recent = time.time() - start, np.mean(losses[-200:])
            print(f"{step} {seconds:.0f}s loss {recent:.4f} lr {lr:.1e}", flush=True)
        if step % 100 == 0:
            save_flow(state, both, average, step)
    save_flow(state, both, average, step)


def cmd_restore(args):
    """tiny/checkpoint -> tiny/work: what `vae` and `flow` would have left, so that another sitting
    of `flow` can follow."""
    model, vae, text, _ = load_base("tiny")
    make_tokenizers(WORK)
    z = encode_all(vae, np.load(WORK / "images.npy", mmap_mode="r"))
    np.save(WORK / "latents.npy", ((z - vae.shift) * vae.scaling).half().numpy())
    save(vae.state_dict(), WORK / "vae.safetensors")
    config = ROOT / "tiny" / "checkpoint" / "vae" / "config.json"
    (WORK / "vae.json").write_text(config.read_text())
    both = torch.nn.ModuleDict({"model": model, "text": text})
    average = {k: v.clone() for k, v in both.state_dict().items()}
    save_flow(WORK / "flow.safetensors", both, average, args.step)


def cmd_export(args):
    """tiny/work -> tiny/checkpoint in diffusers layout, float16."""
    out = pathlib.Path(args.out)
    _, _, configs = build()
    make_tokenizers(out)
    average = begins("avg.", load_file(WORK / "flow.safetensors"))
    vae_config = json.loads((WORK / "vae.json").read_text())
    diffusion, clip = "diffusion_pytorch_model.safetensors", "model.safetensors"
    parts = [
        ("transformer", begins("model.", average), MMDIT_CONFIG, diffusion),
        ("vae", load_file(WORK / "vae.safetensors"), vae_config, diffusion),
    ]
    for i, name in enumerate(("text_encoder", "text_encoder_2")):
        weights = {}
        for k, v in begins(f"text.encoders.{i}.", average).items():
            prefix = "" if k.startswith("text_proj") else "text_model."
            weights[prefix + k] = v
        parts.append((name, weights, configs[i], clip))
    for name, weights, config, file in parts:
        (out / name).mkdir(parents=True, exist_ok=True)
        save({k: v.half() for k, v in weights.items()}, out / name / file, format="pt")
        write_json(out / name / "config.json", config)
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(out / "model_index.json", MODEL_INDEX)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", choices=["render", "vae", "flow", "export", "restore"])
    parser.add_argument("--n", type=int, default=60000, help="scenes in the training world")
    sitting = "of wall clock for this sitting"
    parser.add_argument("--minutes", type=float, default=12.0, help=sitting)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=128, help="of flow")
    falls = "the last share of the sitting in which flow's rate falls to 0"
    parser.add_argument("--cool", type=float, default=0.35, help=falls)
    parser.add_argument("--ema", type=float, default=0.995, help="decay of flow's weight average")
    behind = "of restore: how many steps the committed checkpoint has behind it"
    parser.add_argument("--step", type=int, default=7545, help=behind)
    parser.add_argument("--out", default=str(ROOT / "tiny" / "checkpoint"), help="of export")
    args = parser.parse_args()
    globals()["cmd_" + args.stage](args)


if __name__ == "__main__":
    main()
