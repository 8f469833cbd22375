"""The pod that a run is meant for, which its configuration file defines."""

from dataclasses import dataclass, replace
from typing import Any

from jclt.config import run_settings_file
from jclt.errors import UserError
from jclt.models import ModelConfig, known_config
from jclt.pods.chips import find_chip
from jclt.training.config import TrainConfig


@dataclass(frozen=True)
class Pod:
    """A slice of TPUs, or several slices joined by the data-centre network."""

    topology: str  # such as v5e:16x16
    slices: int = 1
    model: ModelConfig | None = None  # needed for a model whose name is not in `known_config`

    def check(self) -> None:
        find_chip(self.topology)
        if self.slices < 1:
            raise UserError(f"slices={self.slices}: expected at least 1")


def load_pod(name: str, topology: str | None, slices: int | None) -> Pod:
    """The `pod` that a configuration file defines; `topology` and `slices` replace what it defines."""
    defined: Any = run_settings_file(name).get("pod") if name.endswith(".py") else None
    if defined is not None and not isinstance(defined, Pod):
        raise UserError(f"{name}: expected `pod` to be a Pod (jclt.pods)")
    if defined is None:
        if topology is None:
            raise UserError(f"config '{name}': defines no `pod`, expected --topology, such as v5e:2x4")
        defined = Pod(topology)
    pod = replace(defined, topology=topology or defined.topology, slices=slices or defined.slices)
    pod.check()
    return pod


def find_model_config(pod: Pod, config: TrainConfig) -> ModelConfig:
    return pod.model or known_config(config.model)
