"""Runs of `jclt train` and `jclt train-lm` in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from jclt.training.config import LmConfig, TrainConfig

ONE_DEVICE = {"XLA_FLAGS": " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)}
"""The environment of a process that has one device, unless `JAX_NUM_CPU_DEVICES` sets another number."""

SOURCE = """
from jclt.coders import CoderConfig
from jclt.models import ModelConfig
from jclt.training.config import LmConfig, TrainConfig
config = {config!r}
"""


def write_config(config: LmConfig | TrainConfig, file: Path) -> str:
    """Writes a configuration file, and returns its path as an argument for `jclt`."""
    file.write_text(SOURCE.format(config=config))
    return str(file)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_run(config: LmConfig | TrainConfig, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts a process that trains into the folder, on one device unless the environment sets another number."""
    command = "train" if isinstance(config, TrainConfig) else "train-lm"
    arguments = [command, write_config(config, folder.with_suffix(".py")), "--out", str(folder)]
    variables = os.environ | ONE_DEVICE | environment
    return subprocess.Popen(
        [sys.executable, "-m", "jclt", *arguments], env=variables, stderr=subprocess.PIPE, text=True
    )


def start_two_processes(config: LmConfig | TrainConfig, folder: Path) -> list[subprocess.Popen[str]]:
    """Starts two processes that share a run, with two devices each."""
    meeting = {"JCLT_COORDINATOR": f"localhost:{find_free_port()}", "JCLT_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "2"}
    # Only the first writes compiled programs to the cache. If it found there what the other must compile, it would wait
    # for the other, and give up after half a minute.
    meeting["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return [start_run(config, folder, **meeting, JCLT_PROCESS=str(process)) for process in range(2)]
