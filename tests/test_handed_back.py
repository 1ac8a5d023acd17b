"""Tensors that forward leaves for backward, and hooks that hand back others: one clear error, never a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import w2s_fast
from w2s_fast import extension, gradients
from w2s_fast.testing import handed_back, layouts
from w2s_fast.testing.samples import all_samples
from w2s_fast.testing.selection import amount


@pytest.mark.slow(15)
def test_every_op():
    """In a process of its own, which a kernel that reads past a tensor's end may take down."""
    command = [sys.executable, "-W", "ignore", "-m", "w2s_fast.testing.handed_back", "--samples", str(amount(5, 1))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    last = done.stdout.strip().splitlines()[-40:]
    assert done.returncode == 0, "\n".join([f"exit {done.returncode}", *last, done.stderr[-2000:]])


def test_logits_that_forward_leaves_are_among_them():
    """The sample is there for `kept` of the losses' gradient."""
    sample = next(s for s in all_samples() if s.id == "linear_logp-kept")
    calls = [args for op, args in layouts.recorded(sample, torch.float32) if "linear_loss_backward" in str(op)]
    assert calls and all(args[-1] is not None for args in calls)


def test_without_the_check_it_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradients.Gradient, "_check", lambda *_: None)
    sample = next(s for s in all_samples() if s.op == "fused_log_softmax")
    assert handed_back.check_hooks(sample, torch.float32) != []


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
def test_the_error_names_op_and_tensor():
    q, k = torch.randn(2, 3, 2, 8, requires_grad=True), torch.randn(2, 3, 2, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1]):
        found = w2s_fast.compressed_attention(q, k, k)
        with pytest.raises(RuntimeError, match=r"attention: q as kept .* must be torch.float32 \[2, 3, 2, 8\]"):
            found.sum().backward()
    softmax = torch.ops.w2s_fast.compressed_attention(q.detach(), k, k, 1.0)[1]
    with pytest.raises(RuntimeError, match=r"attention_backward: softmax must be \[2, 2, 2, 3\] float32, got"):
        torch.ops.w2s_fast.compressed_attention_backward(k, k, k, k, k, softmax[:, :1], 1.0, True, True)
