"""FusionLogitsProcessor in the decoding modes of transformers."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import LogitsProcessorList  # noqa: E402

from w2s_fast.integrations.transformers import FusionLogitsProcessor, generate  # noqa: E402
from w2s_fast.testing.sweep_decoding import prompts  # noqa: E402
from w2s_fast.testing.tiny_models import VOCABULARY, tiny_model  # noqa: E402

PLAIN = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False}


@pytest.fixture(scope="module")
def models():
    return [tiny_model("LlamaForCausalLM", seed) for seed in range(3)]


class Forgetful(FusionLogitsProcessor):
    """Reads everything anew at every step."""

    def __call__(self, input_ids, scores):
        self.reset()
        return super().__call__(input_ids, scores)


class Counting:
    """How many tokens a row each forward of a model reads."""

    def __init__(self, model):
        self.widths = []
        self.hook = model.register_forward_pre_hook(
            lambda m, a, k: self.widths.append(k["input_ids"].shape[1]), with_kwargs=True)

    def __enter__(self):
        return self.widths

    def __exit__(self, *error):
        self.hook.remove()


def log_probs(models, prefixes, weight=1.0):
    """Fused log-probabilities ``[N, V]`` behind whole prefixes ``[N, S]``."""
    with torch.no_grad():
        large, expert, anti = (m(input_ids=prefixes).logits[:, -1].double() for m in models)
    return (large + weight * (expert - anti)).log_softmax(-1)


def test_scores_are_log_probabilities(models):
    ids, mask = prompts()
    processor = FusionLogitsProcessor(*models[1:], attention_mask=mask)
    with torch.no_grad():
        scores = models[0](input_ids=ids[:1]).logits[:, -1]
    found = FusionLogitsProcessor(*models[1:])(ids[:1], scores)
    torch.testing.assert_close(found.double(), log_probs(models, ids[:1]), atol=1e-4, rtol=0)
    out = models[0].generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, output_scores=True,
                             return_dict_in_generate=True, logits_processor=[processor], **PLAIN)  # fmt: skip
    for scores in out.scores:
        torch.testing.assert_close(scores.logsumexp(-1), torch.zeros(3), atol=1e-5, rtol=0)


def test_beam_search_ranks_by_the_fused_distribution(models):
    """As many beams as tokens find the best of all pairs of tokens, with their log-probabilities as scores."""
    ids = prompts()[0][:1]
    out = models[0].generate(
        input_ids=ids, max_new_tokens=2, num_beams=VOCABULARY, num_return_sequences=6, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True, **PLAIN,
        logits_processor=[FusionLogitsProcessor(*models[1:])],
    )  # fmt: skip
    first = log_probs(models, ids)[0]
    both = torch.cat((ids.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]), 1)
    total = first[:, None] + log_probs(models, both)
    best = total.flatten().topk(6)
    pairs = torch.stack((best.indices // VOCABULARY, best.indices % VOCABULARY), 1)
    assert torch.equal(out.sequences[:, -2:], pairs)
    torch.testing.assert_close(out.sequences_scores.double(), best.values, atol=1e-3, rtol=0)


MODES = {
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 4, "num_return_sequences": 3},
    "sampling, several": {"do_sample": True, "num_return_sequences": 3},
    "beams, sampling": {"num_beams": 3, "do_sample": True},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "static cache": {"cache_implementation": "static"},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel", "MambaForCausalLM", "Gemma3ForCausalLM"])
def test_the_caches_change_nothing(family, mode):
    large, expert, anti = (tiny_model(family, seed) for seed in range(3))
    if family == "MambaForCausalLM" and mode == "static cache":
        large = tiny_model("LlamaForCausalLM")
    ids, mask = prompts()
    found = []
    for kind in (FusionLogitsProcessor, Forgetful):
        torch.manual_seed(0)
        found.append(large.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, logits_processor=LogitsProcessorList(
                [kind(expert, anti, attention_mask=mask)]), **{**PLAIN, **MODES[mode]}))  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", ["assistant", "prompt lookup"])
def test_assisted_decoding_says_the_same(models, mode):
    large, expert, anti = models
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (1, 5)).repeat(1, 3)  # repetitions, so that the prompt holds candidates
    settings = {"input_ids": ids, "max_new_tokens": 12, **PLAIN, "eos_token_id": 1}
    plain = large.generate(**settings, logits_processor=[FusionLogitsProcessor(expert, anti)])
    how = {"assistant_model": anti} if mode == "assistant" else {"prompt_lookup_num_tokens": 3}
    with Counting(expert) as widths:
        found = large.generate(**settings, **how, logits_processor=[FusionLogitsProcessor(expert, anti)])
    assert torch.equal(found, plain)
    assert widths[0] == 15 and set(widths[1:]) == {1}  # rejected candidates are forgotten, the rest is not read again


def test_contrastive_search_says_the_same(models):
    """The mode itself is downloaded by transformers: this is its loop (arXiv 2202.06417), which asks the processors."""
    large, expert, anti = models

    def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        for _ in range(6):
            out = model(input_ids=input_ids, output_hidden_states=True)
            past = torch.nn.functional.normalize(out.hidden_states[-1], dim=-1)
            mass = logits_processor(input_ids, out.logits[:, -1].float()).softmax(-1)
            top = mass.topk(4)
            scores = []
            for i in range(4):
                longer = torch.cat((input_ids, top.indices[:, i:i + 1]), 1)
                last = model(input_ids=longer, output_hidden_states=True).hidden_states[-1][:, -1:]
                alike = (torch.nn.functional.normalize(last, dim=-1) @ past.transpose(1, 2)).amax(-1)[:, 0]
                scores.append(0.4 * top.values[:, i] - 0.6 * alike)
            chosen = top.indices.gather(1, torch.stack(scores, 1).argmax(1, keepdim=True))
            input_ids = torch.cat((input_ids, chosen), 1)
        return input_ids

    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 5))
    found = [large.generate(input_ids=ids, custom_generate=contrastive, logits_processor=[kind(expert, anti)], **PLAIN)
             for kind in (FusionLogitsProcessor, Forgetful)]  # fmt: skip
    assert torch.equal(*found) and found[0].shape == (2, 11)


def test_weights_of_each_prompt(models):
    large, expert, anti = models
    ids, mask = prompts()
    weights = torch.tensor([[0.0], [0.7], [2.0]])
    settings = {"max_new_tokens": 5, **PLAIN}
    found = large.generate(
        input_ids=ids, attention_mask=mask, num_beams=2, **settings,
        logits_processor=[FusionLogitsProcessor(expert, anti, weights=weights, attention_mask=mask)])  # fmt: skip
    for row in range(3):
        alone = large.generate(
            input_ids=ids[row:row + 1], attention_mask=mask[row:row + 1], num_beams=2, **settings, logits_processor=[
                FusionLogitsProcessor(expert, anti, weights=weights[row].item(), attention_mask=mask[row:row + 1])],
        )  # fmt: skip
        assert torch.equal(found[row], alone[0])


def test_small_models_of_a_narrower_vocabulary(models):
    """Ended rows are padded with a token that they do not have; prompts with one and rows that go on are refused."""
    large = models[0]
    expert, anti = (tiny_model("LlamaForCausalLM", seed, vocab_size=50) for seed in (1, 2))
    ids = prompts()[0] % 50
    free = generate(large, expert, anti, input_ids=ids, max_new_tokens=8, eos_token_id=(), temperature=0)
    end = int(free.sequences[0, 8])
    settings = {"input_ids": ids, "max_new_tokens": 8, "eos_token_id": end, "pad_token_id": 55}
    found = large.generate(**settings, attention_mask=torch.ones_like(ids), do_sample=False,
                           logits_processor=[FusionLogitsProcessor(expert, anti)])  # fmt: skip
    mine = generate(large, expert, anti, **settings, temperature=0, attention_mask=torch.ones_like(ids))
    assert torch.equal(found, mine.sequences) and (found == 55).any()

    class Chooses(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([52 + input_ids.shape[1] % 2]), 0.0)

    with pytest.raises(ValueError, match=r"FusionLogitsProcessor: input_ids must be below 50, the narrowest voc.*52"):
        large.generate(input_ids=torch.tensor([[5, 52, 7]]), logits_processor=[FusionLogitsProcessor(expert, anti)])
    with pytest.raises(ValueError, match="Another logits processor chose it"):
        both = [FusionLogitsProcessor(expert, anti), Chooses()]
        large.generate(input_ids=ids, max_new_tokens=4, logits_processor=both)
    with pytest.raises(ValueError, match="logits_processor must be one that keeps to the narrowest vocabulary of 50"):
        generate(large, expert, anti, input_ids=ids, max_new_tokens=4, eos_token_id=(), logits_processor=[Chooses()])


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    model, llama = transformers.T5ForConditionalGeneration(config), tiny_model("LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"FusionLogitsProcessor: anti must be a decoder-only.*T5ForConditionalGen"):
        FusionLogitsProcessor(llama, model)
