"""A folder of unpaired pictures or clips -> what training draws its batches from.

Every row has a file and four texts: src, a caption of the picture; tgt, a caption of the result;
instr, the edit as an order; undo, the order that leads back. From most to least specific they come
from a line of tuples.jsonl (file_name, src, tgt, instr, undo), from the command line, or from a
caption and --instr by a small grammar. Captions are in metadata.jsonl (file_name, text) or, where
that has none, in a .txt of the same stem.
"""

import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from files.disk import UserError
from files.folder import NO_CAPTION, caption_of, lines_of, load_rows, name_of, read_jsonl, report
from frozen.text import Text
from frozen.vae import to_pixels
from model import Prompt

KINDS = ("src", "tgt", "instr", "undo")


# ---- the grammar --------------------------------------------------------------------------------
def family(lines: str) -> dict[str, tuple[list[str], list[str]]]:
    """Words that exclude each other, a line each: member: how captions say it | how instructions
    do, the preferred one first. -> {member: (in captions, in instructions)}"""
    members = {}
    for line in lines.strip().splitlines():
        member, _, ways = line.strip().partition(": ")
        captions, _, instructions = (ways or member).partition(" | ")
        says = captions.split(", ")
        members[member] = says, (instructions or captions).split(", ")
    return members


FAMILIES = [
    family("spring\n summer\n autumn: autumn, fall\n winter"),
    family("""day: at noon, by day, in daylight | noon, daytime, day
              sunset: at sunset, at dusk | sunset, dusk
              night: at night, by night | night"""),
    family("""clear: in clear weather, under a clear sky | clear weather, clear
              fog: in fog, in foggy weather | foggy weather, foggy, fog
              rain: in the rain, in rainy weather | rainy weather, rainy, rain
              snowfall: in snowfall, in snowy weather | snowy weather, snowy, snowfall, it snow"""),
    family("red\n blue\n yellow\n white\n purple\n green\n orange\n black\n pink\n brown"),
    family("""sketch: a pencil sketch of, a pencil drawing of | pencil sketch, pencil drawing
              pixel: pixel art of, a pixel art picture of | pixel art
              blueprint: a blueprint of | blueprint
              picture: a picture of | picture
              photo: a photo of | photo
              painting: a painting of | painting"""),
]
# How a member of each family joins a caption that names none of it.
APPENDED = ("{} in {}", "{} {}", "{} {}", "{} {}", None)  # None: it goes before the caption


def find_phrase(phrases: Iterable[str], text: str) -> str | None:
    """The longest of the phrases that stands in the text as whole words."""
    for phrase in sorted(phrases, key=len, reverse=True):
        if re.search(rf"\b{re.escape(phrase)}\b", text, re.I):
            return phrase
    return None


def swap(old: str, new: str, text: str) -> str:
    return re.sub(rf"\b{re.escape(old)}\b", lambda _: new, text, count=1, flags=re.I)


def exchange(a: str, b: str, text: str) -> str:
    """a becomes b, and b becomes a."""
    return swap(a, b, swap(b, "\0", text)).replace("\0", a)


def asked_member(members: dict, instr: str) -> tuple[str, str] | None:
    """The member of a family that an instruction asks for, of "paint the red house blue" the last.
    -> member, the instruction's word for it"""
    found = []
    for member, (_, asks) in members.items():
        if word := find_phrase(asks, instr):
            found.append((instr.lower().rfind(word), member, word))
    return max(found)[1:] if found else None


def said_member(members: dict, member: str, instr: str, caption: str) -> tuple[str, str] | None:
    """The member that a caption says: the one that the instruction names besides `member`, or else
    the first. -> member, the caption's words for it"""
    found = []
    for other, (ways, asks) in members.items():
        if words := find_phrase(ways, caption):
            unnamed = other == member or not find_phrase(asks, instr)
            found.append((unnamed, caption.lower().find(words), other, words))
    return min(found)[2:] if found else None


