"""Checkpoints with Orbax: written in the background, atomically, the newest few kept.

A checkpoint is a folder named by its step with three items: `state` (parameters and
optimizer state), `data` (the position of the data iterator) and `config` (the run's
configuration).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from examples.llama.model import Params
from examples.llama.options import differing_fields
from examples.llama.run.distributed import exchange, from_first, together
from examples.llama.run.errors import (
    UsageError,
    disk_is_full,
    first_line,
    is_first,
    notice,
)
from examples.llama.run.log import (
    BEST,
    CHECKPOINTS,
    Row,
    read_metrics,
    set_aside,
)
from examples.llama.step import TrainState

# A checkpoint of another run is not damaged, nor is one that memory or permissions keep
# us from reading. For damaged files, TensorStore raises all sorts of other errors.
NOT_DAMAGE = (UsageError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)


class Restored(NamedTuple):
    step: int
    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, as a context manager that waits for the last write.

    All processes of a run take part, each with the shards on its devices. They share
    the folder.

    Args:
        run_folder: the run's folder.
        keep: how many of the newest checkpoints to keep.
        config: the run's configuration, as JSON. Only a checkpoint with the same
            configuration is restored.
        name: the folder of the checkpoints in the run's folder.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        keep: int,
        config: dict[str, Any],
        name: str = CHECKPOINTS,
    ) -> None:
        self.folder = (run_folder / name).absolute()
        self._config = config
        self._manager = ocp.CheckpointManager(
            self.folder,
            # Orbax removes the half-written checkpoints of a killed run. It would
            # remove those of another process too, so a folder belongs to one run.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
            self._manager.close()
            return
        # The error under way is the one to report. A failed save has been reported
        # before, or is reported here.
        with contextlib.ExitStack() as stack:
            stack.callback(self._manager.close)
            try:
                self.wait()
            except UsageError as error:
                notice(str(error))

    def save(
        self, step: int, state: TrainState | dict[str, Params], data: dict[str, Any]
    ) -> None:
        """Copies the state to host memory, then writes it in the background.

        Raises:
            UsageError: if this save, or the one before, could not be written.
        """
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(self._config),
                ),
                force=True,
            )

    def check(self) -> None:
        """Raises `UsageError` if a background save has failed; returns at once."""
        with self._explained():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until the background save is on disk; raises the errors of `check`."""
        with self._explained():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, which a resumed run repeats."""
        # Orbax waits for all processes in each removal, so all take the same steps.
        for later in from_first(self.steps):
            if later > step:
                self._manager.delete(later)

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, the oldest first."""
        return sorted(ocp.utils.checkpoint_steps(self.folder))

    def newest(self) -> str:
        """Returns a sentence that says where the newest complete checkpoint is."""
        steps = self.steps()
        return (
            f"the last good checkpoint is {self.folder / str(steps[-1])}"
            if steps
            else "there is no checkpoint"
        )

    def restore_newest(self, abstract_state: TrainState) -> Restored | None:
        """Returns the newest checkpoint that can be read, or None if none exists.

        A checkpoint that cannot be read is renamed, with a notice, and kept.

        Args:
            abstract_state: shapes, dtypes and shardings to restore to.

        Raises:
            UsageError: for a checkpoint of another configuration, or if none can be
                read.
        """
        damaged: dict[int, str] = {}
        for step in reversed(from_first(self.steps)):
            restored, reason = None, ""
            # An error that is not damage ends all processes. Damage that one of them
            # finds makes all of them take an older checkpoint.
            with together():
                try:
                    restored = self._restore(step, abstract_state)
                except NOT_DAMAGE:
                    raise
                except Exception as error:
                    reason = first_line(error)
            reasons = list(filter(None, exchange(reason)))
            if reasons:
                damaged[step] = reasons[0]
                continue
            with together():
                if is_first():
                    self._set_aside(damaged)
            self._manager.reload()
            return restored
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise UsageError(
                f"none of the checkpoints in {self.folder} can be read ({reasons}); "
                "put back one that can, or choose another `out`"
            )
        return None

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items():
            aside = set_aside(self.folder / str(step))
            notice(f"checkpoint {step} cannot be read ({reason}); it is now {aside}")

    def _restore(self, step: int, abstract_state: TrainState) -> Restored:
        args = ocp.args.Composite(
            config=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()
        )
        small = self._manager.restore(step, args=args)
        if differing := differing_fields(self._config, small["config"]):
            raise UsageError(
                f"checkpoint {self.folder / str(step)} is of another run "
                f"({'; '.join(differing)}); give the same options, or another `out`"
            )
        # The configurations are compared first, since a run with another one may have
        # a state of other shapes.
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return Restored(
            step, self._manager.restore(step, args=args)["state"], small["data"]
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # TensorStore raises ValueError and RuntimeError.
            remedy = "make room there" if disk_is_full(error) else "see to that"
            raise UsageError(
                f"a checkpoint could not be written to {self.folder} "
                f"({first_line(error)}); {self.newest()}; {remedy} and run again with "
                "`resume` auto"
            ) from error


class BestWeights:
    """The parameters of the evaluation with the lowest loss, in `best/` of a run.

    It is a context manager, like `Checkpoints`. It stores no optimizer state.

    Args:
        run_folder: the run's folder.
        step: the step that the run continues from. The metrics up to it are on disk.
        config: the run's configuration, as JSON.
    """

    def __init__(self, run_folder: Path, *, step: int, config: dict[str, Any]) -> None:
        self._checkpoints = Checkpoints(run_folder, keep=1, config=config, name=BEST)
        self._checkpoints.remove_after(step)
        # The weights of an earlier evaluation may be gone: later ones, which were just
        # removed, took their place.
        self._lowest = from_first(
            lambda: loss_of_newest(run_folder, self._checkpoints.steps())
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpoints.__exit__(*error)

    def kept_by(
        self, evaluate: Callable[[Params, int], Row]
    ) -> Callable[[Params, int], Row]:
        """Returns an `evaluate` that also saves the parameters if none were better."""

        def evaluate_and_keep(params: Params, step: int) -> Row:
            row = evaluate(params, step)
            if self._lowest is None or row["val_loss"] < self._lowest:
                self._lowest = row["val_loss"]
                self._checkpoints.save(step, {"params": params}, {})
                # A run that continues from a checkpoint of this step does not evaluate
                # it again, so that checkpoint must not be ahead of these weights.
                self._checkpoints.wait()
            return row

        return evaluate_and_keep


def loss_of_newest(run_folder: Path, steps: list[int]) -> float | None:
    """Returns the validation loss at the last of the steps, or None without one."""
    newest = read_metrics(run_folder)[steps[-1] - 1 :] if steps else []
    return newest[0].get("val_loss") if newest else None


def steps_on_disk(run_folder: Path, name: str = CHECKPOINTS) -> list[int]:
    """Returns the steps of a run's checkpoints, the oldest first."""
    folder = (run_folder / name).absolute()
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def restore_params(
    run_folder: Path,
    abstract_params: Params,
    step: int | None,
    name: str = CHECKPOINTS,
) -> Params:
    """Returns the parameters of a checkpoint, without reading its optimizer state.

    Args:
        run_folder: the run's folder.
        abstract_params: shapes, dtypes and shardings to restore to.
        step: the checkpoint's step; None for the newest.
        name: the folder of the checkpoints in the run's folder.

    Raises:
        UsageError: if there is no such checkpoint, or if it is damaged.
    """
    folder, steps = (run_folder / name).absolute(), steps_on_disk(run_folder, name)
    if not steps:
        remedy = (
            "let the run save one, with `resume` auto"
            if name == CHECKPOINTS
            else f"leave out `{name}`: only fine-tuning keeps its best weights"
        )
        raise UsageError(f"{folder} has no checkpoint; {remedy}")
    if step not in (None, *steps):
        raise UsageError(
            f"{folder} has not got checkpoint {step}; it has those of steps {steps}"
        )
    path = folder / str(steps[-1] if step is None else step)
    item = {"params": abstract_params}
    args = ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    try:
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
            path / "state", args
        )["params"]
    except NOT_DAMAGE:
        raise
    except Exception as error:
        remedy = "leave out `best`" if name == BEST else "give another `step`"
        raise UsageError(
            f"{path} cannot be read ({first_line(error)}); {remedy}"
        ) from error
