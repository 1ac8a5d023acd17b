"""generate and FusionLogitsProcessor against the plain formulation: whole sequences read anew, eager PyTorch."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    OPTConfig,
    OPTForCausalLM,
)  # fmt: skip

import w2s_fast  # noqa: E402
from w2s_fast.integrations.transformers import FusionLogitsProcessor, generate  # noqa: E402

V = 61


def make(family, vocab_size=V, seed=0):
    torch.manual_seed(seed)
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))  # fmt: skip
        case "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=64))
        case "neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(
                vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4))  # fmt: skip
        case "opt":
            model = OPTForCausalLM(OPTConfig(
                vocab_size=vocab_size, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=64, word_embed_proj_dim=32))  # fmt: skip
        case "bloom":
            model = BloomForCausalLM(BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=2))
    for parameter in model.parameters():  # random weights of the size a trained model has, so that logits differ
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of lengths 7, 4 and 2, padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, V, (3, 7))
    mask = (torch.arange(7) >= 7 - torch.tensor([7, 4, 2])[:, None]).long()
    return ids * mask, mask


def padded(prompts):
    """Arguments of `generate` for the padded prompts, with no end token."""
    return {"input_ids": prompts[0], "attention_mask": prompts[1], "eos_token_id": ()}


def last_logits(model, row):
    """Logits of the next token of one unpadded row, nothing cached."""
    with torch.no_grad():
        return model(input_ids=row[None], use_cache=False).logits[0, -1].double()


def naive(z_large, z_experts, z_anti, method, weight):
    """Fused logits of one row by the papers' formulas in float64."""
    n = min(len(z) for z in (z_large, *z_experts, *z_anti))
    z_large, z_experts, z_anti = z_large[:n], [z[:n] for z in z_experts], [z[:n] for z in z_anti]
    if method in ("proxy_tuning", "static"):
        return z_large + weight * sum(z - z_anti[0] for z in z_experts), None
    if method == "dynamic":
        shift = z_experts[0] - z_anti[0]
        kl = lambda a, b: (a.softmax(0) * (a.log_softmax(0) - b.log_softmax(0))).sum()  # noqa: E731
        target, low, high = kl(z_experts[0], z_anti[0]), 0.0, 2.0
        if kl(z_large + high * shift, z_large) <= target:
            return z_large + high * shift, high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if kl(z_large + middle * shift, z_large) < target else (low, middle)
        return z_large + low * shift, low
    if method == "dexperts":
        order = z_large.argsort(descending=True)
        before = z_large.softmax(0)[order].cumsum(0) - z_large.softmax(0)[order]
        fused = z_large + weight * ((z_experts or [z_large])[0] - (z_anti or [z_large])[0])
        fused[order[before >= 0.9]] = -torch.inf
        return fused, None
    if method == "contrastive":
        p = z_large.softmax(0)
        fused = z_large.log_softmax(0) - weight * (z_anti[0] / 0.5).log_softmax(0)
        return fused.where(p >= 0.1 * p.max(), -torch.inf), None
    if method == "dera":
        return z_large + weight * (z_experts[0] - z_large), None
    if method == "genarm":
        return z_large.log_softmax(0) + sum(weight * z.log_softmax(0) for z in z_experts), None
    raise AssertionError(method)


CASES = {  # method: (experts, anti), weight
    "proxy_tuning": ((2, 1), 0.7),
    "dexperts": ((1, 1), 2.0),
    "contrastive": ((0, 1), 1.0),
    "dera": ((1, 0), 0.4),
    "genarm": ((2, 0), 0.5),
    "dynamic": ((1, 1), None),
}


def replay(out, prompts, large, experts, anti, method, weight, temperature=1.0):
    """Check every token, log-probability and weight of ``out`` against whole sequences read one row at a time."""
    ids, mask = prompts
    for row in range(len(ids)):
        prefix = ids[row][mask[row].bool()]
        made = out.sequences[row, ids.shape[1]:]
        for step in range(int(out.lengths[row])):
            fused, alpha = naive(last_logits(large, prefix), [last_logits(m, prefix) for m in experts],
                                 [last_logits(m, prefix) for m in anti], method, weight)
            logp = (fused / temperature).log_softmax(0)
            torch.testing.assert_close(out.logprobs[row, step].double(), logp[made[step]], atol=2e-3, rtol=1e-3)
            if alpha is not None:
                assert abs(out.alphas[row, step, 0].item() - alpha) < 2e-2
            yield row, step, made[step], logp
            prefix = torch.cat((prefix, made[step:step + 1]))


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_matches_plain_formulation(method, family, prompts):
    (n_experts, n_anti), weight = CASES[method]
    large = make(family)
    experts = [make(family, V + 3, seed=10 + i) for i in range(n_experts)]  # wider: its columns are cut
    anti = [make(family, V + 5, seed=20) for _ in range(n_anti)]
    if method == "dynamic":  # an expert near its base, as after tuning
        experts = [make(family, V + 5, seed=20)]
        for parameter in experts[0].parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    out = generate(large, experts, anti, input_ids=prompts[0], attention_mask=prompts[1], method=method, weights=weight,
                   max_new_tokens=5, eos_token_id=(), temperature=0.8, generator=torch.Generator().manual_seed(3))
    assert out.sequences.shape == (3, 12) and out.lengths.tolist() == [5, 5, 5]
    assert len(list(replay(out, prompts, large, experts, anti, method, weight, 0.8))) == 15


