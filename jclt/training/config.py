"""The settings of training runs.

Defaults name where they come from: Circuit Tracing 2025 (Ameisen et al., "Circuit Tracing: Revealing Computational
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
    tokenizer: str | None = None  # a folder; "world" data bring their own
    steps: int = 1000
    batch: int = 32  # rows a step
    length: int = 64  # tokens a row
    seed: int = 0

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-3
    adam_share: float = 0.6  # under Muon: Adam's rate for all that is no matrix, as a share of the learning rate
    warmup: int = 100  # steps, but no more than a fifth of the run
    final_rate: float = 0.0  # the cosine's last rate, as a share of the first
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    text_weight: float = 0.1  # in generated data: what a token counts that is no answer

    data_shards: int = 1  # the mesh's data axis; all other devices lie on its features axis
    remat: bool = False
    save_every: int = 500
    log_every: int = 10


@dataclass(frozen=True)
class TrainConfig:
    """A coder's training."""

    coder: CoderConfig
    model: str = "demo"  # what `load_model` takes
    data: str = "world"  # "world" (generated), a folder that `jclt tokenize` made, or a text file
    steps: int = 1000
    batch: int = 32  # rows a step
    length: int = 64  # tokens a row
    seed: int = 0

    # The loss: squared error plus these terms.
    # auto: tanh (Circuit Tracing 2025), but none under topk and batchtopk, whose k says how many are active.
    sparsity: Literal["auto", "tanh", "l1", "l0", "kl", "none"] = "auto"
    sparsity_weight: float = 1.0  # no published value carries over: it depends on width and features
    sparsity_ramp: float = 1.0  # share of the run over which it grows from 0: all of it (Circuit Tracing 2025)
    tanh_scale: float = 4.0  # Anthropic's update of January 2025
    target_l0: float = 24.0  # of the l0 penalty, over all layers
    target_density: float = 0.01  # of the kl penalty
    preactivation: Literal["threshold", "zero", "none"] = "threshold"  # January 2025; "zero": crosslayer-transcoder
    preactivation_weight: float = 3e-6  # January 2025
    auxiliary_weight: float = 0.0  # of the auxiliary TopK loss; Gao et al. 2024 take 1/32 with TopK
    auxiliary_k: int = 512  # dead features that try to write what is missing (Gao et al. 2024)
    dead_density: float = 1e-5  # a feature is dead when it was silent for the last 1 / dead_density tokens
    density_decay: float = 0.99  # of the average density in the histogram, a step (Circuits Research Landscape)
    end_to_end_steps: int = 0  # the last steps, which add KL(model || replacement model)
    end_to_end_weight: float = 1.0

    # The gate.
    threshold: float = 0.03  # initial (Circuit Tracing 2025)
    running_decay: float = 0.99  # of BatchTopK's threshold, a step

    # Where it starts.
    normalize: Literal["scale", "standardize", "none"] = "scale"  # unit mean square by layer (Gemma Scope 2)
    initial: Literal["clt", "january", "transposed"] = "clt"  # Circuit Tracing; January 2025; Gemma Scope 2
    initial_rate: float = 10_000.0  # each feature first fires on this many tokens over the number of features
    initial_density: float = 0.05  # but on no larger share of tokens than this, for coders with few features

    # How it moves.
    optimizer: Literal["adam", "adamw", "adafactor", "lion", "rmsprop", "sgd"] = "adam"
    learning_rate: float = 4e-4  # CLT-Forge on GPT-2
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: int = 100  # steps, but no more than a fifth of the run
    decay: float = 0.2  # the share of the run, at its end, over which the rate falls to 0 (January 2025)
    beta1: float = 0.0  # January 2025, Gemma Scope 2
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # under adamw and lion
    clip: float = 1.0  # January 2025
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second needs float32

    # How it is computed.
    compute: Literal["float32", "bfloat16"] = "float32"  # products; sums and master weights are float32 in both
    micro_batches: int = 1
    remat: bool = False  # encode again in the backward pass instead of keeping pre-activations
    path: Literal["auto", "dense", "sparse"] = "auto"  # sparse: changes over where auto has no measurement too
    headroom: float = 1.5  # of the sparse path, over the active features measured; what needs more is computed densely
    data_shards: int = 1  # all other devices lie on the features axis
    shuffle: int = 1  # batches over which tokens are mixed in a buffer on the device; 1: none
    store: str | None = None  # where activations are kept for several epochs over the same ones
    store_rows: int = 4096  # rows kept there

    save_every: int = 500
    log_every: int = 10
    evaluate_every: int = 0  # steps between evaluations of the replacement model; 0: at the end only; -1: never
    skips: int = 20  # steps in a row with a loss that is not finite, after which the run stops

    @property
    def sparsity_term(self) -> str:
        """The sparsity penalty of this activation, where no other is asked for."""
        if self.sparsity != "auto":
            return self.sparsity
        return "none" if self.coder.activation in ("topk", "batchtopk") else "tanh"


