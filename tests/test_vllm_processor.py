"""The processor of integrations.vllm against stand-ins of vLLM's two interfaces; the engine itself: tests/vllm."""

import enum
import importlib
import json
import random
import sys
import threading
import types
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from w2s_fast.integrations.transformers import generate  # noqa: E402
from w2s_fast.testing.tiny_models import VOCABULARY, tiny_model  # noqa: E402

NAME = "w2s_fast.integrations.vllm"
BatchUpdate = namedtuple("BatchUpdate", "batch_size removed added moved")
Params = namedtuple("Params", "extra_args")
Move = enum.Enum("Move", "UNIDIRECTIONAL SWAP")


class Interface:
    """What the processor inherits from: nothing but the name."""


@pytest.fixture(scope="module")
def models():
    return [tiny_model("LlamaForCausalLM", seed) for seed in range(4)]


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    made = []
    for number, model in enumerate(models):
        made.append(str(tmp_path_factory.mktemp(f"model{number}")))
        model.save_pretrained(made[-1])
    return made


@pytest.fixture(params=["with the second runner", "without"])
def package(request, monkeypatch):
    """`w2s_fast.integrations.vllm` over stand-ins of vLLM's modules, with and without the newer interface."""
    for name in ("", ".v1", ".v1.sample", ".v1.worker", ".v1.worker.gpu", ".v1.worker.gpu.sample"):
        monkeypatch.setitem(sys.modules, f"vllm{name}", types.ModuleType(f"vllm{name}"))
    first = types.ModuleType("vllm.v1.sample.logits_processor")
    first.LogitsProcessor, first.MoveDirectionality = Interface, Move
    monkeypatch.setitem(sys.modules, first.__name__, first)
    second = types.ModuleType("vllm.v1.worker.gpu.sample.logits_processor")
    if request.param != "without":
        second.LogitsProcessor = type("Newer", (), {})
    monkeypatch.setitem(sys.modules, second.__name__, second)
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module(NAME)
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        del sys.modules[name]


def config(folders, experts=1, defaults=None, **changes):
    """What the processor looks at of vLLM's configuration."""
    model = types.SimpleNamespace(
        dtype=torch.float32, trust_remote_code=False, max_model_len=64, enable_prompt_embeds=False,
        hf_text_config=types.SimpleNamespace(eos_token_id=[7, 8]),
    )  # fmt: skip
    given = {"experts": folders[1 : 1 + experts], "anti": folders[3], "defaults": defaults or {}}
    found = types.SimpleNamespace(model_config=model, speculative_config=None, additional_config={"w2s_fast": given})
    for name, value in changes.items():
        setattr(model if hasattr(model, name) else found, name, value)
    return found


def extra(method, **settings):
    return {"w2s_fast_method": method, **{f"w2s_fast_{name}": value for name, value in settings.items()}}


class First:
    """The batch of vLLM's first model runner: requests keep their places until one in front of them goes."""

    def __init__(self, processor, large):
        self.processor, self.large, self.places = processor, large, []
        self.removed, self.added, self.moved = [], [], []

    def add(self, prompt, extra_args, output=None):
        output = [] if output is None else output
        self.places.append((prompt, output))
        self.added.append((len(self.places) - 1, Params(extra_args), prompt, output))
        return output

    def remove(self, output):
        """A request goes; the last of the batch takes its place."""
        place = next(i for i, (_, held) in enumerate(self.places) if held is output)
        last = len(self.places) - 1
        if place != last:
            self.moved.append((last, place, Move.UNIDIRECTIONAL))
            self.places[place] = self.places[last]
        self.removed.append(place)
        self.places.pop()

    def swap(self, one, other):
        self.moved.append((one, other, Move.SWAP))
        self.places[one], self.places[other] = self.places[other], self.places[one]

    def step(self, discard=()):
        """One step; of outputs in ``discard`` the prompts are in pieces: their tokens are not kept."""
        update = BatchUpdate(len(self.places), self.removed, self.added, self.moved)
        self.processor.update_state(update if self.removed or self.added or self.moved else None)
        self.removed, self.added, self.moved = [], [], []
        with torch.no_grad():
            rows = [self.large(input_ids=torch.tensor([p + o])).logits[0, -1].float() for p, o in self.places]
        for (_, output), token in zip(self.places, self.processor.apply(torch.stack(rows)).argmax(-1), strict=True):
            if not any(output is one for one in discard):
                output.append(int(token))


