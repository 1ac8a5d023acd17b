"""Every wrong argument of the logit fusion functions raises one error that names it."""

from __future__ import annotations

import math

import pytest
import torch

import w2s_fast

BASE, EXPERT, ANTI = torch.randn(3, 10), torch.randn(3, 10), torch.randn(3, 10)
COMMON = [
    ({"base": [1.0]}, TypeError, r"base must be a tensor, got list"),
    ({"base": torch.zeros(3, 10, dtype=torch.int64)}, TypeError, r"base must be float32, bfloat16.*, got torch\.int64"),
    ({"base": torch.tensor(1.0)}, ValueError, r"base must be of shape \[\.\.\., V\], got a 0-dimensional tensor"),
    ({"base": torch.zeros(3, 0), "experts": [torch.zeros(3, 0)], "anti": torch.zeros(3, 0)}, ValueError,
     r"V >= 1.*got widths \[0"),
    ({"experts": "xy"}, TypeError, r"experts must be a tensor or a list of tensors, got str"),
    ({"experts": [3]}, TypeError, r"experts\[0\] must be a tensor, got int"),
    ({"experts": [EXPERT, EXPERT.long()]}, TypeError, r"experts\[1\] must be float32.*, got torch\.int64"),
    ({"experts": [torch.zeros(4, 10)]}, ValueError, r"experts\[0\] must be of leading shape \(3,\).*, got \(4, 10\)"),
    ({"experts": [torch.zeros(2, 3, 10)]}, ValueError, r"experts\[0\] must be of shape .*, got \(2, 3, 10\)"),
    ({"experts": [EXPERT.to("meta")]}, ValueError, r"experts\[0\] must be on the device of base \(cpu\), got meta"),
    ({"anti": torch.zeros(5, 10)}, ValueError, r"anti\[0\] must be of leading shape \(3,\)"),
    ({"anti": [ANTI, ANTI]}, ValueError, r"anti must be None, one tensor or 1 tensors.*, got 2 tensors"),
    ({"anti": ANTI.int()}, TypeError, r"anti\[0\] must be float32"),
    ({"vocab_size": 11}, ValueError, r"vocab_size must be in \[1, 10\], got 11"),
    ({"vocab_size": 0}, ValueError, r"vocab_size must be in \[1, 10\], got 0"),
    ({"vocab_size": 2.0}, TypeError, r"vocab_size must be an int, got float 2\.0"),
    ({"experts": [torch.zeros(3, 12)], "strict_vocab": True}, ValueError, r"vocab_size must be given when the width"),
]
FUSION = [
    *COMMON,
    ({"experts": []}, ValueError, r"anti must be None when there are no experts"),
    ({"weights": "big"}, (TypeError, ValueError), r"weights must be"),
    ({"weights": [1.0, 2.0]}, ValueError, r"weights must be one number an expert \(1\), got 2 numbers"),
    ({"weights": [None]}, TypeError, r"weights\[0\] must be a number, got NoneType"),
    ({"weights": math.nan}, ValueError, r"weights must be a finite number.*, got nan"),
    ({"weights": torch.ones(4)}, ValueError, r"weights must be a float, \[1\] or \[3, 1\], got \(4,\)"),
    ({"weights": torch.ones(1, dtype=torch.int64)}, TypeError, r"weights must be float32"),
    ({"base_weight": math.inf}, ValueError, r"base_weight must be a finite number.*, got inf"),
    ({"base_weight": "1"}, TypeError, r"base_weight must be a number, got str"),
    ({"temperature": -1.0}, ValueError, r"temperature must be a finite number >=? 0, got -1"),
    ({"temperature": math.nan}, ValueError, r"temperature must be a finite number"),
    ({"temperature": torch.ones(2)}, ValueError, r"temperature must be a float or of shape \(3,\), got \(2,\)"),
    ({"temperature": torch.tensor([1.0, -1.0, 2.0])}, ValueError, r"temperature must be (at least|above) 0, got -1"),
    ({"temperature": torch.full((3,), math.nan)}, ValueError, r"temperature must be (at least|above) 0, got nan"),
    ({"temperature": True}, TypeError, r"temperature must be"),
    ({"plausible": "top_p"}, ValueError, r'plausible must be None, \("min_p", x\) or \("top_p", x\)'),
    ({"plausible": ("top_q", 0.5)}, ValueError, r"plausible must be None"),
    ({"plausible": ("top_p", 0.0)}, ValueError, r"plausible top_p must be in \(0, 1\], got 0"),
    ({"plausible": ("min_p", 1.5)}, ValueError, r"plausible min_p must be in \[0, 1\], got 1\.5"),
]
STATIC = [
    *((name, *case) for name in ("fuse_logits", "fused_log_softmax", "fused_stats", "fused_sample") for case in FUSION),
    *((name, {"temperature": 0.0}, ValueError, r"temperature must be a finite number > 0, got 0")
      for name in ("fuse_logits", "fused_log_softmax", "fused_stats")),
    *((name, {"temperature": torch.zeros(3)}, ValueError, r"temperature must be above 0, got 0")
      for name in ("fuse_logits", "fused_log_softmax", "fused_stats")),
    *((name, {"out_dtype": torch.int32}, TypeError, r"out_dtype must be float32.*, got torch\.int32")
      for name in ("fuse_logits", "fused_log_softmax")),
    ("fused_stats", {"targets": [1, 2, 3]}, TypeError, r"targets must be a tensor, got list"),
    ("fused_stats", {"targets": torch.zeros(3)}, TypeError, r"targets must be int64 or int32, got torch\.float32"),
    ("fused_stats", {"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, r"targets must be of shape \(3,\)"),
    ("fused_stats", {"targets": torch.tensor([0, 10, 1])}, ValueError, r"targets must be in \[0, 10\), got 10"),
    ("fused_stats", {"targets": torch.tensor([0, -1, 1])}, ValueError, r"targets must be in \[0, 10\), got -1"),
    ("fused_sample", {"top_k": -1}, ValueError, r"top_k must be >= 0, got -1"),
    ("fused_sample", {"top_k": 2.0}, TypeError, r"top_k must be an int"),
    ("fused_sample", {"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0"),
    ("fused_sample", {"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], got 1\.1"),
    ("fused_sample", {"min_p": -0.1}, ValueError, r"min_p must be in \[0, 1\], got -0\.1"),
    ("fused_sample", {"uniform": torch.zeros(2)}, ValueError, r"uniform must be of shape \(3,\), got \(2,\)"),
    ("fused_sample", {"uniform": torch.ones(3)}, ValueError, r"uniform must be in \[0, 1\)"),
    ("fused_sample", {"uniform": [0.5] * 3}, TypeError, r"uniform must be a tensor, got list"),
    ("fused_sample", {"uniform": torch.zeros(3, dtype=torch.int64)}, TypeError, r"uniform must be float32"),
    ("fused_sample", {"dynamic": {"nodes": 8}}, ValueError, r'dynamic must be None unless weights="dynamic"'),
    ("fused_sample", {"weights": "dynamic", "base_weight": 2.0}, ValueError, r'base_weight must be 1\.0 with'),
    ("fused_sample", {"weights": "dynamic", "anti": None}, TypeError, r"anti must be the untuned small model"),
    ("fused_sample", {"weights": "dynamic", "dynamic": {"nodes": 1}}, ValueError, r"nodes must be in \[2, 32\], got 1"),
]  # fmt: skip
DYNAMIC = [
    *COMMON,
    ({"anti": None}, TypeError, r"anti must be the untuned small model's logits, got None"),
    ({"experts": [], "anti": []}, (TypeError, ValueError), r"(anti|experts) must be"),
    ({"alpha_max": 0.0}, ValueError, r"alpha_max must be a finite number > 0, got 0"),
    ({"alpha_max": math.inf}, ValueError, r"alpha_max must be a finite number.*, got inf"),
    ({"nodes": 1}, ValueError, r"nodes must be in \[2, 32\], got 1"),
    ({"nodes": 33}, ValueError, r"nodes must be in \[2, 32\], got 33"),
    ({"nodes": 8.0}, TypeError, r"nodes must be an int, got float"),
    ({"tol": 0.0}, ValueError, r"tol must be a finite number > 0, got 0"),
    ({"tol": math.nan}, ValueError, r"tol must be a finite number.*, got nan"),
    ({"solver": "newton"}, ValueError, r"solver must be one of 'exact', 'grid', got 'newton'"),
    ({"multi": "best"}, ValueError, r"multi must be one of 'ray', 'decoupled', 'grid', got 'best'"),
    ({"multi": "grid"}, ValueError, r'multi must be "ray" or "decoupled" unless solver="grid"'),
    ({"grid": [0.1, 0.2]}, ValueError, r'grid must be None unless solver="grid"'),
    ({"solver": "grid", "grid": [0.1, 0.2, 0.5]}, ValueError, r"grid must be equally spaced"),
    ({"solver": "grid", "grid": [0.3, 0.4, 0.5]}, ValueError, r"grid must be equally spaced"),
    ({"solver": "grid", "grid": [0.2, 0.1]}, ValueError, r"grid must be equally spaced"),
    ({"solver": "grid", "grid": []}, ValueError, r"grid must be at least two candidates"),
    ({"solver": "grid", "grid": torch.arange(1, 41) / 20}, ValueError, r"grid must be at most 32 intervals.*got 40"),
    ({"direction": "up"}, ValueError, r"direction must be one of 'target_kl', got 'up'"),
    ({"direction": [1.0, 2.0]}, ValueError, r"direction must be of shape \[1\] or \[3, 1\], got \(2,\)"),
    ({"direction": [-1.0]}, ValueError, r"direction must be finite and nonnegative with a positive entry"),
    ({"direction": [0.0]}, ValueError, r"direction must be finite and nonnegative with a positive entry"),
    ({"target_kl": 0.5}, TypeError, r"target_kl must be a tensor, got float"),
    ({"target_kl": torch.ones(4)}, ValueError, r"target_kl must be of shape \[3\] or \[3, 1\], got \(4,\)"),
    ({"target_kl": torch.ones(3, dtype=torch.int64)}, TypeError, r"target_kl must be float32"),
]


def _fails(name, change, error, message):
    arguments = {"base": BASE, "experts": [EXPERT], "anti": ANTI, **change}
    with pytest.raises(error, match=rf"^w2s_fast\.{name}: .*{message}"):
        getattr(w2s_fast, name)(**arguments)


@pytest.mark.parametrize("name, change, error, message", STATIC)
def test_static_fusions(name, change, error, message):
    _fails(name, change, error, message)


@pytest.mark.parametrize("change, error, message", DYNAMIC)
def test_dynamic_weights(change, error, message):
    _fails("dynamic_fusion_weights", change, error, message)


def test_a_backend_that_cannot_serve_says_why():
    with w2s_fast.backend("cuda"), pytest.raises(RuntimeError, match=r"backend 'cuda' cannot serve this call: .+"):
        w2s_fast.fuse_logits(BASE, [EXPERT])
    with pytest.raises(ValueError, match="backend must be one of"), w2s_fast.backend("fast"):
        pass
