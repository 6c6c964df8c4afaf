"""The machine's choices, on an accelerator that is only pretended: device, precision, base; and the
network on accelerators, against the network on the CPU."""

import sys
import types

import huggingface_hub as hub
import pytest
import torch
from huggingface_hub import errors
from memory import BASES
from PIL import Image

import data
import model as network
from data import encode
from files import pictures, ranks, run
from files.disk import UserError
from files.folder import find
from frozen import machine
from frozen.load import load_base
from model import MMDiT, new_adapter

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def pretend(monkeypatch):
    """A machine with `count` accelerators of a kind, or with none."""

    def become(kind, count=1, bf16=True):
        found = torch.device(kind) if kind else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
        monkeypatch.setattr(machine, "has_bf16", lambda _: bf16)

    return become


# ---- device and precision -----------------------------------------------------------------------
WIDE, NARROW = 1536, 192


@pytest.mark.parametrize(
    "kind, bf16, width, dtype, device, half",
    [
        (None, False, WIDE, None, "cpu", None),
        (None, False, NARROW, "bf16", "cpu", BF16),
        ("cuda", True, WIDE, None, "cuda:0", BF16),  # also ROCm
        ("cuda", False, WIDE, None, "cuda:0", FP16),  # T4, V100, RTX 20
        ("cuda", False, WIDE, "fp32", "cuda:0", None),
        ("cuda", True, NARROW, None, "cuda:0", None),  # the embedded base
        ("xpu", True, WIDE, None, "xpu:0", BF16),
        ("mps", True, WIDE, None, "mps", BF16),
        ("mps", False, WIDE, None, "mps", None),
    ],
)
def test_device_and_precision_suit_machine_and_base(
    pretend, kind, bf16, width, dtype, device, half
):
    pretend(kind, bf16=bf16)
    chosen = machine.choose_device()
    assert str(chosen) == device
    assert machine.choose_half(dtype, chosen, width) == half


def test_a_device_can_be_named_and_one_that_is_not_there_is_refused(pretend, monkeypatch):
    pretend("cuda", count=2)
    assert str(machine.choose_device("cpu")) == "cpu"
    assert str(machine.choose_device("cuda:1")) == "cuda:1"
    monkeypatch.setattr(machine, "LOCAL", 1)  # torchrun's second
    assert str(machine.choose_device()) == "cuda:1"
    assert str(machine.choose_device(None, "tiny")) == "cuda:1"
    with pytest.raises(UserError, match="--device mps: torch finds here cpu and cuda"):
        machine.choose_device("mps")
    monkeypatch.setattr(machine, "LOCALS", 3)
    for rank in range(3):  # each is refused, so that the first says it
        monkeypatch.setattr(machine, "LOCAL", rank)
        with pytest.raises(UserError, match="has 2; give torchrun --nproc_per_node 2"):
            machine.choose_device()
    pretend("mps")
    assert str(machine.choose_device()) == "mps"
    assert str(machine.choose_device(None, "tiny")) == "cpu"
    with pytest.raises(UserError, match="bf16 or fp32"):
        machine.choose_half("fp16", torch.device("mps"), WIDE)


# ---- the base -----------------------------------------------------------------------------------
def granted(*_):
    """The Hub lets this user have the repository."""


def gated(*_):
    raise errors.GatedRepoError("no", response=types.SimpleNamespace(headers={}, request=None))


def offline(*_):
    raise ConnectionError


@pytest.mark.parametrize(
    "kind, answer, cached, base, words",
    [
        (None, None, None, "tiny", ""),
        ("cuda", granted, None, "sd3.5-medium", "base: sd3.5-medium (https://hugg"),
        ("cuda", gated, None, "bokeh", "for sd3.5-medium accept its terms (https"),
        ("cuda", offline, None, "bokeh", "tensorart/bokeh_3.5_medium"),
        ("cuda", offline, "/a/file", "sd3.5-medium", "stability.ai/license"),
    ],
)
def test_the_base_of_a_machine_is_what_its_user_gets(
    pretend, monkeypatch, capsys, kind, answer, cached, base, words
):
    pretend(kind)
    monkeypatch.setattr(hub.HfApi, "auth_check", answer)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: cached)
    assert machine.choose_base("auto", machine.choose_device()) == base
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == bool(words)
    assert machine.choose_base("a/b", machine.choose_device()) == "a/b"


