"""The updates of optimizers from the same gradients: singular values, rows and sizes.

Run it with `python -m benchmarks.spectra`.

AdamW trains the tiny LLaMA. Every other optimizer gets the same gradients, keeps its
own state, and computes updates that are measured but never applied. The tables are
means over an attention and an MLP kernel of the first and the last layer, and the
figure shows each of these kernels. It takes a few minutes on two cores.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import report
from benchmarks.memory_figure import INK
from benchmarks.variants import VARIANTS
from examples.llama.mesh import make_mesh
from examples.llama.model import Batch, graphdef_of, init_params
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import RECIPES, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.pretrain import load_text
from examples.llama.run.errors import UsageError, exit_on_usage_error
from examples.llama.run.setup import execution_of, model_config
from examples.llama.step import TrainState, make_train_step

# The kernels whose updates are looked at, as (module, name).
WATCHED = (("attention", "q_proj"), ("mlp", "down_proj"))


class Rule(NamedTuple):
    """An optimizer of the trainer or of `benchmarks.variants`, and its options."""

    optimizer: str
    options: Mapping[str, Any] = {}


# Without momentum, the update of SGD is the gradient.
GRADIENT = "the gradient (SGD)"
SPECTRUM_RULES = {
    GRADIENT: Rule("sgd"),
    "AdamW": Rule("adamw"),
    "Muon": Rule("muon"),
    "APOLLO-Mini": Rule("apollo-mini"),
    "RACS": Rule("racs"),
    # Updates in proportion to the weights have the same spectrum.
    "APOLLO-Zero": Rule("apollo-zero", {"relative": False}),
}
# The factors of rank r are about sqrt(r) times those of rank 1, hence the scales.
SIZE_RULES = {
    "rank 1, no limit": Rule("mini-no-limit"),
    "rank 1, limit 1.1": Rule("mini-limit-1.1"),
    "rank 1, limit 1.01": Rule("apollo-mini"),
    "rank 8, no limit": Rule("mini-no-limit", {"rank": 8, "scale": 16.0}),
    "rank 8, limit 1.01": Rule("apollo-mini", {"rank": 8, "scale": 16.0}),
    "rank 32, no limit": Rule("mini-no-limit", {"rank": 32, "scale": 4.0}),
    "rank 32, limit 1.01": Rule("apollo-mini", {"rank": 32, "scale": 4.0}),
}
RULES = SPECTRUM_RULES | SIZE_RULES

# The colors of the lines, on light and dark.
COLORS = {
    GRADIENT: ("#afb8c1", "#6e7781"),
    "AdamW": ("#4c78a8", "#6b9bd1"),
    "Muon": ("#e45756", "#f0787a"),
    "APOLLO-Mini": ("#b279a2", "#d0a0c4"),
    "RACS": ("#54a24b", "#7cc674"),
    "APOLLO-Zero": ("#d98200", "#f2a65a"),
}

Updates = dict[str, dict[str, np.ndarray]]  # Matrices by rule and kernel.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectraOptions:
    """The updates that optimizers make of the same gradients."""

    at: tuple[int, int] = (20, 200)
    """An early and a late step; the training ends at the late one."""
    model: str = "tiny"
    """As in pretrain."""
    data: str = "stdlib"
    """As in pretrain."""
    folder: Path = Path("docs/figures")
    """Where spectra-light.svg and spectra-dark.svg go."""

    def __post_init__(self) -> None:
        if not 1 <= self.at[0] < self.at[1]:
            raise UsageError(
                f"--at {self.at[0]} {self.at[1]} is out of order; give an early and a "
                "late step, from 1 on"
            )


# The training.


class RecordedState(NamedTuple):
    """State of `recorded`."""

    training: optax.OptState  # The state of the optimizer that trains.
    gradients: Any  # The last gradients of the kernels that are looked at.


def watched_part(tree: Any) -> Any:
    """Returns the kernels that are looked at, at the paths that they have in a model.

    APOLLO's projections depend on the path, so they are those of an ordinary training.
    """
    layers: dict[str, Any] = {}
    for module, name in WATCHED:
        layers.setdefault(module, {})[name] = tree["layers"][module][name]
    return {"layers": layers}


def recorded(training: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `training` with the gradients that it was given in its state."""

    def init(params: optax.Params) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, watched_part(params))
        return RecordedState(training.init(params), zeros)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        gradients = watched_part(updates)
        updates, trained = training.update(updates, state.training, params)
        return updates, RecordedState(trained, gradients)

    return optax.GradientTransformation(init, update)


