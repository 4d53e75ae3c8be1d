"""An architecture that rdpo cannot read exactly is refused before work, by a small model of its configuration."""

import pytest

from rdpo.errors import InputError
from rdpo.modeling.miniature import check_miniature, shrunk
from rdpo.modeling.model import ForwardSettings
from rdpo.modeling.student import check_architecture
from tests.support.architectures import SMALL, causal_types, settled, small_model
from tests.support.models import save_model
from tests.support.students import job_of

SETTINGS = ForwardSettings("bfloat16", 8)
LARGE = {
    "LlamaConfig": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    "Qwen3Config": {"hidden_size": 4096, "num_hidden_layers": 36, "head_dim": 128},
    "MixtralConfig": {},
    "Gemma2Config": {},
    "GraniteConfig": {"logits_scaling": 8.0},
    "Olmo2Config": {},
    "Phi3Config": {},
}


@pytest.mark.parametrize("name", LARGE)
def test_configurations_of_large_models_are_tried_and_taken(name):
    import transformers

    config = getattr(transformers, name)(**LARGE[name])
    before = config.to_dict()
    assert check_miniature("student.model x", config, SETTINGS)
    assert config.to_dict() == before


def test_factors_caps_and_kinds_of_layers_stay():
    from transformers import Gemma2Config

    small = shrunk(Gemma2Config(final_logit_softcapping=7.0, query_pre_attn_scalar=99))
    assert (small.final_logit_softcapping, small.query_pre_attn_scalar, small.vocab_size) == (7.0, 99, 512)
    assert (small.num_hidden_layers, set(small.layer_types)) == (2, {"sliding_attention", "full_attention"})


@pytest.mark.parametrize("model_type", ["modernbert-decoder", "cpmant"])
def test_an_architecture_whose_logits_are_others_is_refused_by_its_configuration(model_type):
    config = small_model(model_type).config
    with pytest.raises(InputError, match=r"^student\.model x \(tried on a small random model\): .* nats a token"):
        check_miniature("student.model x", config, SETTINGS)


def test_a_layout_that_is_not_exact_is_refused_by_the_configuration():
    config = small_model("phimoe").config
    with pytest.raises(InputError, match=r"training\.layout: .*cannot be read in packed rows"):
        check_miniature("student.model x", config, ForwardSettings("bfloat16", 8, "packed"))


def test_a_student_of_such_an_architecture_is_refused_before_work_and_another_is_taken(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setitem(SMALL, "vocab_size", len(tokenizer))
    refused = job_of(save_model(tmp_path / "refused", small_model("cpmant"), tokenizer), tmp_path)
    with pytest.raises(InputError, match=rf"student\.model {refused.student.model} .* use a model of another"):
        check_architecture(refused)
    check_architecture(job_of(save_model(tmp_path / "taken", small_model("llama"), tokenizer), tmp_path))


@pytest.mark.long
def test_no_miniature_refuses_an_architecture_that_is_exact(capsys):
    """RDPO_ARCHITECTURES=llama,mamba names some of them."""
    wrongly, counts = [], {}
    for model_type in causal_types():
        try:
            config = small_model(model_type).config
            _, policy, _ = settled(model_type)
        except ValueError:
            continue
        try:
            found = "tried" if check_miniature(model_type, config, SETTINGS) else "not tried"
        except InputError:
            found = "refused"
            wrongly += [model_type] if policy else []
        counts[found] = counts.get(found, 0) + 1
        with capsys.disabled():
            print(f"{model_type:<28}{found}{'' if policy else ', and the model itself is refused'}", flush=True)
    with capsys.disabled():
        print(counts)
    assert not wrongly
