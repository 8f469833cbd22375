"""What a run's file says of the pod that it is meant for."""

from dataclasses import dataclass, replace
from typing import Any

from jclt.config import read_file
from jclt.errors import UserError
from jclt.models import ModelConfig, known_config
from jclt.pods.chips import chip_of
from jclt.training.config import TrainConfig


@dataclass(frozen=True)
class Pod:
    """A slice of TPUs, or several that a data-centre network joins."""

    topology: str  # such as v5e:16x16
    slices: int = 1
    model: ModelConfig | None = None  # where the model's name is none that is known

    def check(self) -> None:
        chip_of(self.topology)
        if self.slices < 1:
            raise UserError(f"slices={self.slices}: expected at least 1")


def load_pod(name: str, topology: str | None, slices: int | None) -> Pod:
    """The `pod` that a configuration's file defines, with what the command line says instead."""
    found: Any = read_file(name).get("pod") if name.endswith(".py") else None
    if found is not None and not isinstance(found, Pod):
        raise UserError(f"{name}: expected `pod` to be a Pod (jclt.pods)")
    if found is None:
        if topology is None:
            raise UserError(f"config '{name}': defines no `pod`, expected --topology, such as v5e:2x4")
        found = Pod(topology)
    pod = replace(found, topology=topology or found.topology, slices=slices or found.slices)
    pod.check()
    return pod


def shape_of(pod: Pod, config: TrainConfig) -> ModelConfig:
    return pod.model or known_config(config.model)
