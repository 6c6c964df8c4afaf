"""Prompts -> (context, pooled): SD3's two CLIP text encoders and their byte-level BPE, plain torch.

context (B, L, D1 + D2): the penultimate layers of CLIP-1 and CLIP-2, side by side.
pooled (B, P1 + P2): both projected end-of-text states.
The third encoder (T5) is absent by design: model.py puts its zeros behind the context.
"""

import functools
import itertools
import json
import math
import pathlib
import re
import unicodedata

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTRACTIONS = ("'re", "'ve", "'ll", "'s", "'t", "'m", "'d")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@functools.cache
def byte_symbols():
    """GPT-2's reversible map from the 256 bytes to printable characters, in vocabulary order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(rest):
        symbols[byte] = chr(256 + i)
    return symbols


def kind(character):
    """space, L (letter), N (number) or O (any other sign)"""
    if character.isspace():
        return "space"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def split_words(text: str) -> list[str]:
    """CLIP's pre-tokenisation, in lower case and NFC.

    Words are runs of letters, single digits, runs of other signs, and English contractions.
    """
    text = unicodedata.normalize("NFC", text).lower()
    words, i = [], 0
    while i < len(text):
        j = end_of_word(text, i)
        if not text[i].isspace():
            words.append(text[i:j])
        i = j
    return words


def end_of_word(text, i):
    """The index behind the word, or the white space, that begins at i."""
    for contraction in CONTRACTIONS:
        if text.startswith(contraction, i):
            return i + len(contraction)
    first = kind(text[i])
    j = i + 1
    if first in ("L", "O"):
        while j < len(text) and kind(text[j]) == first:
            j += 1
    return j


def read_bpe(folder):
    """A tokenizer folder -> vocabulary {symbol: id}, merges [(left, right), ...] by priority."""
    if (folder / "vocab.json").exists():
        vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").splitlines()
        merges = [line.split() for line in lines]
        # the first line is a version comment, the last may be empty
        return vocab, [tuple(merge) for merge in merges if len(merge) == 2]
    bpe = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    merges = []
    for merge in bpe["merges"]:  # "left right" in older files, ["left", "right"] in newer ones
        merges.append(tuple(merge.split() if isinstance(merge, str) else merge))
    return bpe["vocab"], merges


def join(parts, pair):
    """Joins the two symbols of pair wherever they are neighbours, from left to right."""
    joined = []
    while parts:
        n = 2 if tuple(parts[:2]) == pair else 1
        joined.append("".join(parts[:n]))
        parts = parts[n:]
    return joined


class Tokenizer:
    """CLIP's byte-level BPE from a tokenizer folder: vocab.json and merges.txt, or tokenizer.json.

    tokenizer_config.json, if any, says the length in tokens and the pad token.
    """

    def __init__(self, folder: str | pathlib.Path):
        folder = pathlib.Path(folder)
        self.vocab, merges = read_bpe(folder)
        for number in self.vocab.values():
            if not isinstance(number, int) or number < 0:
                raise ValueError("an entry of the vocabulary is no number")
        self.rank = {pair: i for i, pair in enumerate(merges)}

        config = {}
        file = folder / "tokenizer_config.json"
        if file.exists():
            config = json.loads(file.read_text("utf-8"))
        self.length = min(int(config.get("model_max_length", 77)), 77)
        pad = config.get("pad_token") or END
        self.begin, self.end = self.vocab[BEGIN], self.vocab[END]
        if isinstance(pad, dict):
            pad = pad["content"]
        self.pad = self.vocab.get(pad, self.end)

        # Special tokens are found in the raw text, before anything else. SD3's second tokenizer
        # pads with "!", so that is one.
        self.special = re.compile(f"({re.escape(BEGIN)}|{re.escape(END)}|{re.escape(pad)})")
        self.words = {}  # ids of the words seen so far

    def word(self, word: str) -> list[int]:
        """Joins the pair of lowest rank until no pair has one. -> list of ids"""
        if word not in self.words:
            parts = [byte_symbols()[byte] for byte in word.encode("utf-8", "replace")]
            parts[-1] += "</w>"
            while len(parts) > 1:
                pairs = itertools.pairwise(parts)
                pair = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
                if pair not in self.rank:
                    break
                parts = join(parts, pair)
            self.words[word] = [self.vocab.get(part, self.end) for part in parts]
        return self.words[word]

    def ids(self, text):
        """One string -> list of ids, without begin and end."""
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:  # odd parts are the special tokens
                ids.append(self.vocab[part])
                continue
            for word in split_words(part):
                ids += self.word(word)
        return ids

    def __call__(self, texts: list[str]) -> Tensor:
        """list of B strings -> ids (B, L) int64, cut and padded to the model's length."""
        rows = []
        for text in texts:
            row = [self.begin, *self.ids(text)[: self.length - 2], self.end]
            row += [self.pad] * self.length
            rows.append(row[: self.length])
        return torch.tensor(rows)


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention: (B, L, D) -> (B, L, D)"""

    def __init__(self, d, heads, hidden, act, eps):
        super().__init__()
        self.heads, self.act = heads, act
        self.layer_norm1 = nn.LayerNorm(d, eps=eps)
        self.layer_norm2 = nn.LayerNorm(d, eps=eps)
        self.self_attn = nn.ModuleDict()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.self_attn[name] = nn.Linear(d, d)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, hidden), "fc2": nn.Linear(hidden, d)})

    def split_heads(self, h):
        return h.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, D/H)

    def forward(self, x):
        h = self.layer_norm1(x)
        q = self.split_heads(self.self_attn["q_proj"](h))
        k = self.split_heads(self.self_attn["k_proj"](h))
        v = self.split_heads(self.self_attn["v_proj"](h))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h.transpose(1, 2).flatten(2)  # (B, H, L, D/H) -> (B, L, D)
        x = x + self.self_attn["out_proj"](h)

        h = self.mlp["fc1"](self.layer_norm2(x))
        if self.act == "quick_gelu":
            h = h * torch.sigmoid(1.702 * h)
        else:
            h = F.gelu(h)
        return x + self.mlp["fc2"](h)


def table(n, d):
    """An embedding (n, d) whose numbers are still to be read.

    nn.Embedding(n, d) would draw random ones, which nobody needs. On the meta device that imports
    torch's compiler: 2 seconds.
    """
    return nn.Embedding.from_pretrained(torch.empty(n, d), freeze=False)


class CLIPText(nn.Module):
    """One CLIP text encoder, with transformers' key names."""

    def __init__(self, config):
        """config: the dict of text_encoder/config.json.

        Absent keys take the defaults of transformers' CLIPTextConfig.
        """
        super().__init__()
        get = config.get
        d, eps = get("hidden_size", 512), get("layer_norm_eps", 1e-5)
        heads, hidden = get("num_attention_heads", 8), get("intermediate_size", 2048)
        act = get("hidden_act", "quick_gelu")
        self.embeddings = nn.ModuleDict()
        self.embeddings["token_embedding"] = table(get("vocab_size", 49408), d)
        self.embeddings["position_embedding"] = table(get("max_position_embeddings", 77), d)
        count = get("num_hidden_layers", 12)
        layers = nn.ModuleList(Layer(d, heads, hidden, act, eps) for _ in range(count))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(d, eps=eps)
        self.text_projection = nn.Linear(d, get("projection_dim", 512), bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> hidden state before the last layer (B, L, D), pooled (B, P)"""
        positions = self.embeddings["position_embedding"].weight[: ids.shape[1]]  # (L, D)
        x = self.embeddings["token_embedding"](ids) + positions  # (B, L) -> (B, L, D)
        for layer in self.encoder["layers"]:
            before, x = x, layer(x)
        x = self.final_layer_norm(x)
        end = ids.argmax(1)  # end-of-text has the highest id
        pooled = x[torch.arange(len(ids), device=ids.device), end]  # (B, L, D) -> (B, D)
        return before, self.text_projection(pooled)


class Text(nn.Module):
    """Both encoders with their tokenizers."""

    def __init__(self, tokenizers, encoders):
        super().__init__()
        self.tokenizers, self.encoders = tokenizers, nn.ModuleList(encoders)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """list of B strings -> context (B, L, D1 + D2), pooled (B, P1 + P2)"""
        device = self.encoders[0].text_projection.weight.device
        return self.encode([tokenizer(texts).to(device) for tokenizer in self.tokenizers])

    def alike(self, a: list[str], b: list[str]) -> Tensor:
        """Which of a (B strings) reads as its b does, for they differ only where they are cut.
        -> (B,) bool"""
        same = [(tokenizer(a) == tokenizer(b)).all(1) for tokenizer in self.tokenizers]
        return torch.stack(same).all(0)

    def encode(self, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
        """ids: one (B, L) tensor for each encoder -> as forward"""
        states = [encoder(i) for encoder, i in zip(self.encoders, ids)]
        context, pooled = zip(*states)
        return torch.cat(context, -1), torch.cat(pooled, -1)