def test_one_line_says_what_was_chosen(capsys):
    *_, half = machine.open_base("tiny", torch.device("cpu"), "bf16")
    assert half == BF16
    assert capsys.readouterr().err == "tiny on cpu in bf16 (--base, --device, --dtype)\n"


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # CUDA's, MPS'
def test_memory_that_does_not_suffice_is_one_sentence(capsys, kind):
    def main():
        raise kind("Backend out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(SystemExit) as end:
        ranks.guard("train.py", main)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and "smaller --size" in said


@pytest.mark.parametrize("kind, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_ranks_meet_on_their_own_device_and_wait_no_longer_than_minutes(monkeypatch, kind, backend):
    asked = {}
    monkeypatch.setattr(ranks, "RANKS", 2)
    init = lambda backend, **more: asked.update(more, backend=backend)  # noqa: E731
    monkeypatch.setattr(ranks.dist, "init_process_group", init)
    device = torch.device(kind, 1) if kind == "cuda" else torch.device(kind)
    ranks.meet(device)
    assert asked["backend"] == backend and asked["timeout"].total_seconds() == 600
    assert asked["device_id"] == (device if kind == "cuda" else None)


@pytest.mark.parametrize(
    "base, name, licence",
    [
        ("tiny", None, "mit"),
        ("bokeh", "tensorart/bokeh_3.5_medium", "other"),
        ("sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium", "other"),
        ("someone/their-sd3", "someone/their-sd3", None),
    ],
)
def test_a_runs_card_is_what_the_hub_reads(base, name, licence):
    """By huggingface_hub's own reader."""
    made = {"command": "c", "commit": "c", "torch": "t", "python": "p", "machine": "m"}
    config = {"base": base, "instr": "make it winter", "out": "o", "seed": 0}
    told = hub.ModelCard(run.card(config, made | {"fingerprint": "f"})).data.to_dict()
    assert (told.get("base_model"), told.get("license")) == (name, licence)
    assert told["pipeline_tag"] == "image-to-image" and told["library_name"] == "nanobyg"
    assert ("base_model_relation" in told) == (name is not None)


# ---- the network --------------------------------------------------------------------------------
def sd35_slice():
    """Two blocks of SD3.5-medium at its width, random, and a batch of 256 pixels' latents."""
    config = BASES["sd3.5-medium"] | {"num_layers": 2, "dual_attention_layers": (0,)}
    torch.manual_seed(0)
    model = MMDiT(config | {"pos_embed_max_size": 16})
    prompt = torch.randn(1, 77, 2048), torch.randn(1, 2048)
    return model, torch.randn(1, 16, 32, 32), prompt


def embedded():
    model, _, text, _ = load_base("tiny")
    return model, torch.randn(2, 8, 16, 16), text(["a red house in winter", "a house by night"])


@pytest.mark.parametrize("base", [sd35_slice, embedded])
def test_copies_of_the_absent_texts_key_are_its_weight(base, monkeypatch):
    """What accelerators compute against what the CPU computes, in float32: the velocity, and the
    adapter's gradient; relative, as norms."""
    model, x, prompt = base()
    model.requires_grad_(False)
    adapter = new_adapter(model, 4)
    adapter = {name: v.detach() + 0.02 * torch.randn_like(v) for name, v in adapter.items()}
    params = [v.requires_grad_() for v in adapter.values()]
    weights = torch.randn_like(x)
    found = []
    for attend in (network.with_weight, network.with_copies):
        monkeypatch.setattr(network, "with_weight", attend)
        v = model(x, torch.full((len(x),), 0.6), prompt, x, adapter)
        grads = torch.autograd.grad((v * weights).sum(), params)
        found.append([v.detach(), torch.cat([g.flatten() for g in grads])])
    for weight, copies in zip(*found):
        assert (weight - copies).norm() < 1e-5 * weight.norm()


def test_a_new_adapter_is_drawn_on_the_cpu_whatever_the_device():
    """On the meta device nothing is drawn; the CPU's generator moves as for a base on the CPU."""
    after = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = MMDiT({"num_layers": 1, "num_attention_heads": 1, "sample_size": 8})
        torch.manual_seed(3)
        adapter = new_adapter(model, 2, video=True)
        assert {v.device.type for v in adapter.values()} == {device}
        after.append(torch.randn(4))
    torch.testing.assert_close(*after, rtol=0, atol=0)


# ---- what is kept of many pictures --------------------------------------------------------------
def test_the_words_of_thousands_of_captions_are_kept_in_half_precision(monkeypatch):
    kinds = ("src", "tgt", "instr", "undo")
    many = [{kind: f"{kind} {i}" for kind in kinds} for i in range(501)]
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8).numpy()

    class Vae:
        encode = staticmethod(lambda x: torch.zeros(len(x), 1, 1, 1))

    def text(words):
        numbers = torch.tensor([float(len(w)) for w in words])
        return numbers[:, None, None].expand(-1, 2, 3), numbers[:, None]

    for rows, dtype in ((many[:9], torch.float32), (many, torch.float16)):
        monkeypatch.setattr(data, "load_rows", lambda rows, *_: [(image, row) for row in rows])
        encoded = encode(rows, (8, 8), 1, Vae, text, "cpu")
        assert {kept.dtype for kept in encoded.texts} == {dtype}
        context, pooled = encoded.prompt("instr", torch.tensor([8]))
        assert context.dtype == torch.float32 and context.shape == (1, 2, 3)
        assert pooled.item() == len("instr 8")


# ---- HEIC ---------------------------------------------------------------------------------------
def test_heic_is_read_where_pillow_heif_is_and_else_left_out_in_one_sentence(
    tmp_path, monkeypatch, capsys
):
    heif = pytest.importorskip("pillow_heif")

    heif.register_heif_opener()
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.HEIC")
    red = pictures.load_image(tmp_path / "a.HEIC")
    assert red.shape == (48, 64, 3) and red[9, 9, 0] > 240 and red[9, 9, 1] < 20
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert [p.name for p in find(tmp_path)[0]] == ["a.HEIC", "b.png"]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert [p.name for p in find(tmp_path)[0]] == ["b.png"]
    said = capsys.readouterr().err
    assert "HEIC pictures left out: 1 (a.HEIC)" in said and "pip install pillow-heif" in said
    with pytest.raises(UserError, match="pip install pillow-heif"):
        pictures.load_image(tmp_path / "a.HEIC")