@pytest.mark.parametrize("family", ["neox", "opt", "bloom"])
def test_other_architectures_greedy(family, prompts):
    large, expert, anti = make(family), make("llama", seed=4), make(family, seed=5)
    out = generate(large, expert, anti, input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=4,
                   eos_token_id=(), temperature=0)
    for _, _, token, logp in replay(out, prompts, large, [expert], [anti], "proxy_tuning", 1.0):
        assert logp[token] >= logp.max() - 2e-3


def test_narrow_expert_limits_the_vocabulary(prompts):
    large, expert, anti = make("llama"), make("gpt2", 40, seed=1), make("gpt2", 50, seed=2)
    ids = prompts[0].clamp(max=39)
    out = generate(large, expert, anti, input_ids=ids, max_new_tokens=8, eos_token_id=(), temperature=3.0)
    assert out.sequences.max() < 40
    list(replay(out, (ids, torch.ones_like(ids)), large, [expert], [anti], "proxy_tuning", 1.0, 3.0))


def test_rows_do_not_depend_on_the_batch_and_uniform_decides(prompts):
    large, expert, anti = make("llama"), make("llama", seed=1), make("llama", seed=2)
    uniform = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    together = generate(large, expert, anti, **padded(prompts), uniform=uniform, **settings)
    for row, (ids, mask) in enumerate(zip(*prompts, strict=True)):
        alone = generate(large, expert, anti, input_ids=ids[mask.bool()][None], eos_token_id=(),
                         uniform=uniform[row:row + 1], **settings)
        assert torch.equal(alone.sequences[0, mask.sum():], together.sequences[row, 7:])


def test_rows_end_separately(prompts):
    large = make("llama")
    free = generate(large, method="static", input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=8,
                    eos_token_id=(), temperature=0)
    end = int(free.sequences[0, 9])  # what the first row says third
    out = generate(large, method="static", input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=8,
                   eos_token_id=end, pad_token_id=0, temperature=0)
    for row in range(3):
        spoken = free.sequences[row, 7:].tolist()
        length = spoken.index(end) + 1 if end in spoken else 8
        assert out.lengths[row] == length
        width = out.sequences.shape[1] - 7
        assert out.sequences[row, 7:].tolist() == (spoken[:length] + [0] * 8)[:width]
        assert not out.logprobs[row, length:].any()


def test_dera_ends_and_proxy_identity(prompts):
    large, other = make("llama"), make("llama", seed=7)
    settings = {**padded(prompts), "max_new_tokens": 6, "temperature": 0}
    plain = generate(large, method="static", **settings).sequences
    assert torch.equal(generate(large, other, method="dera", weights=0.0, **settings).sequences, plain)
    assert torch.equal(generate(large, other, other, method="proxy_tuning", **settings).sequences, plain)
    aligned = generate(other, method="static", **settings).sequences
    assert torch.equal(generate(large, other, method="dera", weights=1.0, **settings).sequences, aligned)


def test_dexperts_without_expert_or_anti(prompts):
    large, small = make("llama"), make("llama", seed=7)
    settings = {**padded(prompts), "max_new_tokens": 4, "method": "dexperts"}
    only_anti = generate(large, None, small, **settings)
    list(replay(only_anti, prompts, large, [], [small], "dexperts", 2.0))
    only_expert = generate(large, small, **settings)
    list(replay(only_expert, prompts, large, [small], [], "dexperts", 2.0))


def test_models_without_a_cache_read_everything(prompts):
    class Uncached(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.device, self.config = model, model.device, model.config

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    large, expert, anti = make("llama"), make("llama", seed=1), make("llama", seed=2)
    settings = {**padded(prompts), "max_new_tokens": 5, "temperature": 0}
    cached = generate(large, expert, anti, **settings)
    uncached = generate(*(Uncached(m) for m in (large, expert, anti)), **settings)
    assert torch.equal(uncached.sequences, cached.sequences)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_with_a_cache_read_a_token_once(prompts, family):
    """Whatever this version of transformers calls the cache."""
    models, widths = [make(family, seed=i) for i in range(3)], []
    for model in models:
        model.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True)
    generate(*models, **padded(prompts), max_new_tokens=4, temperature=0)
    assert widths == [prompts[0].shape[1]] * 3 + [1] * 9


