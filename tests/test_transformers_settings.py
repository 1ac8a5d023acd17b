"""The settings of ``model.generate`` in our `generate`: at weight 0 they do what they do in transformers."""

import string

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria  # noqa: E402

from w2s_fast.integrations.transformers import generate  # noqa: E402
from w2s_fast.testing.sweep_decoding import prompts  # noqa: E402
from w2s_fast.testing.tiny_models import VOCABULARY, tiny_model  # noqa: E402

NEW = 8
CHARACTERS = "_" + string.ascii_letters + string.digits + "."
assert len(CHARACTERS) == VOCABULARY


@pytest.fixture(scope="module")
def models():
    return [tiny_model("LlamaForCausalLM", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def tokenizer():
    """Characters as tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token=".")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="_", padding_side="left")


def given(rows=slice(None)):
    ids, mask = prompts()
    return {"input_ids": ids[rows], "attention_mask": mask[rows]}


def theirs(model, rows=slice(None), **settings):
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **settings}
    return model.generate(**given(rows), **{k: v for k, v in settings.items() if v is not None or "eos" in k})


def ours(models, rows=slice(None), **settings):
    settings = {"max_new_tokens": NEW, "eos_token_id": (), "pad_token_id": 0, "do_sample": False, **settings}
    return generate(*models, **given(rows), weights=0.0, **settings).sequences


class Never(LogitsProcessor):
    """A token that is never said."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


class Odd(StoppingCriteria):
    """A row ends when its last token is odd."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 2 == 1


def spoken(models):
    """What the large model says first, in its first row."""
    return theirs(models[0])[0, 7:].tolist()


SETTINGS = {
    "repetition_penalty": lambda said: {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": lambda said: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda said: {"bad_words_ids": [[said[0]], [said[1], said[2]]]},
    "suppress_tokens": lambda said: {"suppress_tokens": [said[0]]},
    "begin_suppress_tokens": lambda said: {"begin_suppress_tokens": [said[0]]},
    "sequence_bias": lambda said: {"sequence_bias": [[[said[0]], -9.0]]},
    "forced_eos_token_id": lambda said: {"forced_eos_token_id": 5},
    "exponential_decay": lambda said: {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 7},
    "end": lambda said: {"eos_token_id": [said[2], 5]},
    "min_new_tokens": lambda said: {"eos_token_id": said[0], "min_new_tokens": 3},
    "min_length": lambda said: {"eos_token_id": said[0], "min_length": 9},
    "max_length": lambda said: {"max_new_tokens": None, "max_length": 10},
    "processor": lambda said: {"logits_processor": [Never(said[0])]},
    "criterion": lambda said: {"stopping_criteria": [Odd()], "eos_token_id": 1},
    "prefix_allowed_tokens_fn": lambda said: {"prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 10 + row]},
    "config": lambda said: {
        "max_new_tokens": None, "do_sample": None,
        "generation_config": GenerationConfig(max_new_tokens=4, do_sample=False, repetition_penalty=1.8),
    },
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_do_at_weight_zero_what_they_do_in_transformers(models, setting):
    settings = SETTINGS[setting](spoken(models))
    want = theirs(models[0], **settings)
    assert not torch.equal(want, theirs(models[0])), "the setting should change something"
    assert torch.equal(ours(models, **settings), want)


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_caches_of_the_settings(models, implementation):
    kinds = []
    for model in models:
        cached = lambda m, a, k: kinds.append(type(k.get("cache", k.get("past_key_values"))).__name__)  # noqa: E731
        model._hook = model.register_forward_pre_hook(cached, with_kwargs=True)
    try:
        found = ours(models, cache_implementation=implementation)
    finally:
        for model in models:
            model._hook.remove()
    assert torch.equal(found, theirs(models[0]))
    assert {k.lower().startswith(implementation) for k in kinds} == {True} and len(kinds) == 3 * NEW


def test_no_cache(models):
    assert torch.equal(ours(models, use_cache=False), theirs(models[0]))


def test_stop_strings(models, tokenizer):
    said = spoken(models)
    string = "".join(CHARACTERS[i] for i in said[1:3])
    settings = {"stop_strings": [string], "tokenizer": tokenizer, "eos_token_id": 1}  # ended rows are padded
    want = theirs(models[0], **settings)
    assert want[0, 10:].eq(0).all() and not torch.equal(want, theirs(models[0]))  # ended behind the third token
    assert torch.equal(ours(models, **settings), want)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        ours(models, stop_strings="w")


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.clone())

    def end(self):
        self.ended = True


def test_streamer_gets_what_transformers_gives_it(models):
    mine, other = Recorder(), Recorder()
    ours(models, slice(1), streamer=mine)
    theirs(models[0], slice(1), streamer=other)
    assert mine.ended and other.ended
    assert [x.flatten().tolist() for x in mine.got] == [x.flatten().tolist() for x in other.got]


def test_settings_of_the_models_own_configuration(models):
    """They count as in transformers, but for temperature, top_k, top_p and min_p."""
    large = models[0]
    before = large.generation_config
    try:
        large.generation_config = GenerationConfig(repetition_penalty=1.8, temperature=0.1, top_k=1, do_sample=True)
        want = theirs(large)
        assert torch.equal(ours(models), want)
        uniform = torch.full((3, NEW), 0.999)
        assert not torch.equal(ours(models, do_sample=None, uniform=uniform), want)  # not the one likeliest token
    finally:
        large.generation_config = before


def test_processors_get_the_fused_logits(models):
    """Against whole prefixes row by row: fusion, then transformers' repetition penalty, then the draw."""
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))
    uniform = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    out = generate(*models, input_ids=ids, weights=0.6, eos_token_id=(), max_new_tokens=4, temperature=0.7,
                   uniform=uniform, repetition_penalty=1.5)  # fmt: skip
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5)
    for row in range(3):
        prefix = ids[row]
        for step in range(4):
            with torch.no_grad():
                large, expert, anti = (m(input_ids=prefix[None]).logits[0, -1] for m in models)
            logp = (penalty(prefix[None], (large + 0.6 * (expert - anti))[None])[0] / 0.7).double().log_softmax(-1)
            token = out.sequences[row, 7 + step]
            assert abs(logp[token] - out.logprobs[row, step]) < 1e-4
            mass = logp.exp().cumsum(0)
            assert mass[token] - logp[token].exp() - 1e-4 <= uniform[row, step] <= mass[token] + 1e-4
            prefix = torch.cat((prefix, token[None]))


