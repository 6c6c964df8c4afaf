"""Prompts -> (context, pooled): the two CLIP text encoders of SD3 and their byte-level BPE, in plain torch.

context is [CLIP-1 | CLIP-2] of the last but one layer, (B, L, D1 + D2); pooled is both projected end-of-text states,
(B, P1 + P2). The third encoder (T5) is absent by design: model.py puts its zeros behind the context.
"""

import functools
import json
import pathlib
import re
import unicodedata

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTRACTIONS = ("'re", "'ve", "'ll", "'s", "'t", "'m", "'d")


@functools.cache
def byte_symbols():
    """GPT-2's reversible map from the 256 bytes to printable characters, in vocabulary order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return dict(zip(printable + rest, map(chr, printable + [256 + i for i in range(len(rest))])))


def split_words(text: str) -> list[str]:
    """CLIP's pre-tokenisation: lower case, NFC; runs of letters, single digits, runs of other signs, contractions."""
    text, words, i = unicodedata.normalize("NFC", text).lower(), [], 0
    kind = lambda c: (
        " " if c.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "O")
    )  # noqa: E731
    while i < len(text):
        found = next((c for c in CONTRACTIONS if text.startswith(c, i)), None)
        j = i + len(found) if found else i + 1
        if not found and (k := kind(text[i])) in "LO":
            while j < len(text) and kind(text[j]) == k:
                j += 1
        if not text[i].isspace():
            words.append(text[i:j])
        i = j
    return words


class Tokenizer:
    """CLIP's byte-level BPE from a tokenizer folder: vocab.json and merges.txt, or tokenizer.json alone."""

    def __init__(self, folder: str | pathlib.Path):
        folder = pathlib.Path(folder)
        if (folder / "vocab.json").exists():
            self.vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            merges = [
                line.split() for line in (folder / "merges.txt").read_text("utf-8").splitlines()
            ]
            merges = [m for m in merges if len(m) == 2]  # the first line is a version comment
        else:
            bpe = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
            self.vocab = bpe["vocab"]
            merges = [m.split() if isinstance(m, str) else m for m in bpe["merges"]]
        if not all(isinstance(n, int) and n >= 0 for n in self.vocab.values()):
            raise ValueError("an entry of the vocabulary is no number")
        self.rank = {tuple(m): i for i, m in enumerate(merges)}
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text("utf-8")) if file.exists() else {}
        self.length = min(int(config.get("model_max_length", 77)), 77)
        pad = config.get("pad_token") or "<|endoftext|>"
        self.begin, self.end = self.vocab["<|startoftext|>"], self.vocab["<|endoftext|>"]
        pad = pad["content"] if isinstance(pad, dict) else pad
        self.pad = self.vocab.get(pad, self.end)
        # special tokens are found in the raw text, before anything else; SD3's second tokenizer pads with "!", so that is one
        self.special = re.compile(
            "(" + "|".join(map(re.escape, {"<|startoftext|>", "<|endoftext|>", pad})) + ")"
        )
        self.words = {}

    def word(self, word: str) -> list[int]:
        """Merges the pair of lowest rank until none is left. str -> list of ids"""
        if word not in self.words:
            parts = [byte_symbols()[b] for b in word.encode("utf-8", "replace")]
            parts[-1] += "</w>"
            while len(parts) > 1:
                rank, i = min(
                    (self.rank.get(p, float("inf")), i) for i, p in enumerate(zip(parts, parts[1:]))
                )
                if rank == float("inf"):
                    break
                pair, merged = (parts[i], parts[i + 1]), []
                while parts:
                    two = tuple(parts[:2]) == pair
                    merged.append("".join(parts[: 1 + two]))
                    parts = parts[1 + two :]
                parts = merged
            self.words[word] = [self.vocab.get(p, self.end) for p in parts]
        return self.words[word]

    def __call__(self, texts: list[str]) -> Tensor:
        """list of B strings -> ids (B, L) int64, cut and padded to the model's length."""
        rows = []
        for text in texts:
            ids = []
            for i, part in enumerate(self.special.split(text)):  # odd parts are the special tokens
                ids += (
                    [self.vocab[part]]
                    if i % 2
                    else [n for w in split_words(part) for n in self.word(w)]
                )
            ids = ids[: self.length - 2]
            rows.append(([self.begin, *ids, self.end] + [self.pad] * self.length)[: self.length])
        return torch.tensor(rows)


class Layer(nn.Module):
    def __init__(self, d, heads, hidden, act, eps):
        super().__init__()
        self.heads, self.act = heads, act
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d, eps=eps), nn.LayerNorm(d, eps=eps)
        self.self_attn = nn.ModuleDict(
            {k: nn.Linear(d, d) for k in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, hidden), "fc2": nn.Linear(hidden, d)})

    def forward(self, x):
        h, a = self.layer_norm1(x), self.self_attn
        q, k, v = (
            a[n](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, L, D/H)
        x = x + a["out_proj"](h.transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.act == "quick_gelu" else F.gelu(h)
        return x + self.mlp["fc2"](h)


class CLIPText(nn.Module):
    def __init__(self, config):
        """config: the dict of text_encoder/config.json; absent keys take transformers' CLIPTextConfig defaults."""
        super().__init__()
        get = config.get
        d, eps = get("hidden_size", 512), get("layer_norm_eps", 1e-5)
        # the plain constructor would draw random weights, nobody's need, and on the meta device import the compiler for it: 2 seconds
        table = lambda n: nn.Embedding.from_pretrained(torch.empty(n, d), freeze=False)  # noqa: E731
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": table(get("vocab_size", 49408)),
                "position_embedding": table(get("max_position_embeddings", 77)),
            }
        )
        self.encoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(
                    Layer(
                        d,
                        get("num_attention_heads", 8),
                        get("intermediate_size", 2048),
                        get("hidden_act", "quick_gelu"),
                        eps,
                    )
                    for _ in range(get("num_hidden_layers", 12))
                )
            }
        )
        self.final_layer_norm = nn.LayerNorm(d, eps=eps)
        self.text_projection = nn.Linear(d, get("projection_dim", 512), bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> hidden state before the last layer (B, L, D), pooled (B, P)"""
        x = (
            self.embeddings["token_embedding"](ids)
            + self.embeddings["position_embedding"].weight[: ids.shape[1]]
        )
        for layer in self.encoder["layers"]:
            before, x = x, layer(x)
        end = self.final_layer_norm(x)[
            torch.arange(len(ids)), ids.argmax(1)
        ]  # end-of-text has the highest id
        return before, self.text_projection(end)


class Text(nn.Module):
    """Both encoders with their tokenizers."""

    def __init__(self, tokenizers, encoders):
        super().__init__()
        self.tokenizers, self.encoders = tokenizers, nn.ModuleList(encoders)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """list of B strings -> context (B, L, D1 + D2), pooled (B, P1 + P2)"""
        device = self.encoders[0].text_projection.weight.device
        return self.encode([tokenizer(texts).to(device) for tokenizer in self.tokenizers])

    def encode(self, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
        """ids: one (B, L) tensor per encoder."""
        context, pooled = zip(*(encoder(i) for encoder, i in zip(self.encoders, ids)))
        return torch.cat(context, -1), torch.cat(pooled, -1)
