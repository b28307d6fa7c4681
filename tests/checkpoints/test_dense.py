"""The dense model that a pruned one was made from is found and loaded, and another one is refused or warned of."""

import copy

import pytest
import torch

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints.dense import Compared, load_base
from optimum_otprune.errors import ConfigurationError, UnsupportedModelError
from tests.conftest import make_llama

CONFIG = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast", self_calibration=0)


@pytest.fixture
def pruned(tokens, tokenizer):
    pruner = OTPruner.from_pretrained(make_llama(), CONFIG, tokenizer=tokenizer)
    pruner.prune(tokens, progress=False)
    return Compared(pruner.model, tokenizer)


def test_the_dense_model_gets_the_dtype_of_the_pruned_one_unless_another_is_given(pruned, llama_folder):
    pruned.model.to(torch.bfloat16)
    assert load_base(llama_folder, pruned, None).dtype == torch.bfloat16
    assert load_base(None, pruned, str(llama_folder), {"dtype": None, "revision": None}).dtype == torch.bfloat16
    assert load_base(llama_folder, pruned, None, {"dtype": "float32"}).dtype == torch.float32
    with pytest.raises(ConfigurationError, match="nothing to load with `dtype`"):
        load_base(make_llama(), pruned, None, {"dtype": "float32"})


@pytest.mark.parametrize(("name", "value", "wanted"), [("num_hidden_layers", 2, 3), ("hidden_size", 16, 32)])
def test_a_model_of_other_sizes_is_refused_before_its_weights_are_read(pruned, tmp_path, name, value, wanted):
    other = make_llama(**{name: value})
    with pytest.raises(UnsupportedModelError, match=f"`{name}={value}`, the pruned one {wanted}: it was not made"):
        load_base(other, pruned, None)
    other.config.save_pretrained(tmp_path / "other")  # without weights
    with pytest.raises(UnsupportedModelError, match=f"`{name}={value}`, the pruned one {wanted}: it was not made"):
        load_base(tmp_path / "other", pruned, None)


def test_a_model_with_another_tokenizer_is_refused(pruned, llama_folder, tokenizer):
    assert load_base(llama_folder, pruned, None) is not None
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["new"])
    with pytest.raises(UnsupportedModelError, match="different tokenizers"):
        load_base(llama_folder, pruned._replace(tokenizer=other), None)


def test_a_model_with_other_embeddings_is_warned_of(pruned):
    load_base(make_llama().to(torch.bfloat16), pruned, None)  # rounding is no difference
    other = make_llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.1)
    with pytest.warns(UserWarning, match="embeddings of the dense model differ from those of the pruned one by 10%"):
        load_base(other, pruned, None)
