"""The pybind11 module: build facts, CPU features, machine probes (their values are never held to a speed)."""

from __future__ import annotations

import math
import sys

import pytest

from w2s_fast import probes

needs_module = pytest.mark.skipif(not probes.available(), reason="w2s_fast._C is not built")


@needs_module
def test_build_facts():
    facts = probes.build_facts()
    assert set(facts) == {"compiler", "flags", "torch", "torch_target", "cuda", "cuda_archs"}
    assert facts["compiler"] and facts["torch_target"] == "2.11"
    assert (facts["cuda"] is None) == (facts["cuda_archs"] is None)


@needs_module
def test_cpu_features():
    features = probes.cpu_features()
    assert all(isinstance(value, bool) for value in features.values())
    assert features["avx512f"] or not (features["avx512bw"] or features["avx512bf16"])
    assert probes.fma_isa() in ("avx512f", "avx2", "portable")


@needs_module
@pytest.mark.parametrize("probe", [probes.copy_bandwidth, probes.read_bandwidth])
def test_bandwidth(probe):
    for threads in (1, 2):
        rate = probe(megabytes=2, threads=threads, repetitions=1)
        assert math.isfinite(rate) and rate > 0
    for wrong in ({"megabytes": 0}, {"threads": 0}, {"repetitions": 0}):
        with pytest.raises(ValueError, match="must be"):
            probe(**{"megabytes": 1, **wrong})


@needs_module
def test_fma_peak():
    rate = probes.fma_peak(threads=1, repetitions=1)
    assert math.isfinite(rate) and rate > 0


def test_missing_module_says_how_to_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "w2s_fast._C", None)
    assert not probes.available()
    with pytest.raises(RuntimeError, match=r"not built.*W2S_FAST_BUILD=require"):
        probes.build_facts()
