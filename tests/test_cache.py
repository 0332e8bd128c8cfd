"""A key/value cache is used, by the transformer-lens and the transformers that are installed: where it is ignored, every pass of `generate` after
the prompt sees one token alone, and nobody is told (TransformerBridge with transformers 5.24, which renamed what hands it on)."""

import pytest
import torch

from tests import zoo

HOOKED = [n for n in ("HT-standard", "HT-rotary", "HT-grouped") if n in zoo.ALL]
BRIDGED = [f"Bridge-{kind}{mode}" for kind in ("gpt2", "llama", "neox") for mode in ("", "-compatible", "-processed")]


@pytest.mark.parametrize("name", HOOKED + BRIDGED)
@torch.no_grad()
def test_logits_after_a_cache_are_those_of_the_whole_sequence(name):
    model, tokens = zoo.ALL[name](), zoo.tokens(2, 9)
    if name in HOOKED:
        from transformer_lens import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
        first = model(tokens[:, :5], past_kv_cache=cache, attention_mask=torch.ones(2, 5).long())
        rest = dict(past_kv_cache=cache, attention_mask=torch.ones(2, 4).long())
    else:
        first, cache = model(tokens[:, :5], use_past_kv_cache=True, return_type="logits_and_cache")
        rest = dict(past_key_values=cache)
    second, whole = model(tokens[:, 5:], **rest), model(tokens)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-4), (
        "the cache is ignored: generate gives other tokens than the model means"
    )
    assert (model(tokens[:, 5:]) - whole[:, 5:]).abs().max() > 0.1  # without what came before they are others


@pytest.mark.parametrize("name", ["Bridge-gpt2", "Bridge-llama", "Bridge-neox", *(n for n in ("HT-rotary", "HT-grouped") if n in zoo.ALL)])
@torch.no_grad()
def test_generate_goes_on_as_passes_over_the_whole_do(name):
    model, tokens = zoo.ALL[name](), zoo.tokens(2, 6)
    made = model.generate(tokens, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=True)
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, tokens)
