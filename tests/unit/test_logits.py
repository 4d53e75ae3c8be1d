"""The transform of an output layer's product is found by asking the model, also where it has no weights."""

import pytest
import torch
import transformers

from rdpo.modeling.logits import LogitTransform, logit_transform

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}
KNOWN = {
    "LlamaConfig": ({}, (1.0, None)),
    "CohereConfig": ({"logit_scale": 0.5}, (0.5, None)),
    "GraniteConfig": ({"logits_scaling": 4.0}, (0.25, None)),
    "HyperCLOVAXConfig": ({"logits_scaling": 4.0}, (4.0, None)),
    "FalconH1Config": ({"lm_head_multiplier": 0.125}, (0.125, None)),
    "Gemma2Config": ({"final_logit_softcapping": 30.0}, (1.0, 30.0)),
    "MiniCPM3Config": ({"dim_model_base": 8}, (0.25, None)),
    "RecurrentGemmaConfig": ({"logits_soft_cap": 2.0}, (1.0, 2.0)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_factor_and_cap_are_those_of_the_forward(name):
    settings, expected = KNOWN[name]
    config = getattr(transformers, name)(**SIZES, **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    found = logit_transform(model)
    assert found.scale == pytest.approx(expected[0], rel=1e-6)
    assert found.softcap == expected[1]
    assert dict(model.named_modules()) == modules


class Unasked(torch.nn.Module):
    """A model whose forward wants more of its layers than they give."""

    base_model_prefix = "layers"

    def __init__(self, **settings):
        super().__init__()
        self.layers, self.output = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
        self.config = transformers.PreTrainedConfig(**settings)

    def get_output_embeddings(self):
        return self.output

    def forward(self, **_):
        raise TypeError("more")


def test_where_a_forward_cannot_be_asked_its_configuration_is_believed():
    assert logit_transform(Unasked()) == LogitTransform()
    assert logit_transform(Unasked(logits_scaling=8.0)) == LogitTransform(0.125)
    assert logit_transform(Unasked(logit_scale=0.5, final_logit_softcapping=3.0)) == LogitTransform(0.5, 3.0)
