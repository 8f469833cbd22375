"""An induction head set by hand: attention alone, with every edge that matters known.

The residual stream has a direction for each token, for each position, and for each token before the own one. In layer 0
head 0 attends to the position before and writes its token as the one before; in layer 1 head 0 attends to the position
whose token before is the own token, and writes its token. The other heads attend evenly and copy tokens into directions
that nothing reads.
"""

import jax.numpy as jnp
import numpy as np

from jclt.models import Model, ModelConfig, declare

TOKENS, LENGTH = 12, 6
CLEAN, CORRUPTED, RIGHT, WRONG = (1, 2, 3, 4, 5, 2), (6, 7, 8, 9, 10, 7), 3, 8
"""After 2 came 3; in the corrupted prompt, after 7 came 8."""
EDGES = {"input->a0.h0<v>", "input->a1.h0<q>", "a0.h0->a1.h0<k>", "input->a1.h0<v>", "a1.h0->logits"}
"""Between these two prompts; queries and keys of layer 0 read positions, which do not differ."""
THROUGH_PATTERNS = {"input->a0.h0<v>", "input->a1.h0<q>", "a0.h0->a1.h0<k>"}
"""Those without which the second head would look elsewhere."""
SHAPE = ModelConfig(
    family="gpt2",
    vocabulary=TOKENS,
    width=3 * TOKENS + LENGTH,
    layers=2,
    heads=2,
    mlp_width=4,
    context=LENGTH,
    head_width=TOKENS,
    norm="none",
    activation="relu",
    gated=False,
    learned_positions=True,
    attn_scale=1.0,
    tied=True,
)


def build_induction(sharpness: float = 6.0) -> Model:
    """A head's scores are 0 or `sharpness`."""
    w = {name: np.full(weight.shape, weight.constant) for name, weight in declare(SHAPE).items()}
    token, before, idle, position = np.split(np.eye(SHAPE.width), [TOKENS, 2 * TOKENS, 3 * TOKENS])
    w["token_embedding"], w["position_embedding"] = token, position
    steps = LENGTH - 1
    w["query"][0, :, 0, :steps], w["key"][0, :, 0, :steps] = position[1:].T, 4 * sharpness * position[:-1].T
    w["query"][1, :, 0], w["key"][1, :, 0] = token.T, sharpness * before.T
    w["value"][:, :, :] = token.T[None, :, None]
    w["attn_out"][0, 0], w["attn_out"][1, 0] = before, 4 * token
    w["attn_out"][:, 1] = idle
    params = {name: jnp.asarray(weight, jnp.float32) for name, weight in w.items()}
    return Model(SHAPE, params, None, "handmade induction")
