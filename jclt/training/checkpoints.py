"""Checkpoints of a training state by Orbax: written in the background, the newest few kept, restored onto any mesh."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

log = logging.getLogger(__name__)
State = TypeVar("State")


class Checkpoints:
    """`path` is a folder or the URL of one; `beside` saves what else belongs to the run."""

    def __init__(self, path: str, beside: Callable[[], None] = lambda: None, keep: int = 2):
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        self.beside, self.checkpointer = beside, ocp.training.Checkpointer(path, preservation_policy=newest)

    def save(self, step: int, state: Any) -> None:
        self.checkpointer.save_async(step, {"state": leaves(state)}, force=True, overwrite=True)
        self.beside()

    def restore(self, like: State) -> State | None:
        """The newest state that can be read, placed as `like` is; None where there is none."""
        wanted = leaves(like)
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
        for checkpoint in sorted(self.checkpointer.checkpoints, key=lambda c: c.step, reverse=True):
            try:
                found = self.checkpointer.load(checkpoint.step, {"state": target})["state"]
                log.info("resuming at step %d", checkpoint.step)
                return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])
            except Exception as error:  # a damaged checkpoint can fail in any layer below
                log.warning("checkpoint of step %d cannot be read, passing over it (%s)", checkpoint.step, error)
        return None

    def close(self) -> None:
        self.checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def leaves(state: Any) -> dict[str, Any]:
    """A state's arrays by their path: what lies on disk says what it is, whatever classes the state is made of."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(state)}
