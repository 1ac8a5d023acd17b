"""Samples under ttsem: no compiled kernel goes out of bounds, races another program or reads unwritten memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from w2s_fast.testing.selection import FULL

#: `make install` puts the checker here, apart from the environment's own packages.
CHECKER = Path(sys.prefix) / "ttsem"
pytestmark = pytest.mark.skipif(not CHECKER.exists(), reason="ttsem is not beside this environment (make install)")


def _run(code: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(CHECKER), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow(40)
def test_samples_access_what_is_theirs():
    run = _run(["-m", "w2s_fast.testing.semantics", *(() if FULL else ("--limit", "8"))])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_a_kernel_that_reads_past_its_row_is_seen():
    """The gate can fail: one column too many."""
    run = _run(["-c", _BROKEN])
    assert "fault" in run.stdout and "out" in run.stdout.lower(), run.stdout[-2000:] + run.stderr[-2000:]


_BROKEN = """
import torch
from unittest import mock
from w2s_fast.kernels.logit_fusion import fuse
from w2s_fast.testing import samples, semantics
launch = fuse.launch
def wider(kernel, programs, like, *args, **options):
    return launch(kernel, programs, like, *(a + 3000 if type(a) is int and a == 1031 else a for a in args), **options)
sample = next(s for s in samples.all_samples() if s.id == "fuse_logits-plain")
with mock.patch.object(fuse, "launch", wider):
    for verdict in semantics.judge([sample], torch.float32):
        print(*verdict)
"""
