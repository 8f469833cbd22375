"""Checkpoints of a training state by Orbax: written in the background, the newest few kept, restored onto any mesh.

A checkpoint holds

1. all arrays of the state (`CoderState`, `LmState`) by name, such as `coder.layers.0.encoder`: the step, the weights,
   what the optimizer keeps of them; and of a coder the scaling, the densities, the tokens since each feature fired,
   BatchTopK's running threshold, the skipped steps and the capacity of the sparse path;
2. checksums of these arrays (`jclt.fingerprints`), which any changed bit changes.

Batches and random keys follow from the step and the seed. Settings and metrics are other files of the run's folder.

`restore` tries the newest checkpoint first. One that is damaged (it cannot be read, or its checksums are not those of
its arrays) or of another state (names or shapes differ) is passed over with a warning. If none is left, this is an
error, and nothing is overwritten. So a restored state is exactly one that was saved; only of a checkpoint without
checksums, by an earlier version, this is not known, and a warning says so.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jclt.errors import Interrupted, UserError, first_line
from jclt.fingerprints import sum_bits
from jclt.hosts import run_on_every_host
from jclt.shapes import Array

log = logging.getLogger(__name__)
State = TypeVar("State")
SUMS = "sums"
"""The key of the checksums of all arrays in a checkpoint's metadata."""
NAMES_ON_DISK = {"capacity": "room"}
"""Fields of a state that are saved under another name, by which earlier versions saved them."""


def _has_no_traceback(record: logging.LogRecord) -> bool:
    """Filters the errors that Orbax's threads log: the same errors are raised here."""
    return not record.exc_info


class Checkpoints:
    """The checkpoints in `path`, a folder or a URL. `save_others` saves the run's other files at every checkpoint."""

    def __init__(self, path: str, save_others: Callable[[], None] = lambda: None, keep: int = 2):
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        self.path, self.save_others = path, save_others
        self.complete = 0  # the step of the newest complete checkpoint
        self.under_way = 0  # the step of the checkpoint that is being written
        logging.getLogger("absl").addFilter(_has_no_traceback)
        try:
            # A save that was cut off leaves files that take up space.
            self.checkpointer = ocp.training.Checkpointer(
                path, preservation_policy=newest, cleanup_tmp_directories=True
            )
        except Exception as error:  # of the file system, whichever it is
            raise UserError(f"{path}: checkpoints cannot be listed ({first_line(error)})") from None

    def save(self, step: int, state: Any) -> None:
        """Begins to write a checkpoint, and returns once the state may change."""
        arrays = name_leaves(state)
        self.wait()
        sums: Any = sum_arrays(arrays)
        with self._report_write_errors():
            self.checkpointer.save_async(
                step, {"state": arrays}, force=True, overwrite=True, custom_metadata={SUMS: sums}
            )
            self.under_way = step
            self.save_others()

    def wait(self) -> None:
        """Waits until the last checkpoint is complete."""
        with self._report_write_errors():
            self.checkpointer.wait()
        self.complete = self.under_way

    def restore(self, like: State) -> State | None:
        """The newest state that can be read, sharded as `like` is; None if there are no checkpoints.

        If there are checkpoints and none can be read, this is an error: the run must not overwrite them.
        """
        target = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in name_leaves(like).items()
        }
        reasons: dict[int, str] = {}
        for step in self.steps():
            try:
                arrays = read_state(self.checkpointer, step, target)
            except Exception as error:  # a damaged checkpoint can fail in any layer below
                reasons[step] = first_line(error)
                log.warning("checkpoint of step %d cannot be read, passing over it (%s)", step, reasons[step])
                continue
            log.info("resuming at step %d", step)
            self.complete = self.under_way = step
            return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in target])
        if reasons:
            step = max(reasons)
            raise UserError(
                f"{self.path}: none of the checkpoints can be read, of step {step} for this reason: {reasons[step]}; "
                "expected one that can, or the folder removed to begin the run anew"
            )
        return None

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest first."""
        return sorted((checkpoint.step for checkpoint in self.checkpointer.checkpoints), reverse=True)

    @contextmanager
    def _report_write_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of Orbax, tensorstore and the file system
            newest = f"the newest checkpoint is of step {self.complete}" if self.complete else "there is none yet"
            raise UserError(f"{self.path}: a checkpoint cannot be written ({shorten_error(error)}); {newest}") from None

    def close(self) -> None:
        try:
            with self._report_write_errors():
                self.checkpointer.close()
        finally:
            logging.getLogger("absl").removeFilter(_has_no_traceback)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None or issubclass(kind, Interrupted):
                raise
            log.warning("%s", error)  # the error that ended the run is the better reason


def read_state(
    checkpointer: ocp.training.Checkpointer, step: int, target: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, Array]:
    """The arrays of a checkpoint by name, after a comparison with the checksums that were saved with them.

    The arrays are sharded as the target is; without a target they are whole on one device. Every host must call it.
    """

    def load() -> tuple[Any, Any]:
        metadata = checkpointer.metadata(step)
        saved: Any = (metadata.metadata or {}).get("state")
        if saved is None:
            raise UserError("damaged: nothing says which arrays it holds")
        if target is not None:
            _check_names(saved, target)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        on_one_device = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for name, x in saved.items()}
        custom: Any = metadata.custom_metadata or {}
        return checkpointer.load(step, {"state": dict(target or on_one_device)})["state"], custom.get(SUMS)

    arrays, sums = run_on_every_host(load)
    if sums is None:
        log.warning("checkpoint of step %d was saved without sums: nothing can tell whether it is damaged", step)
        return arrays
    sums_now = sum_arrays(arrays)
    for name in arrays:
        if sums_now[name] != sums.get(name):
            raise UserError(f"damaged: the numbers of '{name}' are not those that were saved")
    return arrays


def _check_names(saved: Mapping[str, Any], target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Checks that the checkpoint holds the arrays of the target."""
    for name, x in target.items():
        if name not in saved:
            raise UserError(f"holds no array '{name}', expected the settings and version of jclt it was saved by")
        if tuple(saved[name].shape) != x.shape:
            raise UserError(f"array '{name}' has shape {list(saved[name].shape)}, expected {list(x.shape)}")
    for name in saved:
        if name not in target:
            raise UserError(f"holds an array '{name}', expected the settings and version of jclt it was saved by")


def sum_arrays(arrays: Mapping[str, Array]) -> dict[str, list[int]]:
    return {name: np.asarray(sums).tolist() for name, sums in sum_bits(dict(arrays)).items()}


def shorten_error(error: BaseException) -> str:
    """The reason of a failed write, out of a message of many lines."""
    full = "No space left on device"
    return full if full in str(error) else first_line(error)


def name_leaves(state: Any) -> dict[str, Any]:
    """A state's arrays by their paths, so that a checkpoint can be read without the state's classes."""
    names = (
        (jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in jax.tree.leaves_with_path(state)
    )
    return {NAMES_ON_DISK.get(name, name): x for name, x in names}