def ours(models, prompt, new, experts=1, **settings):
    method = settings.get("method", "proxy_tuning")
    made = generate(
        models[0], [] if method == "contrastive" else models[1 : 1 + experts],
        None if method in ("genarm", "dera") else models[3], input_ids=torch.tensor([prompt]), max_new_tokens=new,
        do_sample=False, eos_token_id=(), **settings,
    )  # fmt: skip
    return made.sequences[0, len(prompt):].tolist()


def test_a_batch_that_changes(package, folders, models):
    """Requests of several methods come, are swapped, pause, are read in pieces and go."""
    processor = package.FusionLogitsProcessor(config(folders), torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    batch, draw = First(processor, models[0]), random.Random(0)
    wanted = [{"method": "proxy_tuning", "weights": 0.5}, {"method": "genarm"}, {"method": "contrastive"},
              {"method": "proxy_tuning", "weights": 1.5}, {"method": "dynamic"}, {"method": "dera", "weights": 0.3}]
    prompts = [[draw.randrange(9, 60) for _ in range(n)] for n in (3, 9, 5, 5, 1, 17)]
    outputs = [batch.add(p, extra(**w)) for p, w in zip(prompts[:4], wanted[:4], strict=True)]
    batch.add([4, 5], None)
    batch.step(discard=[outputs[1]])  # its prompt is in pieces
    batch.step()
    batch.swap(0, 3)
    outputs += [batch.add(p, extra(**w)) for p, w in zip(prompts[4:], wanted[4:], strict=True)]
    batch.step()
    batch.remove(outputs[0])  # not scheduled for a step
    batch.step()
    batch.add(prompts[0], extra(**wanted[0]), outputs[0])
    batch.remove(outputs[2])  # preempted: its tokens come back in another list
    batch.step()
    outputs[2] = batch.add(prompts[2], extra(**wanted[2]), list(outputs[2]))
    for _ in range(3):
        batch.step()
    batch.remove(outputs[3])
    for _ in range(20):
        batch.step()
    for prompt, output, settings in zip(prompts, outputs, wanted, strict=True):
        assert output[:12] == ours(models, prompt, len(output[:12]), **settings), settings
    assert [len(m) for m in processor.fusion.experts + processor.fusion.anti] == [4, 3]


def test_weights_of_several_experts(package, folders, models):
    """Requests that differ in their weights alone are fused together, each with its own."""
    settings = config(folders, 2, {"method": "proxy_tuning"})
    processor = package.FusionLogitsProcessor(settings, torch.device("cpu"), False)
    batch, weights = First(processor, models[0]), [1.0, 0.3, [0.2, 0.9], [1.5, 0.0]]
    outputs = [batch.add([11, 12 + i], {"w2s_fast_weights": w} if i else None) for i, w in enumerate(weights)]
    for _ in range(5):
        batch.step()
    for i, (output, weight) in enumerate(zip(outputs, weights, strict=True)):
        assert output == ours(models, [11, 12 + i], 5, experts=2, weights=weight)


class Second:
    """The second model runner: rows of a step are mapped to slots, which hold all tokens; slots are used again."""

    def __init__(self, processor_of, large, slots=4, length=64):
        tokens = torch.zeros(slots, length, dtype=torch.int32)
        self.tokens, self.lengths, self.prefill = tokens, [0] * slots, np.zeros(slots, np.int32)
        self.processor = processor_of(types.SimpleNamespace(
            device=torch.device("cpu"), all_token_ids=types.SimpleNamespace(gpu=tokens),
            prefill_len=types.SimpleNamespace(np=self.prefill)))  # fmt: skip
        self.large = large

    def add(self, slot, ids, extra_args):
        self.tokens[slot, : len(ids)] = torch.tensor(ids)
        self.lengths[slot] = self.prefill[slot] = len(ids)
        return self.processor.add_request(slot, Params(extra_args))

    def step(self, slots, reads=None):
        """``reads``: how far the prompt of a slot has been read."""
        reads = reads or {}
        visible = [reads.get(slot, self.lengths[slot]) for slot in slots]
        read = [self.tokens[slot, :n].tolist() for slot, n in zip(slots, visible, strict=True)]
        with torch.no_grad():
            logits = torch.stack([self.large(input_ids=torch.tensor([one])).logits[0, -1].float() for one in read])
        context = types.SimpleNamespace(
            expanded_idx_mapping=torch.tensor(slots), pos=torch.tensor(visible) - 1,
            input_ids=torch.tensor([one[-1] for one in read]))  # fmt: skip
        for slot, token in zip(slots, self.processor.apply(logits, context).argmax(-1), strict=True):
            if slot not in reads:
                self.tokens[slot, self.lengths[slot]] = token
                self.lengths[slot] += 1

    def made(self, slot, prompt):
        return self.tokens[slot, len(prompt) : self.lengths[slot]].tolist()


def test_the_second_runner(package, folders, models):
    runner = Second(lambda states: package.FusionLogitsProcessor(config(folders), states), models[0])
    a, b, c = [11, 12, 13, 14, 15, 16], [21, 22], [31, 32, 33]
    assert runner.add(2, a, extra("proxy_tuning")) and runner.add(0, b, extra("genarm", weights=0.5))
    assert not runner.add(1, c, None)
    runner.step([0, 1, 2], reads={2: 3})
    assert len(runner.processor.fusion.anti[0]) == 0  # half a prompt is not read
    for order in ([2, 0, 1], [1, 2, 0], [2, 0], [0, 2, 1]):
        runner.step(order)
    assert runner.made(2, a) == ours(models, a, 4, method="proxy_tuning")
    assert runner.made(0, b) == ours(models, b, 5, method="genarm", weights=0.5)
    runner.add(2, c, extra("proxy_tuning", weights=0.4))  # the slot is given to another request
    again = b + runner.made(0, b)
    runner.add(0, again, extra("genarm", weights=0.5))  # preempted and back in its slot
    for _ in range(3):
        runner.step([0, 2])
    assert runner.made(2, c) == ours(models, c, 3, method="proxy_tuning", weights=0.4)
    assert runner.made(0, b) == ours(models, b, 8, method="genarm", weights=0.5)


def test_what_does_not_fit_ends(package, folders, models, caplog):
    processor = package.FusionLogitsProcessor(config(folders), torch.device("cpu"), False)
    batch = First(processor, models[0])
    ended = [batch.add([11, 12], extra("genarm", weights=[1.0, 2.0])), batch.add([11, -1], extra("genarm")),
             batch.add([11, 12], {"w2s_fast_weights": 2.0})]  # fmt: skip
    fine = batch.add([11, 12], extra("genarm"))
    batch.large = lambda input_ids: models[0](input_ids=input_ids.clamp(min=0))
    for _ in range(3):
        batch.step()
    assert ended == [[7, 7, 7]] * 3 and fine == ours(models, [11, 12], 3, method="genarm")
    said = [record.message for record in caplog.records]
    assert "weights" in said[0] and "w2s_fast_method" in said[1] and f"below {VOCABULARY}" in said[2] and len(said) == 3


@pytest.mark.parametrize("given, message", [
    ({"w2s_fast_method": "magic"}, "w2s_fast_method must be one of"),
    ({"w2s_fast_wieghts": 1.0}, "extra_args must be of w2s_fast_method, .* got w2s_fast_wieghts"),
    (extra("proxy_tuning", weights={"a": 1}), "w2s_fast_weights must be a number or a list"),
    (extra("proxy_tuning", weights=float("nan")), "weights"),
    (extra("proxy_tuning", weights=["a"]), "weights"),
    (extra("contrastive", student_temperature=0), "student_temperature must be"),
    (extra("proxy_tuning", plausible=["best", 0.1]), "plausible"),
    (extra("proxy_tuning", base_weight=2.0), "base_weight must be 1.0"),
    (extra("dynamic", dynamic={"alpha_max": -1}), "alpha_max"),
])  # fmt: skip
def test_settings_that_cannot_be_right_are_refused_with_the_request(package, given, message):
    with pytest.raises(ValueError, match=message):
        package.FusionLogitsProcessor.validate_params(Params(given))


@pytest.mark.parametrize("given", [
    None, {}, {"other": 1}, {"w2s_fast_weights": 0.5}, extra("none"), extra("genarm", weights=[1.0, 2.0, 3.0]),
    extra("dexperts", plausible="none"), extra("contrastive", plausible=["min_p", 0.2]), extra("static", base_weight=2),
])  # fmt: skip
def test_settings_that_can(package, given):
    package.FusionLogitsProcessor.validate_params(Params(given))


@pytest.mark.parametrize("changes, message", [
    ({"additional_config": {}}, 'additional_config must be a dict with an entry "w2s_fast"'),
    ({"additional_config": {"w2s_fast": {"anti": []}}}, r'\["w2s_fast"\] must be with experts or anti'),
    ({"additional_config": {"w2s_fast": {"expert": "a"}}}, "must be made of experts, anti and defaults"),
    ({"additional_config": {"w2s_fast": {"experts": [1]}}}, r'\["experts"\] must be a path or a list of paths'),
    ({"additional_config": {"w2s_fast": {"experts": "a", "defaults": {"weight": 1}}}}, "must be made of method, weig"),
    ({"speculative_config": object()}, "speculative_config must be None"),
    ({"enable_prompt_embeds": True}, "enable_prompt_embeds must be False"),
    ({"max_model_len": 4096}, "max_model_len must be at most 128"),
])  # fmt: skip
def test_engines_that_are_refused(package, folders, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        package.FusionLogitsProcessor(config(folders, **changes), torch.device("cpu"), False)
    with pytest.raises(ValueError, match=r"defaults.*settings that fit the models.*weights"):
        package.FusionLogitsProcessor(
            config(folders, defaults={"method": "genarm", "weights": [1.0, 2.0]}), torch.device("cpu"), False)


@pytest.fixture
def served(models):
    """A server that answers as vLLM's completions interface does for the first expert; it may be told to fail."""
    state = types.SimpleNamespace(asked=[], missing=0, fails=False)

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body)
            choices = []
            for index, ids in enumerate(body["prompt"]):
                with torch.no_grad():
                    row = models[1](input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                names = {f"token_id:{i}": float(x) for i, x in list(enumerate(row))[state.missing :]}
                choices.insert(0, {"index": index, "logprobs": {"top_logprobs": [names]}})  # in any order
            self.send_response(503 if state.fails else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": choices}).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def test_an_expert_on_another_server(package, folders, models, served):
    """Tokens of the same model in this process; a text that has not grown is not asked for again."""
    places = [folders[0], served.url, folders[2], folders[3]]
    processor = package.FusionLogitsProcessor(config(places), torch.device("cpu"), False)
    batch, prompts = First(processor, models[0]), [[3, 4, 5], [9], [20, 21]]
    outputs = [batch.add(p, extra("proxy_tuning", weights=0.7)) for p in prompts]
    batch.step(discard=[outputs[0]])  # its prompt is in pieces
    for _ in range(4):
        batch.step()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output == ours(models, prompt, len(output), method="proxy_tuning", weights=0.7)
    asked = [body["prompt"] for body in served.asked]
    assert asked[0] == [[0]] and sorted(asked[1]) == sorted(prompts) and len(asked[2]) == 2
    assert all(body["logprobs"] == -1 and body["max_tokens"] == 1 for body in served.asked)


def test_a_server_that_fails_ends_the_requests_that_read_it(package, folders, models, served, caplog):
    places = [folders[0], served.url, folders[2], folders[3]]
    processor = package.FusionLogitsProcessor(config(places), torch.device("cpu"), False)
    batch = First(processor, models[0])
    one, other = batch.add([3, 4], extra("genarm")), batch.add([5], None)
    batch.step()
    served.fails = True
    batch.step()
    batch.step()
    assert one[1:] == [7, 7] and "503" in caplog.text and other[1:] != [7, 7]


def test_a_server_that_cannot_serve_is_refused(package, folders, served):
    served.missing = 2
    for url in (served.url, "http://127.0.0.1:1"):
        with pytest.raises(ValueError, match="--max-logprobs"):
            package.FusionLogitsProcessor(config([folders[0], url, *folders[2:]]), torch.device("cpu"), False)