def test_dynamic_weights_with_processors(models):
    uniform = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    settings = {**given(), "method": "dynamic", "eos_token_id": (), "max_new_tokens": 4, "uniform": uniform}
    plain = generate(*models, **settings)
    with_a_processor = generate(*models, **settings, logits_processor=[lambda ids, scores: scores])
    assert torch.equal(plain.sequences, with_a_processor.sequences)
    torch.testing.assert_close(plain.alphas, with_a_processor.alphas)
    torch.testing.assert_close(plain.logprobs, with_a_processor.logprobs)


@pytest.mark.parametrize("name, values", [
    ("temperature", [0.0, 0.7, 2.0]), ("top_k", [1, 0, 5]), ("top_p", [1.0, 0.3, 0.8]), ("min_p", [0.0, 0.5, 0.1]),
])  # fmt: skip
@pytest.mark.parametrize("method", ["proxy_tuning", "dynamic"])
def test_a_value_for_each_row(models, method, name, values):
    uniform = torch.rand(3, NEW, generator=torch.Generator().manual_seed(1))
    settings = {"eos_token_id": (), "max_new_tokens": NEW, "method": method, "temperature": 1.5}
    together = generate(*models, **given(), uniform=uniform, **{**settings, name: torch.tensor(values)})
    for row, value in enumerate(values):
        alone = generate(*models, **given(), uniform=uniform, **{**settings, name: value})
        assert torch.equal(alone.sequences[row], together.sequences[row])
        torch.testing.assert_close(alone.logprobs[row], together.logprobs[row])


