"""Tokens of vLLM's engine with the processor against our own loop over the same models in transformers."""

import random

import pytest
import torch

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

from w2s_fast.integrations.transformers import METHODS, generate
from w2s_fast.integrations.transformers.recipes import Fuser
from w2s_fast.integrations.vllm.fusion import PATIENCE

NEW = 10
SETTINGS = {
    "static": {"weights": 0.8, "base_weight": 0.5}, "proxy_tuning": {"weights": 0.7}, "dexperts": {"weights": 1.5},
    "contrastive": {"student_temperature": 0.7, "plausible": ("min_p", 0.05)}, "dera": {"weights": 0.6},
    "genarm": {"weights": [0.9]}, "dynamic": {},
}  # fmt: skip


def prompts(count, seed=0, longest=40):
    draw = random.Random(seed)
    return [[draw.randrange(3, 190) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def params(method=None, settings=None, **more):
    extra = {f"w2s_fast_{name}": value for name, value in (settings or {}).items()}
    if method is not None:
        extra["w2s_fast_method"] = method
    return SamplingParams(**{"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "detokenize": False, **more},
                          extra_args=extra)  # fmt: skip


def run(engine, ids, wanted):
    made = engine.generate([{"prompt_token_ids": one} for one in ids], wanted, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in made]


def small(models, method):
    """The experts and anti-experts that a method takes, of one of each."""
    spec = METHODS[method]
    return ([] if spec.experts[1] == 0 else [models[1]]), ([] if spec.anti is False else [models[2]])


def ours(models, ids, method, settings, new=NEW, **more):
    experts, anti = small(models, method)
    made = generate(models[0], experts, anti, input_ids=torch.tensor([ids]), method=method, **settings, do_sample=False,
                    max_new_tokens=new, eos_token_id=(), **more)  # fmt: skip
    return made.sequences[0, len(ids):].tolist()


def processor_of(engine):
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    held = runner.sampler.logits_processors if hasattr(runner, "req_states") else runner.input_batch.logitsprocs.all
    return next(p for p in held if type(p).__name__ == "FusionLogitsProcessor")


def preemptions(engine):
    return sum(int(m.value) for m in engine.get_metrics() if m.name == "vllm:num_preemptions")


def test_the_runner_is_the_one_that_was_asked_for(engine, runner):
    found = type(engine.llm_engine.model_executor.driver_worker.worker.model_runner).__module__
    assert found == ("vllm.v1.worker.cpu.model_runner" if runner == 2 else "vllm.v1.worker.cpu_model_runner")


def test_every_method_in_one_batch(engine, models):
    """Prompts of all lengths, longer than what one step reads among them; with requests that are not fused."""
    methods = [*SETTINGS, "none"] * 2
    ids = prompts(len(methods))
    assert max(map(len, ids)) > 32
    found = run(engine, ids, [params(m, SETTINGS.get(m)) for m in methods])
    for one, method, tokens in zip(ids, methods, found, strict=True):
        if method == "none":
            expected = models[0].generate(torch.tensor([one]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
            assert tokens == expected[0, len(one):].tolist()
        else:
            assert tokens == ours(models, one, method, SETTINGS[method]), method


def test_the_defaults_of_the_engine_and_weights_of_each_request(engine, models):
    ids = prompts(4, seed=1)
    found = run(engine, ids, [params(), *(params(settings={"weights": w}) for w in (0.0, 0.4, 2.0))])
    for one, weight, tokens in zip(ids, (1.0, 0.0, 0.4, 2.0), found, strict=True):
        assert tokens == ours(models, one, "proxy_tuning", {"weights": weight})


def first_draw(seed, top_k, top_p):
    """The first runner's way from logits to a token."""
    generator, sampler = torch.Generator().manual_seed(seed), TopKTopPSampler()
    return lambda logits, place: sampler(logits, {0: generator}, torch.tensor([top_k]), torch.tensor([top_p]))[0]


def second_draw(seed, top_k, top_p):
    """The second's: the noise is a function of the seed and the place."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    def draw(logits, place):
        kept = apply_top_k_top_p(logits, torch.tensor([top_k]), torch.tensor([top_p]))
        row, place = torch.tensor([0], dtype=torch.int32), torch.tensor([place])
        return gumbel_sample(kept, row, torch.ones(1), torch.tensor([seed]), place, False, False)

    return draw


@torch.no_grad()
def drawn(models, ids, draw, temperature):
    """Our fusion of whole sequences read anew, and vLLM's way from logits to a token."""
    tokens, fuser = list(ids), Fuser("proxy_tuning")
    for _ in range(NEW):
        large, expert, anti = (m(input_ids=torch.tensor([tokens])).logits[:, -1] for m in models)
        logits = fuser.fuse(large, [expert], [anti])[0] / temperature
        tokens.append(int(draw(logits, len(tokens) - 1)))
    return tokens[len(ids):]


def test_seeded_sampling_whatever_else_is_in_the_batch(engine, models, runner):
    """Prompts that one step reads: the first runner cannot read them in pieces with seeds on a CPU."""
    ids = prompts(5, seed=2, longest=7 if runner == 1 else 40)
    how = {"top_k": 60, "top_p": 0.95}
    wanted = [params(seed=seed, temperature=2.0, **how) for seed in range(4)] + [params("none")]
    found = run(engine, ids, wanted)
    for seed in range(4):
        draw = (first_draw if runner == 1 else second_draw)(seed, **how)
        assert found[seed] == drawn(models, ids[seed], draw, 2.0)
    other = [params(seed=seed, temperature=2.0, **how) for seed in (9, 10)]
    assert run(engine, ids[:1] * 2, other)[0] != found[0]


def test_preempted_requests_go_on(engine, models):
    """Twelve requests that need more room than there is: vLLM drops some and reads them again."""
    ids, before = prompts(12, seed=3, longest=30), preemptions(engine)
    found = run(engine, ids, [params("proxy_tuning", {"weights": 0.7}, max_tokens=50)] * 12)
    assert preemptions(engine) > before
    for one, tokens in list(zip(ids, found, strict=True))[-4:]:  # the last that came are the first to be preempted
        assert tokens == ours(models, one, "proxy_tuning", {"weights": 0.7}, new=50)


def test_an_aborted_request_leaves_the_rest_and_its_caches_go(engine, models):
    ids, core = prompts(3, seed=4), engine.llm_engine
    for name, one in zip("abc", ids, strict=True):
        core.add_request(name, {"prompt_token_ids": one}, params(max_tokens=PATIENCE + 12))
    done = {}
    for step in range(100):
        if step == 5:
            core.abort_request(["b"])
        for output in core.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        if not core.has_unfinished_requests():
            break
    for name, one in (("a", ids[0]), ("c", ids[2])):
        assert done[name] == ours(models, one, "proxy_tuning", {}, new=PATIENCE + 12)
    held = [len(m) for m in (*processor_of(engine).fusion.experts, *processor_of(engine).fusion.anti)]
    assert held == [2, 2]  # those of the last batch; the aborted one is gone


def test_what_vllm_masks_stays_masked(engine, models):
    allowed = list(range(20, 120, 3))
    ids = prompts(2, seed=5)
    found = run(engine, ids, [params(allowed_token_ids=allowed), params("dynamic", allowed_token_ids=allowed)])
    assert {*found[0], *found[1]} <= set(allowed)
    one = ours(models, ids[0], "proxy_tuning", {}, prefix_allowed_tokens_fn=lambda row, ids: allowed)
    assert found[0] == one


def test_requests_that_cannot_be_served(engine, models):
    """Refused where they come in, if their settings say it; else they end, and the others go on."""
    for extra, message in (({"method": "magic"}, "w2s_fast_method must be one of"), ({"wieghts": 1.0}, "w2s_fast_wieg"),
                           ({"method": "proxy_tuning", "weights": "high"}, "weights")):  # fmt: skip
        with pytest.raises(VLLMValidationError, match=message):
            run(engine, [[5, 6]], params(None, extra))
    ids = [[5, 6, 195], [5, 6, 7], [8, 9, 10]]
    wanted = [params(ignore_eos=False), params("genarm", {"weights": [1.0, 2.0]}, ignore_eos=False), params()]
    found = run(engine, ids, wanted)
    assert set(found[0]) == set(found[1]) == {1}  # the end token
    assert found[2] == ours(models, ids[2], "proxy_tuning", {})


def test_processed_logprobs_are_those_of_the_fusion(engine, models):
    ids = prompts(1, seed=6)[0]
    made = engine.generate([{"prompt_token_ids": ids}], params(logprobs=1), use_tqdm=False)[0].outputs[0]
    mine = generate(*models, input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, eos_token_id=())
    found = [step[token].logprob for token, step in zip(made.token_ids, made.logprobs, strict=True)]
    assert list(made.token_ids) == mine.sequences[0, len(ids):].tolist()
    with torch.no_grad():
        read = [m(input_ids=mine.sequences).logits[0, len(ids) - 1 : -1, :190] for m in models]
    expected = (read[0] + read[1] - read[2]).log_softmax(-1).max(-1).values
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)