@pytest.mark.parametrize("method", ["proxy_tuning", "dynamic"])
@pytest.mark.parametrize("by", ["mask", "pad"])
def test_processor_in_hf_generate(prompts, method, by):
    large, expert, anti = make("llama"), make("llama", V + 2, seed=1), make("llama", V + 4, seed=2)
    ids, mask = prompts
    settings = {"attention_mask": mask} if by == "mask" else {"pad_token_id": 0}
    processor = FusionLogitsProcessor(expert, anti, method=method, **settings)
    for _ in range(2):  # the second run starts the caches anew
        theirs = large.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                                pad_token_id=0, eos_token_id=None, logits_processor=LogitsProcessorList([processor]))
        ours = generate(large, expert, anti, input_ids=ids, attention_mask=mask, method=method, max_new_tokens=6,
                        eos_token_id=(), temperature=0)
        assert torch.equal(theirs, ours.sequences)


def test_processor_follows_beams(prompts):
    large, expert, anti = make("llama"), make("llama", seed=1), make("llama", seed=2)
    ids, mask = prompts

    class Forgetful(FusionLogitsProcessor):
        def __call__(self, input_ids, scores):
            self.reset()
            return super().__call__(input_ids, scores)

    beams = [large.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0,
        eos_token_id=None, logits_processor=LogitsProcessorList([kind(expert, anti, attention_mask=mask)]),
    ) for kind in (FusionLogitsProcessor, Forgetful)]  # fmt: skip
    assert torch.equal(*beams)


def test_processor_keeps_the_width(prompts):
    expert, anti = make("llama", V - 9, seed=1), make("llama", seed=2)
    ids = prompts[0].clamp(max=V - 10)
    scores = torch.randn(3, V)
    fused = FusionLogitsProcessor(expert, anti)(ids, scores)
    assert fused.shape == (3, V) and torch.isneginf(fused[:, V - 9:]).all() and fused[:, :V - 9].isfinite().all()


def test_errors(prompts):
    large, ids = make("llama"), prompts[0]
    with pytest.raises(ValueError, match="method must be one of"):
        generate(large, input_ids=ids, method="magic")
    with pytest.raises(ValueError, match="experts must be at least 1"):
        generate(large, input_ids=ids)
    with pytest.raises(ValueError, match="anti must be given"):
        generate(large, large, input_ids=ids, method="dynamic")
    with pytest.raises(ValueError, match="0 on the left only"):
        generate(large, large, large, input_ids=ids, attention_mask=prompts[1].flip(1))
    with pytest.raises(ValueError, match="uniform must be of shape"):
        generate(large, large, large, input_ids=ids, max_new_tokens=3, uniform=torch.rand(3, 2))


def test_a_row_of_nan_ends(prompts):
    large = make("llama")
    broken = make("llama", seed=3)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    out = generate(large, broken, large, input_ids=prompts[0], max_new_tokens=3)
    assert out.lengths.tolist() == [0, 0, 0] and out.logprobs[:, 0].isnan().all()


def test_backends_agree(prompts):
    large, expert, anti = make("llama"), make("llama", seed=1), make("llama", seed=2)
    uniform = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    settings = {**padded(prompts), "method": "dynamic", "max_new_tokens": 5, "uniform": uniform}
    auto = generate(large, expert, anti, **settings)
    with w2s_fast.backend("reference"):
        plain = generate(large, expert, anti, **settings)
    assert torch.equal(auto.sequences, plain.sequences)
    torch.testing.assert_close(auto.alphas, plain.alphas, atol=1e-3, rtol=0)


def test_what_is_returned_can_be_trained_on(prompts):
    large, expert, anti = make("llama"), make("llama", seed=1), make("llama", seed=2)
    out = generate(large, expert, anti, **padded(prompts), max_new_tokens=3, method="dynamic")
    assert not any(x.is_inference() for x in out)
    large(input_ids=out.sequences, labels=out.sequences).loss.backward()
    assert large.lm_head.weight.grad.isfinite().all()


def test_encoder_decoders_are_refused(prompts):
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16))  # fmt: skip
    small = make("llama")
    with pytest.raises(ValueError, match=r"large must be a decoder-only .* BartForConditionalGeneration. An encoder"):
        generate(bart, small, small, input_ids=prompts[0])
    with pytest.raises(ValueError, match=r"experts\[1\] must be a decoder-only"):
        generate(small, [small, bart], small, input_ids=prompts[0])


