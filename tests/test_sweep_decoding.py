"""Every causal language model class of the installed transformers in `generate`: its own tokens, or refused by name."""

import pytest

pytest.importorskip("transformers")

from w2s_fast.integrations.transformers.cached import ASSISTANTS, NOT_BATCHED, NOT_PADDED, UNSTEADY
from w2s_fast.testing import sweep_decoding, tiny_models
from w2s_fast.testing.selection import sampled
from w2s_fast.testing.sweep import checked, main

SPECIAL = {"BambaForCausalLM", "MambaForCausalLM", "RecurrentGemmaForCausalLM"}  # inputs that went wrong once
REFUSED = (
    UNSTEADY | ASSISTANTS | NOT_PADDED | NOT_BATCHED
    | {"xLSTMForCausalLM", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM"}
)  # fmt: skip


@pytest.mark.parametrize("name", sorted({*sampled(tiny_models.names(), 12), *SPECIAL} & {*tiny_models.names()}))
def test_class(name):
    verdict = checked(sweep_decoding.check, name)
    assert verdict.kind != "wrong", verdict.why
    assert (verdict.kind == "refused") == (name in REFUSED), verdict.why


def test_the_sweep_finds_what_is_wrong(monkeypatch, capsys):
    """A loop whose positions are one behind, and one whose small models see no padding."""
    from w2s_fast.integrations.transformers.cached import CachedModel

    assert main(["decoding", "LlamaForCausalLM"]) == 0
    step = CachedModel.step

    def behind(self, token):
        self._inputs["position_ids"] = self._inputs["position_ids"] - 1
        return step(self, token)

    monkeypatch.setattr(CachedModel, "step", behind)
    assert main(["decoding", "LlamaForCausalLM"]) == 1
    monkeypatch.undo()
    start = CachedModel.start
    monkeypatch.setattr(CachedModel, "start", lambda self, ids, mask, types, **given: start(self, ids, **given))
    assert main(["decoding", "LlamaForCausalLM"]) == 1
    assert "1 right, 0 refused, 0 wrong" in (said := capsys.readouterr().out) and "log-probabilities differ" in said
