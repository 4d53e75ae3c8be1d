"""The one forward against plain transformers, over architectures with different norms, positions and windows."""

import pytest
import torch

from rdpo.config import Lora
from rdpo.errors import InputError
from rdpo.modeling.attention import attend_by_span, flex_by_block
from rdpo.modeling.layout import packed_batch, padded_batch
from rdpo.modeling.masking import masked
from rdpo.modeling.model import ForwardSettings, Tuning, as_policy, load_policy
from rdpo.modeling.probe import ReadAs, settle_layout
from tests.support.architectures import causal_types, settled, small_model
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
    logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)[0, len(prompt) - 1 : -1]
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


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_masked_tokens_do_not_count(folder, layout):
    policy = load_policy(folder, ForwardSettings("float32", 8, layout)).eval()
    whole = policy.batch(PROMPTS, CHOSEN, REJECTED)
    each = policy.token_logps(whole)
    hidden = [[*masked(ids[:1]), *ids[1:]] for ids in CHOSEN]

    expected = torch.stack([each[whole.sequence == number].sum() for number in range(len(whole.lengths))])
    for number in range(len(CHOSEN)):
        expected[number] -= each[whole.sequence == number][0]
    torch.testing.assert_close(policy(policy.batch(PROMPTS, hidden, REJECTED)), expected, atol=1e-4, rtol=1e-5)


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
    scores = {"scaling": 0.3, "window": window, "softcap": softcap}
    expected = attend_by_span(query, key, value, spans, **scores).transpose(1, 2)
    actual = flex_by_block(query, key, value, spans, **scores)
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


def furthest(model, policy):
    """How far sums over answers are from those of plain transformers, on other texts than those of the probe."""
    with torch.inference_mode():
        actual = policy(policy.batch(PROMPTS, CHOSEN, REJECTED))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return float((actual - naive_pairs(model)).abs().max())


PROBED = {
    "hyperclovax": ("packed", ""),
    "falcon_h1": ("padded", ""),
    "recurrent_gemma": ("padded", ""),
    "phimoe": ("padded", "differ by"),
    "doge": ("padded", "differ by"),
    "nemotron": ("padded", "NotPackable"),
    "moshi": ("padded", "NotPackable"),
    "gemma2": ("packed", ""),
    "xlstm": ("padded", ""),
}


@pytest.mark.parametrize("model_type", PROBED)
def test_what_an_architecture_makes_of_its_logits_and_rows_is_found_out(model_type):
    model, policy, read_as = settled(model_type)
    assert isinstance(read_as, ReadAs), read_as
    assert (read_as.layout, policy.packed) == (PROBED[model_type][0], PROBED[model_type][0] == "packed")
    assert read_as.why.startswith(PROBED[model_type][1]) and bool(read_as.why) == bool(PROBED[model_type][1])
    assert furthest(model, policy) < 1e-3


@pytest.mark.parametrize(
    ("model_type", "says"),
    {
        "modernbert-decoder": "differ by .* nats a token .*makes its logits in a way that rdpo does not know",
        "cpmant": "differ by .* nats a token",
        "llama4_text": "does not read text alone like a language model",
    }.items(),
)
def test_an_architecture_whose_logits_are_others_is_refused(model_type, says):
    policy = as_policy(small_model(model_type), SETTINGS).eval()
    with pytest.raises(InputError, match=f"student.model x: .*{says}"):
        settle_layout(policy, "student.model x")


def test_rows_that_must_be_packed_and_are_not_exact_are_refused():
    policy = as_policy(small_model("phimoe"), ForwardSettings("float32", 8, "packed")).eval()
    with pytest.raises(InputError, match=r"training\.layout: x cannot be read in packed rows .*use auto or padded"):
        settle_layout(policy, "x", "packed")


def test_packed_rows_are_tried_where_padded_ones_are_asked_for():
    policy = as_policy(small_model("llama"), ForwardSettings("float32", 8, "padded")).eval()
    assert settle_layout(policy, "x", "padded") == ReadAs("padded", 1e-3, packable=True)
    assert not policy.packed


def test_the_widths_of_windows_are_as_they_were_after_the_probe():
    model = small_model("mistral")
    model.config.sliding_window = 4096
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4096
    assert settle_layout(as_policy(model, SETTINGS).eval(), "mistral").layout == "packed"
    assert {model.config.sliding_window, *(layer.self_attn.sliding_window for layer in model.model.layers)} == {4096}


def test_a_wide_window_that_only_the_mask_knows_is_found_too():
    model = small_model("phimoe")
    model.config.sliding_window = 4096
    assert settle_layout(as_policy(model, SETTINGS).eval(), "phimoe").layout == "padded"


def test_dropout_of_attention_is_read_in_padded_rows():
    model = small_model("llama")
    model.config.attention_dropout = 0.1
    assert not as_policy(model, SETTINGS).packed
    with pytest.raises(InputError, match="whose attention_dropout needs padded ones"):
        as_policy(model, ForwardSettings("float32", 8, "packed"))


@pytest.mark.long
def test_every_architecture_that_can_be_small_is_exact_or_refused(capsys):
    """RDPO_ARCHITECTURES=llama,mamba names some of them."""
    counts, wrong = {}, {}
    for model_type in causal_types():
        try:
            model, policy, read_as = settled(model_type)
        except ValueError as error:
            kind, words = "not built", str(error)
        else:
            kind = f"{read_as.layout}{', fallen back' if read_as.why else ''}" if policy else "refused"
            words = read_as.why if policy else read_as
            if policy and not (difference := furthest(model, policy)) < 5e-3:
                wrong[model_type] = difference
        counts[kind] = counts.get(kind, 0) + 1
        with capsys.disabled():
            print(f"{model_type:<28}{kind:<22}{words[:150]}", flush=True)
    with capsys.disabled():
        print(counts, f"wrong: {wrong or 'none'}")
    assert not wrong
