"""The language model that users hold: settings, parameters and tokenizer; running it and generating text."""
# JAX's types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jclt.errors import UserError
from jclt.fingerprints import fingerprint
from jclt.mesh import make_sharding, mesh_of, use_mesh
from jclt.models.chat import Messages, is_chat, render_chat
from jclt.models.config import ModelConfig
from jclt.models.edits import check_edit
from jclt.models.generate import generate_tokens
from jclt.models.sites import MODEL_SITES, Edit, check_sites
from jclt.models.tokenizer import Tokenizer
from jclt.models.transformer import Mlp, Transformer
from jclt.shapes import Array, ArrayLike, Captured, Int, Params

Prompt = str | Messages | Sequence[int] | Sequence[Sequence[int]] | ArrayLike
"""Text, a chat as a list of messages, or token ids `[T]` or `[B, T]`."""


@dataclass(frozen=True, repr=False)
class Model:
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    name: str

    def __repr__(self) -> str:
        c, count = self.config, sum(x.size for x in self.params.values())
        return f"<Model '{self.name}': {c.family}, {c.layers} layers of width {c.width}, {count:,} parameters>"

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the weights, if they are on one."""
        return mesh_of(self.params["token_embedding"])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights. With several hosts, all must call it."""
        with on_mesh(self):
            return fingerprint(self.params)

    def encode(self, prompt: str | Messages) -> list[int]:
        """The ids of a text, with the special tokens that the model expects; or of a chat, as the model's template
        writes it, up to where the answer begins."""
        if self.tokenizer is None:
            raise UserError(f"model {self.name}: has no tokenizer (tokenizer.json), expected token ids instead of text")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.plain(self.render(prompt))  # a template writes <bos> itself

    def render(self, messages: Messages) -> str:
        """A chat as text."""
        template = None if self.tokenizer is None else self.tokenizer.template
        if template is None:
            raise UserError(f"model {self.name}: has no chat template, expected text or token ids instead of messages")
        return render_chat(template, messages, self.name)


def run(
    model: Model,
    prompt: Prompt,
    capture: Iterable[str] = (),
    *,
    edit: Edit | None = None,
    mlp: Mlp | None = None,
    unroll: bool = False,
) -> tuple[Array, Captured]:
    """Logits, and the values at the captured sites. `jclt.SITES` lists all sites with their axes.

    Text or ids `[T]` give logits `[T, V]`; ids `[B, T]` give a batch axis. Sites inside the layers have a leading layer
    axis.

    `edit(place, value)` returns what the network goes on with; `models/edits.py` has edits that set, scale and add,
    put captured values back, stop gradients, and compose. `mlp(layer, reads, true)` replaces the MLPs. Each new
    function compiles a new program; an `equinox.Module` is compiled once, and its arrays may change from call to call.
    """
    capture = check_sites(capture, model.config)
    tokens = token_array(model, prompt)
    check_edit(edit, model.config, tokens.shape[-1])
    single = tokens.ndim == 1
    batch = tokens[None] if single else tokens
    with on_mesh(model):
        placement = make_sharding(model.mesh, batch.shape, ("batch", None)) if model.mesh else None
        placed = jax.device_put(batch, placement)
        logits, seen = _run(model.config, model.params, placed, capture, edit, mlp, unroll)
    if single:
        return logits[0], {name: x[0] if name in MODEL_SITES else x[:, 0] for name, x in seen.items()}
    return logits, seen


def on_mesh(model: Model) -> AbstractContextManager[Any]:
    """A context in which programs run on the mesh of the model's weights."""
    return use_mesh(model.mesh)


@eqx.filter_jit
def _run(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    capture: tuple[str, ...],
    edit: Edit | None,
    mlp: Mlp | None,
    unroll: bool,
) -> tuple[Array, Captured]:
    options: Any = {"capture": capture, "edit": edit, "mlp": mlp, "unroll": unroll}
    outputs: Any = Transformer(config).apply({"params": params}, tokens, **options)
    return outputs[0], outputs[1]


PROMPT_BUCKET = 32
"""Prompts are padded to a multiple of this, so that generation compiles once for all lengths between two multiples."""


