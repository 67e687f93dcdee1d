"""Loading models."""

import pytest
from transformers import GraniteConfig, GraniteForCausalLM

from vgrout.models.load import load_model
from vgrout.types import UserError
from vgrout.verify.toy import tokenizer


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_a_model_that_scales_its_logits_is_refused(tmp_path, scaling):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=261, logits_scaling=scaling, num_key_value_heads=1, **shape)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    if scaling == 1:
        load_model(str(tmp_path))
    else:
        with pytest.raises(UserError, match=r"changes its logits \(logits_scaling = 8.0\)"):
            load_model(str(tmp_path))
