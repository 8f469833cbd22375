"""Forward pass of a GPT-2-sized model (12 layers x 768, 8 prompts of 128 tokens) beside transformers' eager PyTorch.

    python experiments/bench/forward.py

Expected on 2 CPU cores: at least 70% of the measured matmul rate, and no slower than PyTorch, which runs beside it
where torch and transformers are installed. Cost: under a minute.
"""

import jax
import jax.numpy as jnp
import numpy as np
from machine import Case, arguments, best, matmul_rate, report

from jclt.models import ModelConfig, declare, forward, known_config
from jclt.training.coder.speed import count_forward_operations

BATCH, LENGTH = 8, 128
GPT2 = known_config("gpt2")


def count_operations(config: ModelConfig, batch: int, length: int) -> float:
    """Multiplications and additions of the products in one forward pass."""
    return count_forward_operations(config, batch, length) + 2.0 * batch * length * config.width * config.vocabulary


def time_peer(tokens: np.ndarray, repeats: int) -> float | None:
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
    settings = transformers.GPT2Config(attn_implementation="eager", use_cache=False)
    model = transformers.GPT2LMHeadModel(settings).eval()
    ids = torch.from_numpy(tokens)
    with torch.inference_mode():
        return best(lambda: model(ids).logits.sum().item(), repeats)


def main() -> None:
    options = arguments(__doc__)
    params = {name: weight.init(jax.random.key(0), jnp.float32) for name, weight in declare(GPT2).items()}
    tokens = np.random.default_rng(0).integers(0, GPT2.vocabulary, (BATCH, LENGTH), np.int64)
    run = jax.jit(lambda p, t: forward(GPT2, p, t)[0])
    ids = jnp.asarray(tokens, jnp.int32)
    rate = matmul_rate(options.repeats)
    work = count_operations(GPT2, BATCH, LENGTH)
    seconds = best(lambda: run(params, ids), options.repeats)
    peer = time_peer(tokens, options.repeats)
    rate = max(rate, matmul_rate(options.repeats))
    beside = {} if peer is None else {"against": "transformers eager", "ratio": peer / seconds}
    cases = [Case("GPT-2 small, 8 x 128, float32", work, seconds, work / seconds / rate, **beside)]
    report(cases, rate, options.json)


if __name__ == "__main__":
    main()
