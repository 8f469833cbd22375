"""The settings of training runs. README.md in this folder lists them in a table.

Sources of the defaults: Circuit Tracing 2025 (Ameisen et al., "Circuit Tracing: Revealing Computational
Graphs in Language Models"); January 2025 (Anthropic, "Circuits Updates - January 2025"); Gao et al. 2024 ("Scaling and
evaluating sparse autoencoders"); Gemma Scope 2 (Google DeepMind 2025); "The Circuits Research Landscape" (August 2025);
and the code of CLT-Forge (arXiv 2603.21014) and of crosslayer-transcoder.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

from jclt.coders import CoderConfig
from jclt.errors import UserError
from jclt.models import ModelConfig


@dataclass(frozen=True)
class LmConfig:
    """A language model's training."""

    model: ModelConfig
    data: str = "world"  # "world" (generated), a text file, or JSON lines with `text`
    tokenizer: str | None = None  # a folder; the data "world" bring one
    steps: int = 1000
    batch: int = 32  # rows per step
    length: int = 64  # tokens per row
    seed: int = 0

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-3
    warmup: int = 100  # steps, at most a fifth of the run
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    text_weight: float = 0.1  # in generated data: the loss weight of tokens that are not answers

    data_shards: int = 1  # size of the mesh's data axis; the features axis takes the other devices
    remat: bool = False
    save_every: int = 500
    log_every: int = 10


RATE_AT_ONE = 1.5
"""A coder's learning rate times the root of the numbers in the encoder of one layer."""


@dataclass(frozen=True)
class TrainConfig:
    """A coder's training."""

    coder: CoderConfig
    model: str = "demo"  # what `load_model` takes
    data: str = "world"  # "world" (generated), a folder that `jclt tokenize` made, or a text file
    steps: int = 1000
    batch: int = 32  # rows per step
    length: int = 64  # tokens per row
    seed: int = 0

    # The loss: squared error plus these terms.
    # auto: tanh (Circuit Tracing 2025), but none under topk and batchtopk, where k fixes the number of active features.
    sparsity: Literal["auto", "tanh", "l1", "l0", "kl", "none"] = "auto"
    sparsity_weight: float = 1.0  # published values cannot be reused: it depends on width and features
    sparsity_ramp: float = 1.0  # share of the run over which the weight grows from 0 (Circuit Tracing 2025: all of it)
    tanh_scale: float = 4.0  # January 2025
    target_l0: float = 24.0  # of the l0 penalty, over all layers
    target_density: float = 0.01  # of the kl penalty
    preactivation: Literal["threshold", "zero", "none"] = "threshold"  # January 2025; "zero": crosslayer-transcoder
    preactivation_weight: float = 3e-6  # January 2025
    auxiliary_weight: float = 0.0  # of the auxiliary TopK loss; Gao et al. 2024 take 1/32 with TopK
    auxiliary_k: int = 512  # dead features that reconstruct the remaining error (Gao et al. 2024)
    dead_density: float = 1e-5  # a feature is dead when it was silent for the last 1 / dead_density tokens
    end_to_end_steps: int = 0  # the last steps, whose loss includes KL(model || replacement model)
    end_to_end_weight: float = 1.0

    # The initial state.
    threshold: float = 0.03  # JumpReLU's initial threshold (Circuit Tracing 2025)
    # centre: mean 0, then unit variance by layer; scale: unit mean square by layer (Gemma Scope 2).
    normalize: Literal["centre", "scale", "standardize", "none"] = "centre"
    initial: Literal["transposed", "clt"] = "transposed"  # Gemma Scope 2; Circuit Tracing 2025
    initial_density: float = 0.05  # a feature first fires on 10,000 / features of the tokens, at most on this share

    # The optimizer.
    optimizer: Literal["adam", "adamw", "adafactor"] = "adam"
    learning_rate: float | None = None  # none: 1.5 / sqrt(width * features) at most 1e-2 (`rate`)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: int = 100  # steps, at most a fifth of the run
    decay: float = 0.2  # the last share of the run, over which the rate falls to 0 (January 2025)
    beta1: float = 0.9  # Adam's; January 2025 and Gemma Scope 2 take 0, which needs less memory
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # under adamw
    clip: float = 1.0  # January 2025
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second needs float32

    # The computation.
    compute: Literal["float32", "bfloat16"] = "float32"  # of matmuls; sums and master weights are always float32
    micro_batches: int = 1
    remat: bool = False  # encode again in the backward pass instead of keeping pre-activations
    path: Literal["auto", "dense", "sparse"] = "auto"  # auto: sparse only on processors where it was measured (CPUs)
    headroom: float = 1.5  # capacity of the sparse path over the active features measured
    data_shards: int = 1  # size of the mesh's data axis; the features axis takes the other devices
    shuffle: int = 1  # batches whose tokens are mixed in a buffer on the device; 1: no mixing
    store: str | None = None  # a folder in which activations are kept for several epochs
    store_rows: int = 4096  # rows kept in it

    save_every: int = 500
    log_every: int = 10
    evaluate_every: int = 0  # steps between evaluations of the replacement model; 0: at the end only; -1: never
    skips: int = 20  # steps in a row whose loss is not finite, after which the run stops

    @property
    def sparsity_term(self) -> str:
        """The sparsity penalty: the one that is set, or the default of the activation."""
        if self.sparsity != "auto":
            return self.sparsity
        return "none" if self.coder.activation in ("topk", "batchtopk") else "tanh"

    @property
    def rate(self) -> float:
        """The learning rate: the one that is set, or one that falls with the size of the encoders.

        It is 8e-3 at width 64 and 512 features, where it was measured (experiments/coders), and with 24,576 features of
        GPT-2 3.5e-4, where CLT-Forge takes 4e-4. Gao et al. 2024 let it fall with the root of the number of features,
        Circuit Tracing (2025) with that of the operations.
        """
        return self.learning_rate or min(1e-2, RATE_AT_ONE / math.sqrt(self.coder.size * self.coder.features))