def derive(instr: str, caption: str) -> tuple[str, str] | None:
    """The grammar: "make it winter", "a house in summer" -> "a house in winter", "make it summer".
    -> tgt, undo (always self-contained); None where the caption already says what is asked for"""
    back = f"make it {caption}"
    if m := re.match(r"remove (?:the |an? )?(.+)", instr, re.I):
        tgt = without(m[1], caption)
        return (tgt, back) if tgt != caption else None
    added = re.match(r"(?:add|put) (.+)", instr, re.I)
    for members, appended in zip(FAMILIES, APPENDED):
        asked = asked_member(members, instr)
        if not asked or added and added[1].lower() not in members[asked[0]][1]:
            continue  # "add a red barn" asks for no red house
        return derive_member(members, appended, *asked, instr, caption)
    if m := re.match(r"(?:change|turn|replace) (.+?) (?:to|into|with) (.+)", instr, re.I):
        bare = [re.sub(r"^(the|an?) ", "", thing, flags=re.I) for thing in m.groups()]
        for a, b in (m.groups(), bare):
            if find_phrase([a], caption):
                return swap(a, b, caption), exchange(a, b, instr)
    if added:
        return f"{caption} with {added[1]}", back
    wish = re.sub(r"^(?:make it|turn it into|change it to|paint) ?", "", instr, flags=re.I)
    return f"{caption}, {wish}", back


def without(thing: str, caption: str) -> str:
    joint = r"\s*\b(?:with|and|by|beside|next to|in)?\s*\b(?:the|an?)?\s*\b"
    return re.sub(rf"{joint}{re.escape(thing)}\b", "", caption, flags=re.I).strip()


def derive_member(members, appended, member, word, instr, caption) -> tuple[str, str] | None:
    """tgt and undo where the instruction asks, by `word`, for a member of a family."""
    phrase = members[member][0][0]
    tgt = caption
    if member in ("sunset", "night"):  # "on a summer day" would be noon, whatever else is said
        day = r"\bon an? (spring|summer|autumn|fall|winter) day\b"
        tgt = re.sub(day, r"in \1", tgt, flags=re.I)
    said = said_member(members, member, instr, caption)
    if said is None:
        tgt = appended.format(tgt, phrase) if appended else f"{phrase} {tgt}"
        return tgt, f"make it {caption}"
    other, words = said
    if other == member:
        return None
    asks = members[other][1]
    undo = exchange(word.removeprefix("it "), find_phrase(asks, instr) or asks[0], instr)
    return swap(words, phrase, tgt), undo


# ---- from a folder to rows ----------------------------------------------------------------------
def read_prompts(folder, paths, instr=None, src=None, tgt=None, undo=None, strict=False) -> list:
    """-> list of rows, dicts of path, src, tgt, instr, undo. Prints what was found and derived.
    src, tgt, undo: given for all rows, instead of caption and grammar. strict: a folder
    without any caption is refused, not taken for pictures of "a picture"."""
    folder = pathlib.Path(folder)
    tuples = lines_of(folder, read_jsonl(folder / "tuples.jsonl", KINDS), paths)
    captions = lines_of(folder, read_jsonl(folder / "metadata.jsonl", ["text"]), paths)
    if instr and len(tuples) == len(paths):
        raise UserError(
            f"{folder}/tuples.jsonl has an instruction for every image already: "
            "leave --instr away, or take that file out",
            2,
        )
    rows, captioned = [], 0
    for path in paths:
        row = {"path": folder / path}
        if line := tuples.get(name_of(path)):
            rows.append(row | {kind: line[kind] for kind in KINDS})
            continue
        if instr is None:
            raise UserError(
                f'no instruction for {folder / path}: give --instr "make it winter", or a '
                "tuples.jsonl with a line for each image",
                2,
            )
        caption = caption_of(folder / path, captions.get(name_of(path)))
        captioned += caption is not None
        caption = src or caption or "a picture"
        derived = (tgt, undo) if tgt and undo else derive(instr, caption)
        if derived:
            prompts = {"src": caption, "tgt": tgt or derived[0], "instr": instr}
            rows.append(row | prompts | {"undo": undo or derived[1]})
    if strict and not (captioned or src or tuples):
        raise UserError(NO_CAPTION.format(folder), 2)
    report(folder, rows, len(paths), captioned, len(tuples), src)
    if not rows:
        raise UserError(f"no caption in {folder} is changed by '{instr}': nothing to learn from")
    return rows


# ---- from rows to batches -----------------------------------------------------------------------
@dataclass
class Encoded:
    """Everything that training reads, encoded once."""

    rows: list[dict]
    latents: list[Tensor]  # for each row (F, C, H, W): one frame of a picture, all of a clip
    texts: Prompt  # every distinct text once: context (T, L, D_text), pooled (T, P)
    ids: dict[str, Tensor]  # src, tgt, instr, undo, null -> for each row, which text (rows,)

    def prompt(self, kind: str, rows: Tensor, device="cpu") -> Prompt:
        """The texts of that kind of some rows (B,). -> context (B, L, D_text), pooled (B, P)"""
        which = self.ids[kind][rows]
        return tuple(text[which].to(device).float() for text in self.texts)