NOT_COMPILED = {
    *("model", "data", "tokenizer", "data_shards", "save_every", "log_every", "evaluate_every", "skips"),
    *("store", "store_rows", "path", "headroom", "text_weight"),
    *("threshold", "normalize", "initial", "initial_rate", "initial_density", "end_to_end_steps"),
}
"""Settings that the step's program does not depend on: what they say is in its arguments, or is done around it."""

Config = TypeVar("Config", LmConfig, TrainConfig)


def settings_of_step(config: Config) -> Config:
    """The settings that the step is compiled for; all others are the default ones, so that none of them compiles it
    anew."""
    names = NOT_COMPILED - ({"model"} if isinstance(config, LmConfig) else set())
    if isinstance(config, LmConfig) or config.shuffle == 1:
        names = names | {"seed"}
    return replace(config, **{field.name: field.default for field in fields(config) if field.name in names})


Range = tuple[str, Callable[[float], bool]]
"""What is expected of a number, and whether one is so."""


def _at_least(least: int) -> Range:
    return f"at least {least}", lambda x: x >= least


_COUNT, _NOT_NEGATIVE, _POSITIVE = _at_least(1), _at_least(0), ("more than 0", lambda x: x > 0)
_SHARE = "0 to 1", lambda x: 0 <= x <= 1
_SOME_SHARE = "more than 0 and at most 1", lambda x: 0 < x <= 1
_BELOW_1 = "at least 0 and less than 1", lambda x: 0 <= x < 1

RANGES: dict[str, Range] = {
    **dict.fromkeys(("steps", "batch", "data_shards", "save_every", "log_every"), _COUNT),
    **dict.fromkeys(("auxiliary_k", "micro_batches", "shuffle", "store_rows", "headroom"), _COUNT),
    **dict.fromkeys(("warmup", "end_to_end_steps", "skips"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_share", "weight_decay", "text_weight", "sparsity_weight"), _NOT_NEGATIVE),
    **dict.fromkeys(("preactivation_weight", "auxiliary_weight", "end_to_end_weight"), _NOT_NEGATIVE),
    **dict.fromkeys(("learning_rate", "clip", "epsilon", "threshold", "tanh_scale", "target_l0"), _POSITIVE),
    **dict.fromkeys(("initial_rate",), _POSITIVE),
    **dict.fromkeys(("beta1", "beta2", "density_decay", "running_decay"), _BELOW_1),
    **dict.fromkeys(("final_rate", "decay", "sparsity_ramp"), _SHARE),
    "initial_density": _SOME_SHARE,
    "target_density": ("more than 0 and less than 1", lambda x: 0 < x < 1),
    "dead_density": ("1e-9 to 1", lambda x: 1e-9 <= x <= 1),
    "length": _at_least(2),
    "seed": ("0 to 4294967295", lambda x: 0 <= x < 1 << 32),
    "evaluate_every": _at_least(-1),
}


def check_ranges(config: LmConfig | TrainConfig) -> None:
    """Refuses numbers that no run can work with, and those that would change nothing."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and type(value) is not int:
            raise UserError(f"setting '{field.name}': {value!r}, expected a whole number")
        if field.type is float and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(f"setting '{field.name}': {value!r}, expected a number")
        expected, is_so = RANGES.get(field.name, ("", lambda x: True))
        if not is_so(value):
            raise UserError(f"setting '{field.name}': {value}, expected {expected}")
    if config.weight_decay and config.optimizer in ("adam", "adafactor", "rmsprop", "sgd"):
        raise UserError(
            f"setting 'weight_decay': {config.weight_decay}, expected 0 under optimizer={config.optimizer}, or "
            "optimizer=adamw or lion"
        )
    if isinstance(config, TrainConfig) and config.sparsity == "auto" and config.sparsity_term == "none":
        if config.sparsity_weight != TrainConfig.sparsity_weight:
            raise UserError(
                f"setting 'sparsity_weight': {config.sparsity_weight}, expected setting 'sparsity' as well: under "
                f"coder.activation={config.coder.activation} there is no penalty by default"
            )