NOT_COMPILED = {
    *("model", "data", "tokenizer", "data_shards", "save_every", "log_every", "evaluate_every", "skips"),
    *("store", "store_rows", "path", "headroom", "text_weight"),
    *("threshold", "normalize", "initial", "initial_density", "end_to_end_steps"),
}
"""Settings that the step's program does not depend on: they act through its arguments, or outside of it."""

REMOVED = {
    **{"adam_share": 0.6, "final_rate": 0.0},
    **{"density_decay": 0.99, "running_decay": 0.9, "initial_rate": 10_000.0},
}
"""Settings of earlier versions, with the constant that each has become. The config.json of a run may hold them."""

Config = TypeVar("Config", LmConfig, TrainConfig)


def select_step_settings(config: Config) -> Config:
    """The settings with every one that the step does not depend on at its default.

    The step is compiled for these, so that changing another setting does not compile it again.
    """
    names = NOT_COMPILED - ({"model"} if isinstance(config, LmConfig) else set())
    if isinstance(config, LmConfig) or config.shuffle == 1:
        names = names | {"seed"}
    return replace(config, **{field.name: field.default for field in fields(config) if field.name in names})


Range = tuple[str, Callable[[float], bool]]
"""What is expected of a number, in words, and whether a number meets it."""


def _at_least(least: int) -> Range:
    return f"at least {least}", lambda x: x >= least


_COUNT, _NOT_NEGATIVE, _POSITIVE = _at_least(1), _at_least(0), ("more than 0", lambda x: x > 0)
_SHARE = "0 to 1", lambda x: 0 <= x <= 1
_POSITIVE_SHARE = "more than 0 and at most 1", lambda x: 0 < x <= 1
_BELOW_1 = "at least 0 and less than 1", lambda x: 0 <= x < 1

RANGES: dict[str, Range] = {
    **dict.fromkeys(("steps", "batch", "data_shards", "save_every", "log_every"), _COUNT),
    **dict.fromkeys(("auxiliary_k", "micro_batches", "shuffle", "store_rows", "headroom"), _COUNT),
    **dict.fromkeys(("warmup", "end_to_end_steps", "skips"), _NOT_NEGATIVE),
    **dict.fromkeys(("weight_decay", "text_weight", "sparsity_weight"), _NOT_NEGATIVE),
    **dict.fromkeys(("preactivation_weight", "auxiliary_weight", "end_to_end_weight"), _NOT_NEGATIVE),
    **dict.fromkeys(("learning_rate", "clip", "epsilon", "threshold", "tanh_scale", "target_l0"), _POSITIVE),
    **dict.fromkeys(("beta1", "beta2"), _BELOW_1),
    **dict.fromkeys(("decay", "sparsity_ramp"), _SHARE),
    "initial_density": _POSITIVE_SHARE,
    "target_density": ("more than 0 and less than 1", lambda x: 0 < x < 1),
    "dead_density": ("1e-9 to 1", lambda x: 1e-9 <= x <= 1),
    "length": _at_least(2),
    "seed": ("0 to 4294967295", lambda x: 0 <= x < 1 << 32),
    "evaluate_every": _at_least(-1),
}


def check_ranges(config: LmConfig | TrainConfig) -> None:
    """Refuses numbers that no run can work with, and settings that would have no effect."""
    for field in fields(config):
        value = getattr(config, field.name)
        if (value, field.type) == (None, float | None):
            continue
        if field.type is int and type(value) is not int:
            raise UserError(f"setting '{field.name}': {value!r}, expected a whole number")
        if field.type in (float, float | None) and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(f"setting '{field.name}': {value!r}, expected a number")
        expected, accepts = RANGES.get(field.name, ("", lambda x: True))
        if not accepts(value):
            raise UserError(f"setting '{field.name}': {value}, expected {expected}")
    if config.weight_decay and config.optimizer in ("adam", "adafactor"):
        raise UserError(
            f"setting 'weight_decay': {config.weight_decay}, expected 0 under optimizer={config.optimizer}, or "
            "optimizer=adamw"
        )
    if isinstance(config, TrainConfig) and config.sparsity == "auto" and config.sparsity_term == "none":
        if config.sparsity_weight != TrainConfig.sparsity_weight:
            raise UserError(
                f"setting 'sparsity_weight': {config.sparsity_weight}, expected setting 'sparsity' as well: under "
                f"coder.activation={config.coder.activation} there is no penalty by default"
            )
