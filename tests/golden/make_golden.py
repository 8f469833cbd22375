"""Reference checkpoints: small random models of every supported family, and their results in transformers.

    python tests/golden/make_golden.py

needs torch and transformers 4.57 (made with torch 2.13.0 on the CPU and transformers 4.57.3) and rewrites the folders
beside this file. Each one is an ordinary Hugging Face folder plus ``reference.npz``, float32 from eager attention:

- ``tokens`` [2, T], ``logits`` [2, T, V], and where there is a tokenizer ``text`` and ``text_tokens``;
- ``hidden`` [L + 1, 2, T, D]: the input of each block, and last the residual stream after the final norm;
- ``greedy`` [12]: the continuation of ``tokens[:1]`` by ``generate(do_sample=False)`` with no stop token.

Some folders are stored as bfloat16 or in shards, and some lack the keys of config.json that files on the hub lack; the
reference is always computed from the folder as it was written. Tests import ``cases``, ``random_model``, ``tokens_for``
and ``reference`` to check other weights than those kept here.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VOCAB, LENGTH, NEW_TOKENS = 96, 14, 12
EAGER = {"dtype": torch.float32, "attn_implementation": "eager"}
SHARDED, WITH_TOKENIZER, FLOAT32 = ("llama2",), ("llama3",), ("gpt2", "llama2")  # what is not float32 is bfloat16
# What hub files leave out, and transformers then derives from the other keys.
DROPPED = {
    "neox": ("rope_theta", "partial_rotary_factor", "rope_scaling"),
    "qwen2": ("layer_types", "rope_scaling"),
    "gemma2": ("layer_types",),
    "gemma3": ("layer_types", "_sliding_window_pattern"),
}
ADDED = {"gemma3": {"sliding_window_pattern": 3}}


def cases() -> dict[str, hf.PretrainedConfig]:
    """One configuration per case. Each option that changes the numbers differs from its default in some case."""
    special = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = {**special, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 32}
    neox = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, **special}
    shape = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
    common = {**special, **shape, "max_position_embeddings": 64, "rms_norm_eps": 3e-2}
    grouped = {**common, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 500.0}
    linear = {"rope_type": "linear", "factor": 4.0}
    # The wavelengths of base 5000 are 6, 53, 444 and 3731 positions: below 16, between, and above 64.
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    gemma = {**grouped, "pad_token_id": 0, "attention_bias": True, "query_pre_attn_scalar": 3, "sliding_window": 4}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    full, sliding = "full_attention", "sliding_attention"
    return {
        "gpt2": hf.GPT2Config(**gpt2),
        "gpt2_scaled": hf.GPT2Config(
            **gpt2, n_inner=40, activation_function="relu", layer_norm_epsilon=3e-2,
            scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
        "gpt2_unscaled": hf.GPT2Config(**gpt2, scale_attn_weights=False, tie_word_embeddings=False),
        "neox": hf.GPTNeoXConfig(**neox, rotary_pct=0.25, rotary_emb_base=50),
        "neox_sequential": hf.GPTNeoXConfig(
            **neox, rotary_pct=0.5, use_parallel_residual=False, hidden_act="relu", layer_norm_eps=3e-2,
            attention_bias=False, tie_word_embeddings=True, rope_scaling=dict(linear)),
        "llama2": hf.LlamaConfig(**common),
        "llama3": hf.LlamaConfig(
            **grouped | {"rope_theta": 5000.0}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
            rope_scaling=llama3 | {"original_max_position_embeddings": 64}),
        "llama_linear": hf.LlamaConfig(**common, num_key_value_heads=1, hidden_act="gelu", rope_scaling=dict(linear)),
        "mistral": hf.MistralConfig(**grouped, sliding_window=4),
        "qwen2": hf.Qwen2Config(
            **common, num_key_value_heads=2, rope_theta=500.0, use_sliding_window=True, sliding_window=4,
            max_window_layers=1, tie_word_embeddings=True),
        "qwen3": hf.Qwen3Config(
            **grouped, attention_bias=True, use_sliding_window=True, sliding_window=4,
            layer_types=[sliding, full, sliding], rope_scaling=dict(linear)),
        "gemma2": hf.Gemma2Config(**gemma, **caps),
        "gemma3": hf.Gemma3TextConfig(
            **gemma | {"num_hidden_layers": 4, "num_key_value_heads": 1}, layer_types=[sliding, sliding, full, sliding],
            rope_local_base_freq=20.0, rope_scaling=linear | {"factor": 8.0}, **caps),
    }  # fmt: skip


def options() -> dict[str, list[dict]]:
    """For each case, changes of the configuration. Each must change the logits of the same weights."""
    plain, no_bias, epsilon = {"rope_scaling": None}, {"attention_bias": False}, {"layer_norm_epsilon": 1e-5}
    grouped, no_window = [{"rms_norm_eps": 1e-6}, {"rope_theta": 1e4}], {"sliding_window": 99}
    gemma = [*grouped, no_bias, {"query_pre_attn_scalar": 8}, {"final_logit_softcapping": None}]
    all_full, sliding = ["full_attention"] * 4, ["sliding_attention"] * 4
    return {
        "gpt2": [{"activation_function": "gelu"}, {"scale_attn_weights": False}],
        "gpt2_scaled": [{"scale_attn_by_inverse_layer_idx": False}, {"activation_function": "gelu"}, epsilon],
        "gpt2_unscaled": [{"scale_attn_weights": True}],
        "neox": [{"rotary_pct": 0.5}, {"rotary_emb_base": 1e4}, {"use_parallel_residual": False}, no_bias],
        "neox_sequential": [{"use_parallel_residual": True}, {"hidden_act": "gelu"}, {"layer_norm_eps": 1e-5}, plain],
        "llama2": [{"rms_norm_eps": 1e-6}],
        "llama3": [*grouped, no_bias, {"mlp_bias": False}, plain],
        "llama_linear": [{"hidden_act": "silu"}, plain],
        "mistral": [*grouped, {"sliding_window": 5}, no_window],
        "qwen2": [*grouped, {"sliding_window": 5}, no_window, {"max_window_layers": 2, "layer_types": None}],
        "qwen3": [*grouped, {"sliding_window": 5}, no_window, no_bias, plain],
        "gemma2": [*gemma, {"attn_logit_softcapping": None}, {"sliding_window": 5}, {"layer_types": all_full[:3]}],
        "gemma3": [*gemma, plain, {"rope_local_base_freq": 1e4}, {"layer_types": all_full}, {"layer_types": sliding}],
    }


def build(config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    """The model of a configuration, with the weights transformers gives it."""
    return hf.AutoModelForCausalLM.from_config(config, **EAGER).eval()


def load(folder: Path) -> hf.PreTrainedModel:
    """The model of a folder, with the settings of every comparison."""
    return hf.AutoModelForCausalLM.from_pretrained(folder, **EAGER).eval()


def random_model(config: hf.PretrainedConfig, seed: int) -> hf.PreTrainedModel:
    """A model with random weights, large enough that no part of it is negligible."""
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if "gemma" in config.model_type else 1.0  # Gemma's norms multiply by one plus the weight
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1 and not name.endswith("bias"):
                noise = (noise * 0.2 + centre) / 0.3
            value.copy_(0.3 * noise)
    return model


def tokens_for(config: hf.PretrainedConfig, seed: int) -> np.ndarray:
    """Two sequences of token ids [2, T], longer than any sliding window here."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (2, LENGTH))


