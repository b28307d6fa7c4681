"""Whether folders of this version load in another version of transformers with equal logits and token ids.

    python -m venv other && other/bin/pip install torch "transformers==4.57.*"
    python benchmarks/compatibility.py other/bin/python

Tiny random models, one per line of the table; the names under "compared" belong into
`optimum_otprune.models.compatibility.COMPARED`.
"""

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from optimum_otprune import OTPruner

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 2.0, "original_max_position_embeddings": 32},
}
DEFAULT = {"rope_parameters": ROPES["theta"]}
TWO = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 777777.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5555.0},
    },
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
}
GPT2 = {"n_embd": 64, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 64}
LONG = {"rope_type": "longrope", "rope_theta": 500000.0, "short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
CASES = {
    **{f"llama {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    **{
        name: (name, DEFAULT)
        for name in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "smollm3", "granite")
    },
    **{name: (name, DEFAULT) for name in ("stablelm", "starcoder2", "seed_oss", "arcee", "ministral", "apertus")},
    **{name: (name, DEFAULT) for name in ("cohere", "cohere2", "exaone4", "helium", "hunyuan_v1_dense", "ernie4_5")},
    "qwen2 yarn": ("qwen2", {"rope_parameters": ROPES["yarn"]}),
    "phi3": ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONG}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {**ROPES["theta"], "partial_rotary_factor": 0.5}}),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", OPT),
    "gemma3_text": ("gemma3_text", TWO),
    "olmo3": ("olmo3", {**TWO, "rope_parameters": DEFAULT["rope_parameters"]}),
}
WORDS = [f"w{index}" for index in range(58)]
TEXT = "w3 w17 <extra> w5 unknown w41"
COMPARE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        found = {}
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            found["ids"], found["class"] = tokenizer(sys.argv[2])["input_ids"], type(tokenizer).__name__
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager"
        )
        tokens = torch.load(folder.parent.parent / "tokens.pt")
        with torch.no_grad():
            found["logits"] = model.eval()(input_ids=tokens).logits.flatten().tolist()
        found["missing"] = sorted(map(str, info["missing_keys"]))
        found["generated"] = model.generate(tokens[:1, :4], max_new_tokens=4).tolist()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps([folder.name, found]), flush=True)
"""


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers of three classes, with an additional special token, and with a beginning that is or is not added."""

    def core(adds_beginning: bool) -> Tokenizer:
        vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *WORDS, "<extra>"])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if adds_beginning:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return tokenizer

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<extra>"]}
    found = {
        f"plain {adds}": PreTrainedTokenizerFast(tokenizer_object=core(adds), **special) for adds in (False, True)
    }
    letters = {chr(97 + index): 3 + index for index in range(26)} | {"<s>": 0, "</s>": 1, "<unk>": 2, "▁": 40, "Ġ": 41}
    for adds in (False, True):
        found[f"llama {adds}"] = LlamaTokenizer(vocab=letters, merges=[], add_bos_token=adds, **special)
    found["gpt2"] = GPT2Tokenizer(vocab=letters, merges=[], **special)
    return found


def main() -> None:
    """Save everything, load it in both versions, and print what differs."""
    with tempfile.TemporaryDirectory() as parent:
        tokens = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
        torch.save(tokens, Path(parent) / "tokens.pt")
        folders = Path(parent) / "folders"
        kinds = tokenizers()
        for name, (model_type, changes) in CASES.items():
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **copy.deepcopy({**SIZES, **changes}))
            OTPruner(AutoModelForCausalLM.from_config(config).eval()).save_pretrained(folders / name)
        llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
        for name, tokenizer in kinds.items():
            OTPruner(llama, tokenizer=tokenizer).save_pretrained(folders / f"tokenizer {name}")
        found = []
        for python in (sys.executable, sys.argv[1]):
            done = subprocess.run(
                [python, "-c", COMPARE, folders, TEXT], stdout=subprocess.PIPE, text=True, check=True
            )
            found.append(dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")))
        for name, here in found[0].items():
            there = found[1].get(name, {})
            difference = max((abs(a - b) for a, b in zip(here.get("logits", ()), there.get("logits", ()))), default=1)
            same = {key: here.get(key) == there.get(key) for key in ("ids", "generated", "missing")}
            equal = difference < 1e-5 and all(same.values()) and not there.get("missing")
            words = "equal" if equal else f"DIFFERENT {there.get('error') or here.get('error') or ''}"
            print(f"{name:30} {words} logits {difference:.1e} {same}")


if __name__ == "__main__":
    main()
