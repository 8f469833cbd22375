"""The settings of a training run."""

from dataclasses import dataclass
from typing import Literal

from jclt.models import ModelConfig


@dataclass(frozen=True)
class LmConfig:
    """Everything that decides what a run computes."""

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
    warmup: int = 100
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