@torch.no_grad()
def reference(model: hf.PreTrainedModel, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers computes: tokens, logits, hidden, greedy, and how clear each greedy choice was (``margin``)."""
    out = model(prompt := torch.from_numpy(tokens), output_hidden_states=True, use_cache=False)
    model.generation_config = hf.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    ids = model.generate(prompt[:1], attention_mask=torch.ones_like(prompt[:1]))
    assert ids.shape[1] == LENGTH + NEW_TOKENS, "generation stopped early"
    best = model(ids, use_cache=False).logits[0, LENGTH - 1 : -1].topk(2)
    assert torch.equal(best.indices[:, 0], ids[0, LENGTH:]), "the cached and the uncached forward pass disagree"
    margin, hidden = best.values[:, 0] - best.values[:, 1], torch.stack(out.hidden_states)
    final = model.get_output_embeddings()(out.hidden_states[-1])
    if cap := getattr(model.config, "final_logit_softcapping", None):
        final = cap * torch.tanh(final / cap)
    assert torch.allclose(final, out.logits, atol=1e-5), "the last hidden state is not the normed one"
    arrays = {"tokens": prompt, "logits": out.logits, "hidden": hidden, "margin": margin, "greedy": ids[0, LENGTH:]}
    return {name: array.numpy() for name, array in arrays.items()}


@torch.no_grad()
def change(model: hf.PreTrainedModel, tokens: np.ndarray, **changes) -> float:
    """The largest difference of the logits between two configurations with the same weights."""
    other = build(type(model.config).from_dict({**model.config.to_dict(), **changes}))
    other.load_state_dict(model.state_dict(), strict=False)
    return (other(torch.from_numpy(tokens)).logits - model(torch.from_numpy(tokens)).logits).abs().max().item()


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of whole words; a sequence begins with <bos>."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"word{i}" for i in range(4, VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **{f"{word[1:-1]}_token": word for word in words[:4]})


def write(name: str, config: hf.PretrainedConfig, seed: int) -> None:
    """Write one case and check that its options matter."""
    folder = Path(__file__).parent / name
    shutil.rmtree(folder, ignore_errors=True)
    model = random_model(config, seed).to(torch.float32 if name in FLOAT32 else torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="40KB" if name in SHARDED else "1GB")
    settings = json.loads((folder / "config.json").read_text()) | ADDED.get(name, {})
    for key in DROPPED.get(name, ()):
        del settings[key]
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    model = load(folder)
    arrays = reference(model, tokens_for(config, seed))
    assert arrays.pop("margin").min() > 1e-2, f"{name}: a greedy choice is too close, take another seed"
    for changes in options()[name]:
        effect = change(model, arrays["tokens"], **changes)
        assert effect > 1e-3, f"{name}: {changes} changes the logits by {effect:.1e} only"
    if name == "gemma3":  # transformers 4.57 reads this key and then makes no use of it
        assert change(model, arrays["tokens"], attn_logit_softcapping=None) == 0
    if name in WITH_TOKENIZER:
        tokenizer().save_pretrained(folder)
        arrays["text"] = np.array(text := "word4 word95 unheard word50")
        arrays["text_tokens"] = np.array(tokenizer()(text)["input_ids"])
    np.savez_compressed(folder / "reference.npz", **arrays)
    print(f"{name:16} {sum(path.stat().st_size for path in folder.iterdir()) / 1000:6.1f} kB")


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    for index, (case, configuration) in enumerate(cases().items()):
        write(case, configuration, seed=200 + index)
