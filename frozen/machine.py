"""What suits this machine: the device, its precision, and the base that is used on it."""

import sys

import torch

from files.disk import UserError, note, why
from files.ranks import LOCAL, LOCALS
from frozen.load import NAMED, build_part, check_family, find_base, load_base
from frozen.text import Text
from frozen.vae import VAE
from model import WIDE, MMDiT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LICENCE = "the Stability AI Community License, https://stability.ai/license"


def choose_device(name: str | None = None, base: str = "auto") -> torch.device:
    """The device that --device names or else this machine's accelerator (CUDA, ROCm, MPS, XPU), or
    the CPU; of several like it, this rank's. Raises UserError where there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu", found.type] if found else ["cpu"]
    if name is None and kinds[-1] == "mps" and is_embedded(base):
        name = "cpu"  # Apple's GPUs are untested, and a CPU does for the embedded base
    kind, _, number = (name or kinds[-1]).partition(":")
    if kind not in kinds or number and not number.isdigit():
        raise UserError(f"--device {name}: torch finds here {' and '.join(kinds)}", 2)
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    count = torch.accelerator.device_count()
    index, last = int(number or LOCAL), int(number or LOCALS - 1)
    if last >= count:
        few = f"{kind}:{last} is asked for, but this machine has {count}"
        raise UserError(f"{few}; give torchrun --nproc_per_node {count}, or another --device", 2)
    torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def choose_half(dtype: str | None, device: torch.device, width: int) -> torch.dtype | None:
    """dtype: fp32, bf16, fp16, or None for what suits device and base: bf16, fp16 on GPUs that lack
    it (T4, V100, RTX 20), float32 on the CPU and for a narrow base. -> the half precision of
    autocast, None where all is in float32"""
    if dtype == "fp16" and device.type == "mps":
        raise UserError("--dtype fp16: Apple's GPUs take bf16 or fp32 here", 2)
    if dtype:
        return None if dtype == "fp32" else DTYPES[dtype]
    if device.type == "cpu" or width <= WIDE:
        return None
    if has_bf16(device):
        return torch.bfloat16
    return None if device.type == "mps" else torch.float16


def has_bf16(device: torch.device) -> bool:
    """Whether the device itself computes in bf16; an older one may emulate it, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        torch.ones(1, device=device, dtype=torch.bfloat16) + 1
    except (RuntimeError, TypeError):
        return False
    return True


def choose_base(base: str, device: torch.device) -> str:
    """'auto' -> the base for this machine: the embedded one on a CPU, else SD3.5-medium or, where
    the Hub does not let this user have it, its open fine-tune. Any other name stays what it is."""
    if base != "auto":
        return base
    if device.type == "cpu":
        return "tiny"
    page, open_page = (f"https://huggingface.co/{NAMED[n]}" for n in ("sd3.5-medium", "bokeh"))
    base, said = "sd3.5-medium", f"sd3.5-medium ({page}), or --base bokeh ({open_page})"
    if not permitted(NAMED["sd3.5-medium"]):
        base = "bokeh"
        said = (
            f"bokeh ({open_page}); for sd3.5-medium accept its terms ({page}), then hf auth login"
        )
    print(f"base: {said}; of both the licence is {LICENCE}", file=sys.stderr)
    return base


def permitted(name: str) -> bool:
    """Whether this user gets a repository from the Hub or, without network, has it already."""
    import huggingface_hub as hub

    try:
        hub.HfApi().auth_check(name)
        return True
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError):
        return False
    except Exception:  # no network: what the cache holds must do
        return isinstance(hub.try_to_load_from_cache(name, "model_index.json"), str)


def is_embedded(base: str) -> bool:
    """Whether a base is the small one of this repository, which has its own captions."""
    return NAMED.get(base, base).rstrip("/") == NAMED["tiny"]


def open_base(
    base: str, device: torch.device, dtype: str | None = None
) -> tuple[MMDiT, VAE, Text, float, torch.dtype | None]:
    """Loads the base in the precision that suits it, and says so in one line; dtype as above.
    -> model, vae, text, shift (`load_base`), half (`choose_half`). Raises UserError."""
    folder = find_base(base)
    check_family(folder)
    half = choose_half(dtype, device, build_part(MMDiT, folder / "transformer").width)
    weights = None if device.type == "cpu" else half  # there autocast alone is in half precision
    names = {value: name for name, value in DTYPES.items()}
    precision = names[half or torch.float32]
    print(f"{base} on {device} in {precision} (--base, --device, --dtype)", file=sys.stderr)
    if device.type == "mps":
        note("Apple's GPUs are untested; --device cpu if this goes wrong")
    return *load_base(str(folder), device, weights), half


def open_chosen(base: str, o) -> tuple[MMDiT, VAE, Text, float, torch.autocast]:
    """`open_base` on the device and in the dtype of the options o, or as it suits the machine."""
    device = choose_device(o.device, base)
    *parts, half = open_base(choose_base(base, device), device, o.dtype)
    return *parts, autocast(device, half)


def autocast(device: torch.device, half: torch.dtype | None) -> torch.autocast:
    """Half precision where there is one."""
    return torch.autocast(device.type, half, enabled=half is not None)


def compile_blocks(model: MMDiT, device: torch.device) -> None:
    """torch.compile, block by block; where it does not work, a warning."""
    # A block's kinds, times: adapter or none, with and without gradient.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = True  # what fails later runs as it is
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))  # needs Triton, or a C compiler
        for block in model.transformer_blocks:
            block.compile()
    except Exception as error:
        text = f"torch.compile does not work here ({why(error)}); training goes on without"
        print(f"warning: {text}", file=sys.stderr)
