"""Models and coders in circuit-tracer, made without the hub."""

from pathlib import Path

import torch
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder import cross_layer_transcoder as clts
from circuit_tracer.utils import hf_utils as hub
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

CPU = torch.device("cpu")
CONVERSIONS = {
    "gpt2": weight_conversions.convert_gpt2_weights,
    "llama": weight_conversions.convert_llama_weights,
    "gemma2": weight_conversions.convert_gemma_weights,
}


def load_coder(folder: Path, lazy: bool):
    """Reads the coder with circuit-tracer's loader."""
    settings = hub.yaml.safe_load((folder / "config.yaml").read_text())
    options = {key: settings[key] for key in ("feature_input_hook", "feature_output_hook", "scan")}
    options |= {"dtype": torch.float32, "device": CPU, "lazy_encoder": lazy, "lazy_decoder": lazy}
    if settings["model_kind"] == "cross_layer_transcoder":
        return clts.load_clt(str(folder), **options)
    layers = {i: str(path) for i, path in enumerate(sorted(folder.glob("layer_*.safetensors")))}
    return hub.load_transcoders(
        settings | {"transcoders": list(layers.values()), "repo_id": ""}, CPU, torch.float32, lazy, lazy
    )


def make_replacement_model(source: PreTrainedModel, coder: Path, tokenizer: Path) -> TransformerLensReplacementModel:
    """A model of transformers as circuit-tracer's replacement model; the coder and the tokenizer are in folders."""
    config = describe_model(source.config)
    model = TransformerLensReplacementModel(config, tokenizer=AutoTokenizer.from_pretrained(tokenizer))
    unchanged = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    with torch.no_grad():
        weights = CONVERSIONS[source.config.model_type](source, config)
        weights.setdefault("unembed.b_U", torch.zeros(config.d_vocab))
        model.load_and_process_state_dict(weights, **unchanged)
    model._configure_replacement_model(load_coder(coder, lazy=False))
    return model


def describe_model(config: PretrainedConfig) -> HookedTransformerConfig:
    """The settings of TransformerLens for a GPT-2, Llama or Gemma 2."""
    heads, family = config.num_attention_heads, config.model_type
    common = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": heads,
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "device": "cpu",
        "dtype": torch.float32,
    }
    if family == "gpt2":
        return HookedTransformerConfig(
            **common,
            d_head=config.hidden_size // heads,
            d_mlp=4 * config.hidden_size,
            act_fn=config.activation_function,
            eps=config.layer_norm_epsilon,
            normalization_type="LN",
        )
    rotary = {
        "d_head": config.head_dim,
        "d_mlp": config.intermediate_size,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": config.head_dim,
        "rotary_base": int(config.rope_theta),
        "rotary_adjacent_pairs": False,
    }
    if family == "llama":
        return HookedTransformerConfig(**common, **rotary, act_fn=config.hidden_act)
    return HookedTransformerConfig(
        **common,
        **rotary,
        act_fn=config.hidden_activation,
        n_key_value_heads=config.num_key_value_heads,
        attn_scale=config.query_pre_attn_scalar**0.5,
        attn_scores_soft_cap=config.attn_logit_softcapping,
        output_logits_soft_cap=config.final_logit_softcapping,
        use_normalization_before_and_after=True,
        use_local_attn=True,
        window_size=config.sliding_window,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
    )
