"""S4 and S4D beside the official layers: state dicts as they are, outputs, gradients and steps.

tests/golden/official_s4.json holds what github.com/state-spaces/s4 at e757cef computes: `S4Block` of models/s4/s4.py
with `mode="dplr", init="legs"` in float64 (the first, with its steps, in float32) and `S4D` of models/s4/s4d.py in
float64, at parameters drawn around their first values: the state dict, an input u, an upstream gradient g, the output,
and the gradients of `(y g).sum()`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from w2s_fast import nn

CASES = json.loads((Path(__file__).parent / "golden" / "official_s4.json").read_text(encoding="utf-8"))


def tensor(kept: dict[str, Any]) -> Tensor:
    return torch.tensor(kept["values"], dtype=torch.float64).reshape(kept["shape"])


@pytest.mark.parametrize("kept", CASES, ids=lambda kept: kept["name"])
def test_outputs_gradients_and_steps_are_those_of_the_official_layer(kept):
    layer = getattr(nn, kept["layer"])(**kept["given"]).double().eval()
    layer.load_state_dict({name: tensor(value) for name, value in kept["parameters"].items()})
    u, g, y = tensor(kept["u"]).requires_grad_(), tensor(kept["g"]), tensor(kept["y"])
    exact = "steps" not in kept
    allowed = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 1e-5}
    found = layer(u)[0]
    torch.testing.assert_close(found, y, **allowed)
    (found * g).sum().backward()
    torch.testing.assert_close(u.grad, tensor(kept["du"]), **allowed)
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    assert gradients.keys() == kept["gradients"].keys()
    for name, want in kept["gradients"].items():
        torch.testing.assert_close(gradients[name], tensor(want), **allowed, msg=lambda text, name=name: name + text)
    if exact:
        return
    state, steps = layer.default_state(len(u)), layer.steps()
    for position, want in zip(u.detach().unbind(-1), tensor(kept["steps"]).unbind(-1), strict=True):
        out, state = layer.step(position, state, steps)
        torch.testing.assert_close(out, want, **allowed)
