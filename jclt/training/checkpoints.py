"""Checkpoints of a training state by Orbax: written in the background, the newest few kept, restored onto any mesh.

Beside the numbers lie their sums (`jclt.fingerprints`), which a single changed bit changes: what is restored is what
was saved, or is passed over.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jclt.errors import Interrupted, UserError, first_line
from jclt.fingerprints import bit_sums
from jclt.hosts import together
from jclt.shapes import Array

log = logging.getLogger(__name__)
State = TypeVar("State")
SUMS = "sums"
"""Of each array, in a checkpoint's own metadata."""


def _no_traceback(record: logging.LogRecord) -> bool:
    """Each of Orbax's threads logs the error that is raised here all the same."""
    return not record.exc_info


class Checkpoints:
    """`path` is a folder or the URL of one; `beside` saves what else belongs to the run."""

    def __init__(self, path: str, beside: Callable[[], None] = lambda: None, keep: int = 2):
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        self.path, self.beside = path, beside
        self.complete, self.under_way = 0, 0  # steps of the newest checkpoint that is there, and of the one coming
        logging.getLogger("absl").addFilter(_no_traceback)
        try:
            # What a save that was cut off has left takes up space.
            self.checkpointer = ocp.training.Checkpointer(
                path, preservation_policy=newest, cleanup_tmp_directories=True
            )
        except Exception as error:  # of the file system, whichever it is
            raise UserError(f"{path}: checkpoints cannot be listed ({first_line(error)})") from None

    def save(self, step: int, state: Any) -> None:
        found = leaves(state)
        self.wait()
        sums: Any = plain_sums(found)
        with self._writing():
            self.checkpointer.save_async(
                step, {"state": found}, force=True, overwrite=True, custom_metadata={SUMS: sums}
            )
            self.under_way = step
            self.beside()

    def wait(self) -> None:
        """Until the last checkpoint is there as a whole."""
        with self._writing():
            self.checkpointer.wait()
        self.complete = self.under_way

    def restore(self, like: State) -> State | None:
        """The newest state that can be read, placed as `like` is; None where there is none. An error where there are
        some and none can be read: what is there is not to be written over."""
        wanted = leaves(like)
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
        reasons: dict[int, str] = {}
        for step in self.steps():
            try:
                found = read_state(self.checkpointer, step, target)
            except Exception as error:  # a damaged checkpoint can fail in any layer below
                reasons[step] = first_line(error)
                log.warning("checkpoint of step %d cannot be read, passing over it (%s)", step, reasons[step])
                continue
            log.info("resuming at step %d", step)
            self.complete = self.under_way = step
            return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])
        if reasons:
            step = max(reasons)
            raise UserError(
                f"{self.path}: none of the checkpoints can be read, of step {step} for this reason: {reasons[step]}; "
                "expected one that can, or the folder removed to begin the run anew"
            )
        return None

    def steps(self) -> list[int]:
        """Of which there are checkpoints, the newest first."""
        return sorted((checkpoint.step for checkpoint in self.checkpointer.checkpoints), reverse=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of Orbax, tensorstore and the file system
            newest = f"the newest checkpoint is of step {self.complete}" if self.complete else "there is none yet"
            raise UserError(f"{self.path}: a checkpoint cannot be written ({brief(error)}); {newest}") from None

    def close(self) -> None:
        try:
            with self._writing():
                self.checkpointer.close()
        finally:
            logging.getLogger("absl").removeFilter(_no_traceback)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None or issubclass(kind, Interrupted):
                raise
            log.warning("%s", error)  # what ended the run is the better reason


def read_state(
    checkpointer: ocp.training.Checkpointer, step: int, target: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, Array]:
    """The arrays of a checkpoint by their names, compared with the sums that were saved beside them; as the target has
    them placed, or whole on one device. Of several hosts all must ask."""

    def load() -> tuple[Any, Any]:
        metadata = checkpointer.metadata(step)
        held: Any = (metadata.metadata or {}).get("state")
        if held is None:
            raise UserError("damaged: nothing says which arrays it holds")
        if target is not None:
            _check_names(held, target)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = target or {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in held.items()}
        beside: Any = metadata.custom_metadata or {}
        return checkpointer.load(step, {"state": dict(wanted)})["state"], beside.get(SUMS)

    found, sums = together(load)
    if sums is None:
        log.warning("checkpoint of step %d was saved without sums: nothing can tell whether it is damaged", step)
        return found
    own = plain_sums(found)
    for name in found:
        if own[name] != sums.get(name):
            raise UserError(f"damaged: the numbers of '{name}' are not those that were saved")
    return found


def _check_names(held: Mapping[str, Any], target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """That the checkpoint holds what the run works with."""
    for name, x in target.items():
        if name not in held:
            raise UserError(f"holds no array '{name}', expected the settings and version of jclt it was saved by")
        if tuple(held[name].shape) != x.shape:
            raise UserError(f"array '{name}' has shape {list(held[name].shape)}, expected {list(x.shape)}")
    for name in held:
        if name not in target:
            raise UserError(f"holds an array '{name}', expected the settings and version of jclt it was saved by")


def plain_sums(arrays: Mapping[str, Array]) -> dict[str, list[int]]:
    return {name: np.asarray(sums).tolist() for name, sums in bit_sums(dict(arrays)).items()}


def brief(error: BaseException) -> str:
    """What went wrong in writing, out of a message that goes on for pages."""
    full = "No space left on device"
    return full if full in str(error) else first_line(error)


def leaves(state: Any) -> dict[str, Any]:
    """A state's arrays by their path: what lies on disk says what it is, whatever classes the state is made of."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(state)}