def test_encoders_are_refused(prompts):
    """BERT and its kind are decoders only if their configuration says so."""
    config = transformers.BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"large must be a decoder, got BertLMHeadModel. .* is_decoder=False"):
        generate(transformers.BertLMHeadModel(config), method="static", input_ids=prompts[0])


def test_prompts_outside_a_vocabulary_are_refused(prompts):
    large, expert, anti = make("llama"), make("llama", 40, seed=1), make("llama", 45, seed=2)
    ids, mask = prompts[0].clamp(max=39), prompts[1]
    with pytest.raises(ValueError, match=r"input_ids must be below 40, the narrowest vocabulary \(experts.* got 50"):
        generate(large, expert, anti, input_ids=ids.index_fill(1, torch.tensor([6]), 50))
    with pytest.raises(ValueError, match="input_ids must be at least 0, got -1"):
        generate(large, expert, anti, input_ids=ids.index_fill(1, torch.tensor([6]), -1))
    settings = {"attention_mask": mask, "max_new_tokens": 6, "temperature": 0}
    with_other_padding = generate(large, expert, anti, input_ids=torch.where(mask == 1, ids, 55), **settings)
    plain = generate(large, expert, anti, input_ids=ids, **settings)
    assert torch.equal(with_other_padding.sequences[:, 7:], plain.sequences[:, 7:])


def test_rows_end_with_a_pad_token_that_small_models_do_not_have(prompts):
    large, expert, anti = make("llama"), make("llama", 40, seed=1), make("llama", 45, seed=2)
    ids = prompts[0].clamp(max=39)
    settings = {"input_ids": ids, "attention_mask": prompts[1], "max_new_tokens": 8, "temperature": 0}
    free = generate(large, expert, anti, eos_token_id=(), **settings)
    out = generate(large, expert, anti, eos_token_id=int(free.sequences[0, 8]), pad_token_id=55, **settings)
    assert (out.sequences == 55).any()
    for row in range(3):
        length = 7 + int(out.lengths[row])
        assert torch.equal(out.sequences[row, :length], free.sequences[row, :length])
        assert out.sequences[row, length:].eq(55).all()


@pytest.mark.parametrize("length", [1, 5])
def test_one_prompt(length):
    large, expert, anti = make("llama"), make("gpt2", seed=1), make("opt", seed=2)
    ids = torch.arange(3, 3 + length)[None]
    out = generate(large, expert, anti, input_ids=ids, max_new_tokens=4, eos_token_id=())
    assert len(list(replay(out, (ids, torch.ones_like(ids)), large, [expert], [anti], "proxy_tuning", 1.0))) == 4


def test_models_under_adapters(prompts):
    """LoRA changes weights and is served; adapters that depend on the prompt are refused."""
    peft = pytest.importorskip("peft")
    large, small = make("llama"), make("llama", seed=1)
    tuned = peft.get_peft_model(make("llama", seed=1), peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()  # fmt: skip
    settings = {**padded(prompts), "max_new_tokens": 5}
    out = generate(large, tuned, small, **settings)
    merged = tuned.merge_and_unload()
    list(replay(out, prompts, large, [merged], [small], "proxy_tuning", 1.0))
    assert not torch.equal(last_logits(merged, prompts[0][0]), last_logits(small, prompts[0][0]))
    prompted = peft.get_peft_model(make("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"experts must be a model without adapters that depend on the prompt.*PROMPT"):
        generate(large, prompted, small, **settings)


def test_models_under_torch_compile(prompts):
    large, expert, anti = make("llama"), make("llama", seed=1), make("llama", seed=2)
    settings = {**padded(prompts), "max_new_tokens": 4, "temperature": 0}
    compiled = [torch.compile(m) for m in (large, expert, anti)]
    calls = []
    compiled[1].register_forward_pre_hook(lambda m, a: calls.append(m))
    with torch.compiler.set_stance("force_eager"):  # what runs is the module that was compiled, without the wait
        out = generate(*compiled, **settings)
    assert torch.equal(out.sequences, generate(large, expert, anti, **settings).sequences)
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(prompts, dtype):
    large, expert, anti = (make("llama", seed=i).to(dtype) for i in range(3))
    settings = {"max_new_tokens": 6, "pad_token_id": 0}
    theirs = large.generate(input_ids=prompts[0], attention_mask=prompts[1], do_sample=False, eos_token_id=None,
                            **settings)  # fmt: skip
    ours = generate(large, expert, anti, **padded(prompts), weights=0.0, temperature=0, **settings)
    assert torch.equal(ours.sequences, theirs)