class Follower:
    """An optimizer that is given the gradients of a training that it does not change.

    Args:
        scaler: the optimizer, without a learning rate.
        part: the parameters whose gradients it gets.
    """

    def __init__(self, scaler: optax.GradientTransformation, part: Any) -> None:
        self._update = jax.jit(scaler.update)
        self._state = jax.jit(scaler.init)(part)

    def follow(self, gradients: Any, part: Any) -> Any:
        """Returns the updates of one step."""
        updates, self._state = self._update(gradients, self._state, part)
        return updates


def run_of(options: SpectraOptions, rule: Rule) -> RunOptions:
    """Returns a rule's options with its default rates; nothing is written."""
    run = RunOptions(
        out=Path(tempfile.gettempdir()),
        model=options.model,
        data=options.data,
        optimizer=rule.optimizer,
        steps=options.at[1],
        **rule.options,
    )
    return with_defaults(run, model_config(run))


def scaler_of(options: SpectraOptions, rule: Rule) -> optax.GradientTransformation:
    """Returns a rule as the trainer has it, without a learning rate."""
    run = run_of(options, rule)
    return RECIPES[rule.optimizer].scaler(run, model_config(run))


def matrices(updates: Any) -> dict[str, np.ndarray]:
    """Returns the updates of the first and the last layer, (in, out), in float64."""
    found = {}
    for module, name in WATCHED:
        stack = np.asarray(updates["layers"][module][name]["kernel"], np.float64)
        for index in (0, len(stack) - 1):
            found[f"{name}, layer {index + 1}"] = stack[index]
    return found


class Observed(NamedTuple):
    """The measurements of a training."""

    updates: dict[int, Updates]  # The keys are the early and the late step.
    # The keys are rules, and the values the RMS of their updates, (steps, kernels). The
    # first row is of the early step.
    sizes: dict[str, np.ndarray]


def observe(options: SpectraOptions) -> Observed:
    """Trains with AdamW and returns the rules' updates from its gradients."""
    run = run_of(options, Rule("adamw"))
    config = model_config(run)
    _, text = load_text(run, config, make_mesh(run.mesh))
    tx = recorded(make_optimizer(run, config)[0])
    execution = execution_of(run, config)
    train_step = make_train_step(graphdef_of(config, execution), tx)
    # The parameters are not put on a mesh. The followers' first states are on none,
    # so the second step would be compiled again.
    params = init_params(config, execution, seed=run.seed)
    followers = {
        name: Follower(scaler_of(options, rule), watched_part(params))
        for name, rule in RULES.items()
    }
    state = TrainState(params, jax.jit(tx.init)(params))
    seen: dict[int, Updates] = {}
    sizes: dict[str, list[list[float]]] = {name: [] for name in RULES}
    for step in tqdm(range(1, options.at[1] + 1), unit="step"):
        state, _ = train_step(state, Batch(next(text.batches)), np.int32(step))
        assert isinstance(state.opt_state, RecordedState)
        gradients, part = state.opt_state.gradients, watched_part(state.params)
        updates = {
            name: matrices(follower.follow(gradients, part))
            for name, follower in followers.items()
        }
        if step in options.at:
            seen[step] = updates
        if step >= options.at[0]:
            for name, kernels in updates.items():
                sizes[name].append([rms(kernel) for kernel in kernels.values()])
    return Observed(seen, {name: np.array(rows) for name, rows in sizes.items()})


# The arithmetic.


