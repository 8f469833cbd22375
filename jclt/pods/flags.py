"""Flags for the TPU compiler, each with its reason. `jclt plan` and `jclt train` on a TPU set the same."""

import os
from typing import NamedTuple

VARIABLE = "LIBTPU_INIT_ARGS"


class Flag(NamedTuple):
    name: str
    value: str
    reason: str


FLAGS = (
    Flag(
        "xla_enable_async_all_reduce",
        "true",
        "with the next one: a layer's partial sums travel beside the next layer's product; 107 -> 92 ms for 8 layers",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
        "true",
        "without it the one before changes nothing",
    ),
    Flag(
        "xla_tpu_scheduler_percent_shared_memory_limit",
        "90",
        "else the scheduler fills 94% of a chip's memory to hide more; a tenth stays free for what it does not see",
    ),
)


def format_flags() -> str:
    return " ".join(f"--{flag.name}={flag.value}" for flag in FLAGS)


def set_flags() -> None:
    """Sets the flags, before the first use of a TPU. Flags that the user has set come last, and so take precedence."""
    user_flags = os.environ.get(VARIABLE, "")
    if format_flags() not in user_flags:
        os.environ[VARIABLE] = f"{format_flags()} {user_flags}".strip()
