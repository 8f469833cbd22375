"""Named runs."""

from collections.abc import Callable
from dataclasses import replace

from jclt.coders import CoderConfig
from jclt.models import ModelConfig
from jclt.training.config import LmConfig, TrainConfig
from jclt.world.example import BOS, EOS
from jclt.world.tokenizer import list_vocabulary


def small_world() -> LmConfig:
    """The language model that ships with jclt."""
    tokens = list_vocabulary()
    model = ModelConfig(
        family="gpt_neox",
        vocabulary=len(tokens),
        width=128,
        layers=4,
        heads=4,
        mlp_width=512,
        context=64,
        norm="layer",
        activation="relu",
        gated=False,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        bos_token=tokens[BOS],
        stop_tokens=(tokens[EOS], tokens["\n"]),
    )
    return LmConfig(model, steps=4000, optimizer="muon", learning_rate=5e-3, weight_decay=0.3, text_weight=0.03)


LM_PRESETS: dict[str, Callable[[], LmConfig]] = {"small-world": small_world}


def small_world_coder() -> TrainConfig:
    """The cross-layer transcoder that ships with jclt."""
    return TrainConfig(
        CoderConfig(features=1024),
        steps=2500,
        batch=16,
        sparsity_weight=0.25,
        sparsity_ramp=0.5,
        preactivation_weight=1e-4,
        decay=0.5,
        end_to_end_steps=700,
        end_to_end_weight=0.3,
    )


def small_world_transcoders() -> TrainConfig:
    """The transcoders of single layers that ship with jclt, to be compared with the shipped CLT: by the same recipe
    but for a penalty under which about as many features are active."""
    shipped = small_world_coder()
    return replace(shipped, coder=replace(shipped.coder, kind="transcoder"), sparsity_weight=0.4)


def tiny() -> TrainConfig:
    """A first coder to try, with fewer features and steps than the shipped one. It takes a minute on 2 cores."""
    return TrainConfig(
        CoderConfig(features=256, activation="batchtopk", k=24),
        steps=400,
        batch=16,
        preactivation_weight=3e-4,
        normalize="scale",
        learning_rate=4e-3,
        beta2=0.99,
        decay=0.5,
        warmup=50,
        end_to_end_weight=0.3,
        save_every=200,
    )


def smollm2_transcoders() -> TrainConfig:
    """A transcoder of each of the 30 MLPs of SmolLM2-135M-Instruct, with 276 thousand features in all.

    Data: the folder `tokens`, made by `jclt tokenize TEXT --tokenizer smollm2 --out tokens`.
    """
    return _smollm2(CoderConfig("transcoder", features=9_216, k=480))


def smollm2_clt() -> TrainConfig:
    """A cross-layer transcoder of layers 10 to 19 of SmolLM2-135M-Instruct, with 164 thousand features in all.

    Data: as `smollm2_transcoders`.
    """
    return _smollm2(CoderConfig("clt", features=16_384, k=100, layers=tuple(range(10, 20))))


def _smollm2(coder: CoderConfig) -> TrainConfig:
    """A third of a billion tokens, for a GPU or a TPU; README.md in this folder says what to override on a CPU."""
    return TrainConfig(
        replace(coder, activation="batchtopk", first_position=1),
        model="smollm2",
        data="tokens",
        steps=10_000,
        batch=128,
        length=256,  # with `batch`, 32,768 tokens a step (January 2025)
        preactivation_weight=3e-4,
        learning_rate=4e-4,
        warmup=1_000,
        compute="bfloat16",
        micro_batches=16,
    )


CODER_PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    "small-world": small_world_coder,
    "small-world-transcoders": small_world_transcoders,
    "smollm2-transcoders": smollm2_transcoders,
    "smollm2-clt": smollm2_clt,
}