def rms(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(matrix))))


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Returns the singular values, the largest first."""
    return np.linalg.svd(matrix, compute_uv=False)


def over_flat(matrix: np.ndarray) -> np.ndarray:
    """Returns the singular values over those of a flat spectrum of the same norm."""
    flat = np.linalg.norm(matrix) / np.sqrt(min(matrix.shape))
    return singular_values(matrix) / flat


def largest_over_median(values: np.ndarray) -> float:
    return float(np.max(values) / np.median(values))


def geometric_mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(values))))


class Shape(NamedTuple):
    """Numbers of an update that do not change if it is multiplied by a constant."""

    largest_over_flat: float
    largest_over_median: float
    rows: float  # The largest norm of a row over the median.
    columns: float


def shape_of(update: np.ndarray) -> Shape:
    return Shape(
        over_flat(update)[0],
        largest_over_median(singular_values(update)),
        largest_over_median(np.linalg.norm(update, axis=1)),
        largest_over_median(np.linalg.norm(update, axis=0)),
    )


# Tables and figure.

SPECTRUM_HEAD = (
    "update of",
    "largest / flat",
    "largest / median",
    "rows",
    "columns",
    "lr",
    "lr x RMS",
    "lr x largest",
)


def spectrum_table(options: SpectraOptions, updates: Updates) -> str:
    """Returns a row per rule, with geometric means over the kernels."""

    def row(name: str) -> list[str]:
        kernels = list(updates[name].values())
        shapes = np.array([shape_of(kernel) for kernel in kernels])
        lr = run_of(options, RULES[name]).lr
        assert lr is not None
        size = lr * geometric_mean([rms(kernel) for kernel in kernels])
        largest = lr * geometric_mean([singular_values(each)[0] for each in kernels])
        means = [f"{geometric_mean(column):.2f}" for column in shapes.T]
        return [name, *means, f"{lr:g}", f"{size:.1e}", f"{largest:.3f}"]

    return report.markdown(SPECTRUM_HEAD, map(row, SPECTRUM_RULES), 1)


SIZE_HEAD = ("APOLLO-Mini with", "RMS", "over no limit", "change per step")


def size_table(sizes: Mapping[str, np.ndarray]) -> str:
    """Returns a row per variant of APOLLO-Mini.

    The columns are the geometric mean of the RMS over steps and kernels, its ratio to
    that of the same rank without a limit, and how much the RMS changes in a step, which
    is the standard deviation of the difference of its logarithm.
    """

    def row(name: str) -> list[str]:
        rank, _, _ = name.partition(",")
        mean = geometric_mean(sizes[name])
        over_free = mean / geometric_mean(sizes[f"{rank}, no limit"])
        changes = np.diff(np.log(sizes[name]), axis=0)
        return [name, f"{mean:.3f}", f"{over_free:.2f}", f"{np.std(changes):.3f}"]

    return report.markdown(SIZE_HEAD, map(row, SIZE_RULES), 1)


def draw_kernel(axes: Axes, updates: Updates, kernel: str, mode: str) -> None:
    index = list(INK).index(mode)
    for name in SPECTRUM_RULES:
        values = over_flat(updates[name][kernel])
        # All points would be most of the file. The line is smooth after the first ones.
        shown = np.unique([*range(8), *range(8, len(values), 4), len(values) - 1])
        shown = shown[shown < len(values)]
        axes.semilogy(
            shown + 1,
            values[shown],
            color=COLORS[name][index],
            # APOLLO-Mini, which has the gradient's spectrum, is drawn over it.
            lw=3.5 if name == GRADIENT else 1.2,
            label=name,
        )
    axes.set_ylim(0.02, 12)
    axes.tick_params(which="both", colors=INK[mode], labelsize="small")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK[mode])


def draw(updates: dict[int, Updates], mode: str, file: Path) -> None:
    """Draws a row of panels per step and a panel per kernel."""
    ink = INK[mode]
    kernels = list(next(iter(updates[min(updates)].values())))
    figure = Figure(figsize=(9, 5), layout="constrained")
    grid = figure.subplots(
        len(updates), len(kernels), sharex=True, sharey=True, squeeze=False
    )
    for row, (step, seen) in zip(grid, updates.items(), strict=True):
        for axes, kernel in zip(row, kernels, strict=True):
            draw_kernel(axes, seen, kernel, mode)
            axes.set_title(f"{kernel}, step {step}", color=ink, fontsize="small")
    figure.supxlabel("singular values, largest first", color=ink, fontsize="medium")
    figure.supylabel("over that of a flat spectrum", color=ink, fontsize="medium")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
        labelcolor=ink,
        fontsize="small",
    )
    # Without a date and random names, the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "spectra"}):
        figure.savefig(file, transparent=True, metadata={"Date": None})


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(SpectraOptions, args, "python -m benchmarks.spectra")
        RECIPES.update(VARIANTS)
        observed = observe(options)
        options.folder.mkdir(parents=True, exist_ok=True)
        for mode in INK:
            file = options.folder / f"spectra-{mode}.svg"
            draw(observed.updates, mode, file)
        print(
            f"{options.model}, AdamW's gradients of 1,024 tokens; "
            f"{report.made_with(('jax', 'flax', 'optax'))}"
        )
        for step, updates in observed.updates.items():
            print(f"\nstep {step}\n\n{spectrum_table(options, updates)}")
        early, late = options.at
        print(f"\nsteps {early} to {late}\n\n{size_table(observed.sizes)}")
        print(f"\nspectra-light.svg and spectra-dark.svg are in {options.folder}")

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
