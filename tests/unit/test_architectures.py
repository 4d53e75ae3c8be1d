"""The one forward against plain transformers, over architectures with different norms, positions and windows."""

import pytest
import torch

from rdpo.config import Lora
from rdpo.errors import InputError
from rdpo.modeling.attention import attend_by_span, flex_by_block
from rdpo.modeling.layout import packed_batch, padded_batch
from rdpo.modeling.model import ForwardSettings, Tuning, load_policy
from tests.support.models import save_model

SETTINGS = ForwardSettings("float32", 8)
PROMPTS = [[5, 6, 7, 8, 40, 41, 42], [9, 10], [20]]
CHOSEN = [[11, 12, 13], [14, 15, 16, 17, 1], [21, 22, 23, 24]]
REJECTED = [[30, 31, 32, 33, 34, 35, 36], [14], [37, 38]]

ARCHITECTURES = {
    "LlamaConfig": {},
    "Qwen3Config": {"head_dim": 16},
    "MistralConfig": {"sliding_window": 4},
    "Gemma2Config": {
        "head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "attn_implementation": "eager",
    },
    "GPTNeoXConfig": {"num_key_value_heads": 2},
    "CohereConfig": {"logit_scale": 0.5},
    "GraniteConfig": {"logits_scaling": 4.0},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory, tokenizer):
    """A random two-layer model of one architecture, with weights large enough for distinct answers."""
    import transformers

    torch.manual_seed(3)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    config = getattr(transformers, request.param)(**{**settings, **ARCHITECTURES[request.param]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    return save_model(tmp_path_factory.mktemp(request.param), model, tokenizer)


def naive_logps(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    logps = torch.log_softmax(model(input_ids=ids).logits.float(), -1)[0, len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(completion)[:, None]).sum()


def naive_pairs(model):
    sequences = [*zip(PROMPTS, CHOSEN, strict=True), *zip(PROMPTS, REJECTED, strict=True)]
    return torch.stack([naive_logps(model, *sequence) for sequence in sequences])


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_equal_plain_transformers(folder, layout, checkpointing):
    model = plain(folder)
    expected = naive_pairs(model)
    weights = torch.linspace(-1, 1, len(expected))
    (expected * weights).sum().backward()
    policy = load_policy(folder, ForwardSettings("float32", 3, layout), Tuning(gradient_checkpointing=checkpointing))
    policy.train(checkpointing)
    actual = policy(policy.batch(PROMPTS, CHOSEN, REJECTED))
    (actual * weights).sum().backward()
    assert policy.packed == (layout == "packed")
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-3, rtol=1e-3)


def test_a_pair_does_not_see_its_neighbours(folder):
    policy = load_policy(folder, SETTINGS).eval()
    together = policy(policy.batch(PROMPTS, CHOSEN, REJECTED)).view(2, 3)
    for index in range(3):
        alone = policy(policy.batch(PROMPTS[index : index + 1], CHOSEN[index : index + 1], REJECTED[index : index + 1]))
        torch.testing.assert_close(alone, together[:, index], atol=1e-4, rtol=1e-5)


def test_adapter_off_is_the_base_model(folder):
    policy = load_policy(folder, SETTINGS).eval()
    adapted = load_policy(folder, SETTINGS, Tuning(Lora(rank=4))).eval()
    batch = policy.batch(PROMPTS, CHOSEN, REJECTED)
    torch.testing.assert_close(adapted(batch), policy(batch))
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(adapted(batch), policy(batch), atol=0.1)
    with adapted.as_reference():
        torch.testing.assert_close(adapted(batch), policy(batch))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flex_attention_equals_attention_by_span(window, softcap):
    torch.manual_seed(0)
    spans = packed_batch(PROMPTS, [CHOSEN, REJECTED]).spans
    query = torch.randn(1, 4, spans[-1].end, 16)
    key, value = torch.randn(2, 1, 2, spans[-1].end, 16)
    expected = attend_by_span(query, key, value, spans, 0.3, window, softcap).transpose(1, 2)
    actual = flex_by_block(query, key, value, spans, 0.3, window, softcap)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_an_architecture_that_cannot_pack_is_padded(tmp_path, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    folder = save_model(tmp_path, MambaForCausalLM(config), tokenizer)
    policy = load_policy(folder, SETTINGS).eval()
    assert not policy.packed
    torch.testing.assert_close(policy(padded_batch(PROMPTS, [CHOSEN, REJECTED])), naive_pairs(policy.model))
    with pytest.raises(InputError, match="cannot read packed rows"):
        load_policy(folder, ForwardSettings("float32", 8, "packed"))
