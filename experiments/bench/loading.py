"""Loading a checkpoint of 1 GB in one file or eight: time, and the growth of host memory.

    python experiments/bench/loading.py

Expected: the peak stays below what the device holds (on a CPU, host memory too) plus 1.3 of the largest shard.
Cost: under a minute and 2 GB of disk.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from machine import Case, arguments, matmul_rate, report

from jclt.models import Model, ModelConfig, declare, load_model, save_model

CONFIG = ModelConfig("llama", 16384, 1024, 20, 16, 2816, 512)  # 1.09 GB in float32


def peak_bytes() -> int:
    """The most memory that this process has held (Linux). `resource` would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(folder: str) -> None:
    """In a fresh process: seconds, growth of the peak, bytes of the weights."""
    jnp.zeros(8).block_until_ready()
    before = peak_bytes()
    start = time.perf_counter()
    model = load_model(folder)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak_bytes() - before, sum(x.nbytes for x in jax.tree.leaves(model.params))]))


def main() -> None:
    options = arguments(__doc__)
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        params = {name: weight.init(jax.random.key(0), jnp.float32) for name, weight in declare(CONFIG).items()}
        for name, shard_bytes in (("one", 10**10), ("eight", 150 * 10**6)):
            folder = Path(scratch) / name
            save_model(Model(CONFIG, params, None, name), folder, shard_bytes=shard_bytes)
            largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
            command = [sys.executable, __file__, "--measure", str(folder)]
            seconds, growth, size = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            limit = size + 1.3 * largest
            sizes = f"weights {size / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB"
            print(f"{name}: peak +{growth / 1e9:.2f} GB, {'below' if growth < limit else 'ABOVE'} the limit ({sizes})")
            cases.append(Case(f"load {size / 1e9:.2f} GB, {name} file(s)", 0.0, seconds))
    report(cases, matmul_rate(options.repeats), options.json)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(sys.argv[-1])
    else:
        main()
