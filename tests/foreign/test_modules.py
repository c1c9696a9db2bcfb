"""Modules that nobody thought of: they compile, or are refused by the line that is in the way."""

import pytest
import torch

from aios_compile.errors import ConfigError, PromptTooLongError, RequestError, UnsupportedModelError
from tests.foreign import modules
from tests.foreign.modules import CALLABLE, GENERATABLE, Alibi, Called, Model, blocks, build, causal
from tests.variants import nightly


def eager(model, ids):
    positions = torch.arange(len(ids))
    with torch.no_grad():
        if isinstance(model, modules.Flat):
            return model(ids, positions)
        if isinstance(model, modules.Counted):
            return model(ids[None])[0][0]
        return model(ids[None], positions[None])[0]


def check_logits(model, found, counts=(1, 2, 16, 17, 40)):
    generator = torch.Generator().manual_seed(3)
    for tokens in counts:
        ids = torch.randint(0, modules.VOCABULARY, (tokens,), generator=generator)
        expected = eager(model, ids)
        error = (
            found(ids)[-len(expected) :] - expected
        ).abs().max() / expected.abs().max().clamp_min(1)
        assert error <= 1e-4, f"T={tokens}"


def greedy(model, ids, count):
    for _ in range(count):
        ids = torch.cat((ids, eager(model, ids)[-1:].argmax(-1)))
    return ids[-count:].tolist()


NIGHTLY = (
    *("spelled", "squared_relu", "odd_activation", "alibi_called", "complex_angles", "flat"),
    *("no_positions", "one_layer", "bool_mask", "counted"),
)


@pytest.mark.parametrize(
    "name", [*(n for n in GENERATABLE if n not in NIGHTLY), *nightly(*NIGHTLY)]
)
def test_generatable(name, compiled):
    model = build(GENERATABLE[name])
    with compiled(model, max_num_batched_tokens=24, max_model_len=90) as found:
        check_logits(model, found)
        prompt = torch.tensor([5, 9, 2, 44])
        result = found.generate(prompt.tolist(), max_tokens=8, temperature=0, ignore_eos=True)
        assert list(result.outputs[0].token_ids) == greedy(model, prompt, 8)


@pytest.mark.parametrize(
    "name", [*(n for n in CALLABLE if n != "running_mean"), *nightly("running_mean")]
)
def test_callable_only(name, compiled):
    make, line = CALLABLE[name]
    model = build(make)
    with compiled(model) as found:
        check_logits(model, found)
        with pytest.raises(RequestError, match=f"modules.py:.*{line}"):
            found.generate([3, 4, 5], max_tokens=4)
        with pytest.raises(PromptTooLongError, match=r"at most 64.*one step"):
            found(torch.zeros(65, dtype=torch.long))
        check_logits(model, found, (5,))  # a refusal leaves the model in order


def test_another_bias_given_to_sdpa(compiled):
    model = build(lambda: Model(blocks(lambda: Alibi(True, 2))))
    with pytest.raises(UnsupportedModelError, match=r"adds a bias.*modules.py:.*bias"):
        compiled(model)


def test_attention_in_both_directions(compiled):
    model = build(lambda: Model(blocks(lambda: Called("bidirectional"))))
    with pytest.raises(UnsupportedModelError, match=r"later ones.*modules.py:"):
        compiled(model)


def test_a_model_is_as_long_as_its_tables(compiled):
    model = build(GENERATABLE["counted"])
    sizes = {"max_model_len": None, "max_num_batched_tokens": None}
    with compiled(model, **sizes) as found:
        assert (found.limits.max_model_len, found.limits.max_num_batched_tokens) == (90, 90)
        check_logits(model, found, (90,))
        prompts = [torch.tensor([5, 9, 2]), torch.tensor([7])]
        given = found.generate([p.tolist() for p in prompts], max_tokens=6, temperature=0)
        assert [list(r.outputs[0].token_ids) for r in given] == [
            greedy(model, p, 6) for p in prompts
        ]
        with pytest.raises(PromptTooLongError, match="at most 90"):
            found(torch.zeros(91, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"max_model_len=96.*90 tokens[^\0]*modules.py:"):
        compiled(model)


def test_an_activation_changes_only_the_kernel_that_holds_it(compiled):
    digests = []
    for activation in (modules.squared_relu, modules.odd_activation):
        with compiled(build(lambda a=activation: Model(blocks(causal, activation=a)))) as found:
            digests.append({k.digest for k in found.program.kernels})
    first, second = digests
    assert len(first - second) == len(second - first) == 1
