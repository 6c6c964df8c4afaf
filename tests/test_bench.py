"""The measuring tools measure what they say."""
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from memory import SD3, Meter, step_memory  # noqa: E402


def test_the_memory_meter_counts_what_is_alive_and_what_autograd_keeps():
    x = torch.zeros(1000, requires_grad=True)
    with Meter() as meter:
        y = x.exp()                                         # 4,000 bytes, kept for the gradient even when the name is gone
        z = (y + 1).sum()                                   # another 4,000, at once freed; a sum of 4
        assert (meter.peak, meter.now) == (8004, 4004)
        del y
        assert meter.now == 4004
        z.backward()
        assert x.grad is not None and meter.now == 4004     # y is freed, the gradient is there


def test_checkpointing_saves_memory_and_weights_are_counted_exactly():
    config = SD3 | dict(num_layers=3, num_attention_heads=2, qk_norm="rms_norm")
    kept, again = (step_memory(config, 256, 1, 4, "paper", checkpointing=c) for c in (False, True))
    assert again["peak"] < kept["peak"] and again["weights"] == kept["weights"]
    wide = step_memory(SD3 | dict(num_layers=2, num_attention_heads=8), 64, 1, 4, "paper")
    from model import MMDiT
    with torch.device("meta"):
        model = MMDiT(SD3 | dict(num_layers=2, num_attention_heads=8))
    assert wide["weights"] == pytest.approx(sum(v.numel() for v in model.state_dict().values()) * 2 / 2 ** 30, abs=.01)