def generate(
    model: Model,
    prompt: Prompt,
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    edit: Edit | None = None,
    mlp: Mlp | None = None,
) -> str | np.ndarray:
    """The prompt with its continuation: text for text, ids for ids; for a chat the answer alone. Greedy unless a
    temperature is given.

    A row ends at a stop token (by default one of the model's) and repeats it from there on. All `max_new_tokens` steps
    run in any case, in one compiled program. Positions of an `edit` count from the start of the prompt; those of an
    open slice, such as `slice(5, None)`, include the new tokens.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, choose_stops(model, stop_tokens))
    continued, _ = continue_prompt(model, token_array(model, prompt), sampling, edit=edit, mlp=mlp)
    if isinstance(prompt, str):
        return prompt + decode_continuation(model, continued, sampling)
    return decode_continuation(model, continued, sampling) if is_chat(prompt) else continued


class Sampling(NamedTuple):
    """How generation chooses tokens."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_tokens: tuple[int, ...]


def choose_stops(model: Model, stop_tokens: Sequence[int] | None) -> tuple[int, ...]:
    return model.config.stop_tokens if stop_tokens is None else tuple(stop_tokens)


def continue_prompt(
    model: Model,
    tokens: np.ndarray,
    sampling: Sampling,
    *,
    edit: Edit | None = None,
    mlp: Mlp | None = None,
    unroll: bool = False,
    keep_logits: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids with their continuation, and if kept the logits that each new token was chosen by."""
    new, config = sampling.max_new_tokens, model.config
    if new < 1:
        raise UserError(f"max_new_tokens={new}: expected at least 1")
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise UserError(
            f"temperature={sampling.temperature}, top_p={sampling.top_p}: expected at least 0, and above 0 up to 1"
        )
    batch = np.atleast_2d(tokens)
    length = batch.shape[1]
    if length + new > config.context:
        raise UserError(f"{length} tokens of prompt and {new} new ones: expected at most {config.context}")
    check_edit(edit, config, length + new)
    padding = min(-length % PROMPT_BUCKET, config.context - length - new)
    with on_mesh(model):
        chosen, logits = generate_tokens(
            config,
            model.params,
            jnp.asarray(np.pad(batch, ((0, 0), (0, padding)))),
            jnp.full(len(batch), length, jnp.int32),
            new,
            jnp.float32(sampling.temperature),
            jnp.float32(sampling.top_p),
            jax.random.key(sampling.seed),
            sampling.stop_tokens,
            edit,
            mlp,
            unroll,
            keep_logits,
        )
    continued = np.concatenate([batch, np.asarray(chosen)], axis=1)
    kept = None if logits is None else np.asarray(logits)
    if tokens.ndim == 1:
        return continued[0], None if kept is None else kept[0]
    return continued, kept


def decode_continuation(model: Model, continued: np.ndarray, sampling: Sampling) -> str:
    """The text of the new tokens, up to the first stop token."""
    assert model.tokenizer is not None
    ids, length = continued.tolist(), len(continued) - sampling.max_new_tokens
    end = next((i for i in range(length, len(ids)) if ids[i] in sampling.stop_tokens), len(ids))
    return model.tokenizer.decode(ids[:end])[len(model.tokenizer.decode(ids[:length])) :]


def token_array(model: Model, prompt: Prompt) -> np.ndarray:
    """The prompt as int32 ids `[T]` or `[B, T]`, after checks against the model."""
    try:
        ids = np.asarray(model.encode(prompt) if isinstance(prompt, str) or is_chat(prompt) else prompt)
    except ValueError:
        raise UserError("prompt: rows of different lengths, expected token ids [T] or [B, T]") from None
    if ids.ndim not in (1, 2) or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        what = f"got an array of {ids.dtype} with {ids.ndim} axes"
        raise UserError(f"prompt: {what}, expected text or token ids [T] or [B, T]")
    if ids.size == 0:
        raise UserError("prompt: empty, expected at least one token")
    length, context = ids.shape[-1], model.config.context
    if length > context:
        raise UserError(f"prompt: {length} tokens, expected at most {context} (the model's context)")
    if ids.min() < 0 or ids.max() >= model.config.vocabulary:
        raise UserError(
            f"prompt: token id {ids.min() if ids.min() < 0 else ids.max()}, expected 0 to {model.config.vocabulary - 1}"
        )
    return ids.astype(np.int32)


def token_row(model: Model, prompt: Prompt) -> Int[np.ndarray, "T"]:
    """The ids of one prompt."""
    ids = token_array(model, prompt)
    if ids.ndim != 1:
        raise UserError(f"prompt: {len(ids)} rows, expected text or token ids [T] of one prompt")
    return ids