@dataclass
class Batch:
    """What one training step sees. Of clips every `frames` samples are one."""

    x: Tensor  # clean source latents (B, C, H, W)
    eps: Tensor  # noise (B, C, H, W), one for all frames of a clip
    eps_cue: Tensor  # the teacher's noise (B, C, H, W)
    k: Tensor  # node of the time grid (B,)
    src: Prompt
    tgt: Prompt
    instr: Prompt
    undo: Prompt
    null: Prompt  # no words
    frames: int


@torch.no_grad()
def encode(rows: list, size: tuple, frames: int, vae, text: Callable, device) -> Encoded:
    """Every row's latents, and every distinct text once, on the CPU."""
    latents, read = [], []
    for pictures, row in load_rows(rows, size, frames):
        few = torch.as_tensor(pictures).split(8)  # no more at once: the encoder's memory
        z = [vae.encode(to_pixels(part.numpy()).to(device)).cpu() for part in few]
        latents.append(torch.cat(z))
        read.append(row)
        if len(read) % 64 == 0:  # in blocks: small ones among the encoder's large tear the memory
            block = latents[-64:]
            latents[-64:] = torch.cat(block).split([len(z) for z in block])
    words = sorted({"", *(row[kind] for row in read for kind in KINDS)})
    texts = tuple(part.new_empty(len(words), *part.shape[1:], device="cpu") for part in text([""]))
    if len(words) > 2000:  # 10,000 captions and targets of SD3.5's are 6 GB, as halves
        texts = tuple(whole.half() for whole in texts)
    for i in range(0, len(words), 64):
        for whole, part in zip(texts, text(words[i : i + 64])):
            whole[i : i + 64] = part
    index = {word: i for i, word in enumerate(words)}
    ids = {kind: torch.tensor([index[row[kind]] for row in read]) for kind in KINDS}
    ids["null"] = torch.full((len(read),), index[""])
    return Encoded(read, latents, texts, ids)


def draw(data: Encoded, rows: Tensor, recipe, frames: int, rng, mine: slice, device) -> Batch:
    """A batch of these rows. Every rank draws the whole of it and keeps `mine`, its share."""
    b = rows[torch.randint(len(rows), (recipe.batch,), generator=rng)]
    even = torch.rand((), generator=rng) + torch.arange(recipe.batch) / recipe.batch
    k = (even % 1 * recipe.n).long()  # nodes, evenly spread: t = 1 in, t = 0 out
    window = torch.randint(2**31, b.shape, generator=rng)  # where in its clip a sample begins
    shape = data.latents[0].shape[1:]
    eps = eps_cue = torch.randn((recipe.batch, *shape), generator=rng)
    if recipe.cue == "delta":  # fresh: the editor cannot know it, and learns the mean over it
        eps_cue = torch.randn((recipe.batch, *shape), generator=rng)
    b, k, window, eps, eps_cue = (a[mine] for a in (b, k, window, eps, eps_cue))
    x = []
    for i, w in zip(b.tolist(), window.tolist()):
        first = w % (len(data.latents[i]) - frames + 1)
        x.append(data.latents[i][first : first + frames])
    x = torch.cat(x).to(device)  # (B F, C, H, W)
    b, k, eps, eps_cue = (a.repeat_interleave(frames, 0) for a in (b, k, eps, eps_cue))
    prompts = {kind: data.prompt(kind, b, device) for kind in data.ids}
    return Batch(x, eps.to(device), eps_cue.to(device), k.to(device), **prompts, frames=frames)


def check_captions(rows: list, text: Text) -> None:
    """Captions are cut at the encoders' length; raises UserError where no target differs then."""
    src, tgt = ([row[kind] for row in rows] for kind in ("src", "tgt"))
    alike = int(text.alike(src, tgt).sum())
    told = (
        f"{alike} of {len(rows)} target captions read like their source's and teach nothing: "
        "they are the same, or so long that they are cut alike"
    )
    if alike == len(rows):
        raise UserError(told)
    if alike:
        print(f"warning: {told}", file=sys.stderr)
