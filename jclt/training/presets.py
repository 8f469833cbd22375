"""Named runs."""

from collections.abc import Callable

from jclt.coders import CoderConfig
from jclt.models import ModelConfig
from jclt.training.config import LmConfig, TrainConfig
from jclt.world.example import BOS, EOS
from jclt.world.tokenizer import vocabulary


def small_world() -> LmConfig:
    """The language model that ships with jclt."""
    tokens = vocabulary()
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
    return LmConfig(model, steps=4000, optimizer="muon", learning_rate=5e-3, weight_decay=0.2, text_weight=0.03)


LM_PRESETS: dict[str, Callable[[], LmConfig]] = {"small-world": small_world}


def tiny() -> TrainConfig:
    """A newcomer's first coder: a small cross-layer transcoder of the shipped model, in two minutes on 2 cores."""
    return TrainConfig(
        CoderConfig(features=512, activation="batchtopk", k=24),
        steps=600,
        batch=16,
        sparsity="none",
        learning_rate=2e-3,
        save_every=200,
    )


CODER_PRESETS: dict[str, Callable[[], TrainConfig]] = {"tiny": tiny}