def test_settings_of_the_solver_for_each_prompt(models):
    """They go with their rows where rows are repeated, and where values of top_k keep rows apart."""
    uniform = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    settings = {"eos_token_id": (), "max_new_tokens": 4, "method": "dynamic", "num_return_sequences": 2}
    target, top_k = torch.tensor([0.001, 0.02, 0.1]), torch.tensor([0, 5, 9])
    for solve in ({"target_kl": target}, {"target_kl": target[:, None]}, {"direction": torch.eye(3)[:, :1] + 0.5}):
        together = generate(*models, **given(), **settings, uniform=uniform, top_k=top_k, dynamic=solve)
        for row in range(3):
            rows, one = slice(2 * row, 2 * row + 2), slice(row, row + 1)
            part = {name: value[one] for name, value in solve.items()}
            alone = generate(*models, **given(one), **settings, uniform=uniform[rows], top_k=int(top_k[row]),
                             dynamic=part)  # fmt: skip
            assert torch.equal(alone.sequences, together.sequences[rows])
            torch.testing.assert_close(alone.alphas, together.alphas[rows], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pad", [-1, -100, 64, 10**6])
def test_a_pad_token_that_no_model_has(models, pad):
    """It fills rows that have ended and the prompts' padding, and no model reads it."""
    settings = {"max_new_tokens": NEW, "temperature": 0, "weights": 0.0}
    wanted = generate(*models, **given(), **settings, eos_token_id=range(40, 50), pad_token_id=0)
    ids, mask = prompts()
    odd = generate(*models, input_ids=ids.where(mask != 0, pad), attention_mask=mask, **settings,
                   eos_token_id=torch.arange(40, 50), pad_token_id=torch.tensor(pad))  # fmt: skip
    behind = torch.arange(odd.sequences.shape[1] - 7) >= odd.lengths[:, None]
    assert torch.equal(odd.lengths, wanted.lengths) and bool(behind[:, 1].any())  # one row ends before another
    assert torch.equal(odd.sequences[:, 7:], wanted.sequences[:, 7:].masked_fill(behind, pad))


@pytest.mark.parametrize("name, value, error, message", [
    ("eos_token_id", 2.0, TypeError, "eos_token_id must be an id or several, got 2.0"),
    ("pad_token_id", "0", TypeError, "pad_token_id must be an id or several, got '0'"),
    ("pad_token_id", [0, 1], ValueError, r"pad_token_id must be one id, got \[0, 1\]"),
    ("top_k", torch.tensor([1.5, 2.0, 3.0]), TypeError, "top_k must be an int or a tensor of ints, got torch.float32"),
    ("large", "gpt2", TypeError, "large must be a model, a torch.nn.Module, got str"),
    ("uniform", [[0.5] * 2] * 3, TypeError, "uniform must be a tensor, got list"),
    ("attention_mask", [[1] * 7] * 3, TypeError, "attention_mask must be a tensor, got list"),
])  # fmt: skip
def test_what_is_no_id_count_or_tensor(models, name, value, error, message):
    with pytest.raises(error, match=message):
        generate(**{**dict(zip(("large", "experts", "anti"), models, strict=True)), **given(), "max_new_tokens": 2,
                    name: value})  # fmt: skip


def test_values_for_each_row_draw_as_many_numbers(models):
    """Without ``uniform`` the numbers come from the generator for the whole batch, whatever the grouping."""
    draw = lambda top_k: generate(*models, **given(), eos_token_id=(), max_new_tokens=NEW, top_k=top_k,  # noqa: E731
                                  generator=torch.Generator().manual_seed(3)).sequences
    assert torch.equal(draw(torch.tensor([5, 5, 5])), draw(5))
    assert torch.equal(draw(torch.tensor([5, 64, 5]))[::2], draw(5)[::2])


def test_a_value_for_each_row_of_another_batch(models):
    with pytest.raises(ValueError, match=r"top_k must be a number or of shape \(3,\), got \(2,\)"):
        ours(models, top_k=torch.tensor([1, 2]))


def test_several_continuations_of_each_prompt(models):
    ids, mask = prompts()
    uniform = torch.rand(6, NEW, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([[0.1], [0.7], [1.5]])
    out = generate(*models, **given(), weights=weights, num_return_sequences=2, uniform=uniform, eos_token_id=(),
                   max_new_tokens=NEW, top_k=torch.tensor([3, 9, 0]))  # fmt: skip
    twice = generate(*models, input_ids=ids.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0),
                     weights=weights.repeat_interleave(2, 0), uniform=uniform, eos_token_id=(), max_new_tokens=NEW,
                     top_k=torch.tensor([3, 3, 9, 9, 0, 0]))  # fmt: skip
    assert torch.equal(out.sequences, twice.sequences) and out.sequences.shape == (6, 7 + NEW)
    assert not torch.equal(out.sequences[0], out.sequences[1])
    allowed = ours(models, num_return_sequences=2, prefix_allowed_tokens_fn=lambda prompt, ids: [3 + prompt])
    assert allowed[:, -1].tolist() == [3, 3, 4, 4, 5, 5]


def test_what_a_tokenizer_returns(models, tokenizer):
    texts = ["dog", "x"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    settings = {"eos_token_id": (), "max_new_tokens": 5, "temperature": 0}
    want = generate(*models, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert torch.equal(generate(*models, **batch, **settings).sequences, want.sequences)
    assert torch.equal(generate(*models, input_ids=batch, **settings).sequences, want.sequences)
    with pytest.raises(TypeError, match='return_tensors="pt"'):
        generate(*models, input_ids=[[5, 9]], **settings)


def test_token_types_go_to_the_models_that_take_them():
    bert, llama = tiny_model("BertLMHeadModel"), tiny_model("LlamaForCausalLM")
    types = torch.ones_like(prompts()[0])
    settings = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    want = bert.generate(**given(), token_type_ids=types, **settings)
    assert not torch.equal(want, bert.generate(**given(), **settings))
    settings["eos_token_id"] = ()
    found = generate(bert, llama, llama, **given(), token_type_ids=types, weights=0.0, **settings)
    assert torch.equal(found.sequences, want)


def test_padding_is_told_as_transformers_tells_it(models):
    """Without a mask, by the pad token of the large model, for all models."""
    ids, mask = prompts()
    settings = {"weights": 0.8, "eos_token_id": (), "max_new_tokens": 5, "temperature": 0}
    want = generate(*models, input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(generate(*models, input_ids=ids, pad_token_id=0, **settings).sequences, want.sequences)
    unpadded = generate(*models, input_ids=ids, **settings).sequences  # no pad token is known: all ids are words
    assert not torch.equal(unpadded, want.sequences)
    with pytest.raises(ValueError, match="padded on the left only with the pad token 0"):
        generate(*models, input_ids=ids.flip(1), pad_token_id=0, **settings)


def test_a_pad_token_that_ends_texts_is_read_as_text(models):
    """Without a mask it cannot be told from an end within the prompt, also where no row shall end."""
    large = models[0]
    before = large.generation_config
    ids = prompts()[0][:1].index_fill(1, torch.tensor([2]), 0)
    settings = {"input_ids": ids, "weights": 0.8, "eos_token_id": (), "max_new_tokens": 5, "temperature": 0}
    want = generate(*models, attention_mask=torch.ones_like(ids), **settings)
    try:
        large.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=0)
        assert torch.equal(generate(*models, **settings).sequences, want.sequences)
    finally:
        large.generation_config = before


@pytest.mark.parametrize("setting, value", [
    ("num_beams", 4), ("penalty_alpha", 0.6), ("prompt_lookup_num_tokens", 3), ("typical_p", 0.5),
    ("output_scores", True), ("past_key_values", object()), ("inputs_embeds", torch.zeros(1, 1, 32)),
])  # fmt: skip
def test_settings_that_are_elsewhere(models, setting, value):
    with pytest.raises(ValueError, match=f"generate: {setting} must be left alone"):
        ours(models, **{setting: value})


def test_settings_that_nothing_takes(models):
    with pytest.raises(ValueError, match="tempature"):
        ours(models, tempature=0.5)


def test_a_configuration_that_samples(models):
    """temperature, top_k, top_p and min_p as transformers reads the caller's configuration."""
    uniform = torch.rand(3, NEW, generator=torch.Generator().manual_seed(1))
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, temperature=0.8, top_k=7, top_p=0.9, min_p=0.02)
    found = generate(*models, **given(), eos_token_id=(), uniform=uniform, generation_config=config)
    want = generate(*models, **given(), eos_token_id=(), uniform=uniform, max_new_tokens=NEW, temperature=0.8, top_k=7,
                    top_p=0.9, min_p=0.02)  # fmt: skip
    assert torch.equal(found.sequences, want.sequences)
    with pytest.raises(ValueError, match="num_beams must be left alone, got 3"):
        generate(*models, **given(), generation_config=GenerationConfig(num_beams=3))
