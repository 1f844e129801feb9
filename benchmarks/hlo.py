"""The bytes that a compiled program sends between devices, from the text of its HLO.

Collectives are found in loops, conditionals, fusions and asynchronous pairs alike.
Bytes are counted for the algorithms that send the fewest. With k devices in a group,
and B bytes in the full array that is reduced, gathered or exchanged, each device sends

    all-reduce                                2 (k - 1) / k B
    reduce-scatter, all-gather, all-to-all      (k - 1) / k B
    collective-permute, collective-broadcast                B
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%\S+ = (.+?) ([a-z][a-z0-9-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLERS = ("fusion", "call", "async-start")  # Others call functions of scalars.
_NO_KERNELS = frozenset(
    (
        *(
            "parameter",
            "constant",
            "tuple",
            "get-tuple-element",
            "bitcast",
            "after-all",
        ),
        *(
            "copy-done",
            "fusion-done",
            "async-done",
            "partition-id",
            "replica-id",
            "opt-barrier",
        ),
    )
)
_CALLED = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation)=%([^\s,)]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a partitioned program's devices reduce, gather or exchange."""

    kind: str  # One of KINDS.
    dtype: str  # Its name in HLO, such as "bf16".
    # The shape of the full array that is reduced, gathered or exchanged.
    shape: tuple[int, ...]
    group_size: int  # How many devices take part together.
    # How often it runs. It is infinite in a loop of a length unknown to XLA.
    times: float = 1

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in all `times`, by the module's docstring."""
        share = (self.group_size - 1) / self.group_size
        factors = {
            "all-reduce": 2 * share,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }
        if not (factor := factors.get(self.kind, share)):
            return 0.0
        return self.times * factor * self.size * _bits(self.dtype) / 8


def collectives(program: str, *, rare: bool = False) -> list[Collective]:
    """Returns the collectives of a compiled program; combined ones count separately.

    Args:
      program: of ``compiled.as_text()``.
      rare: whether to follow the branch of a conditional that sends the most, rather
        than the least. Rare steps, such as those that refresh projections, send more.

    Raises:
      ValueError: for replica groups in an unknown form.
    """
    return list(_Program(program, rare).collectives())


def launches(program: str) -> float:
    """Returns how many kernels a step of a compiled program launches on a GPU.

    Copies and calls of libraries count as kernels. A loop counts as often as it runs,
    and a conditional counts its branch with the most kernels.
    """
    return _Program(program, rare=True).launches()


def drawn_words(program: str) -> int:
    """Returns the size of the largest array of 32-bit words, which are random bits."""
    return max(
        (math.prod(shape) for dtype, shape in _arrays(program) if dtype == "u32"),
        default=0,
    )


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    found = _ARRAY.findall(text)
    return [
        (dtype, tuple(map(int, sizes.split(","))) if sizes else ())
        for dtype, sizes in found
    ]


def _bits(dtype: str) -> int:
    """The bits of an element of a dtype such as bf16, s4 or f8e4m3fn; pred takes 8."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 8


class _Program:
    def __init__(self, text: str, rare: bool) -> None:
        self._rare = rare
        # Each instruction is a result, an opcode and the rest of its line.
        self._computations: dict[str, list[tuple[str, str, str]]] = {}
        self._entry = name = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                name = found[2]
                self._computations[name] = []
                self._entry = name if found[1] else self._entry
            elif name and (found := _INSTRUCTION.match(line)):
                self._computations[name].append((found[1], found[2], found[3]))

    def collectives(self, name: str = "") -> Iterator[Collective]:
        """Yields the collectives of the computation `name`, by default of the entry."""
        name = name or self._entry
        for result, opcode, rest in self._computations[name]:
            if opcode.removesuffix("-start") in KINDS:
                found = _collectives(result, opcode, rest)
                # On TPUs, each device keeps only its shard of this all-reduce.
                # It sends no more than a reduce-scatter.
                kept = opcode == "all-reduce" and name.startswith("all-reduce-scatter")
                yield from (
                    dataclasses.replace(each, kind="reduce-scatter") if kept else each
                    for each in found
                )
            elif opcode == "while":
                yield from self._loop(rest)
            elif opcode == "conditional":
                yield from self._conditional(rest)
            elif opcode in _CALLERS:
                for called in _CALLED.findall(rest):
                    yield from self.collectives(called)

    def launches(self, name: str = "") -> float:
        """The kernels of the computation `name`, by default of the whole program."""
        total = 0.0
        for _, opcode, rest in self._computations[name or self._entry]:
            if opcode == "while":
                (body,), count = (
                    re.findall(r"body=%([^\s,)]+)", rest),
                    _TRIP_COUNT.search(rest),
                )
                total += self.launches(body) * (int(count[1]) if count else math.inf)
            elif opcode == "conditional":
                total += max(map(self.launches, self._branches(rest)))
            elif opcode in ("call", "async-start"):
                total += sum(map(self.launches, _CALLED.findall(rest)))
            elif opcode not in _NO_KERNELS:
                total += 1
        return total

    def _branches(self, rest: str) -> list[str]:
        listed = _BRANCHES.findall(rest)
        names = [name for names in listed for name in re.findall(r"%([^\s,]+)", names)]
        return names or _CALLED.findall(rest)

    def _loop(self, rest: str) -> Iterator[Collective]:
        (body,), count = re.findall(r"body=%([^\s,)]+)", rest), _TRIP_COUNT.search(rest)
        for collective in self.collectives(body):
            times = collective.times * (int(count[1]) if count else math.inf)
            yield dataclasses.replace(collective, times=times)

    def _conditional(self, rest: str) -> Iterator[Collective]:
        branches = [list(self.collectives(name)) for name in self._branches(rest)]
        choose = max if self._rare else min
        yield from choose(
            branches, key=lambda branch: sum(each.sent_bytes for each in branch)
        )


def _collectives(result: str, opcode: str, rest: str) -> list[Collective]:
    """Returns the collectives of one instruction, which may combine several."""
    arrays, group_size = _arrays(result), _group_size(rest)
    if opcode in ("all-gather-start", "collective-permute-start"):
        # The result is a tuple of the operands, the results, and scalars that connect
        # the end of the pair to its start.
        arrays = [array for array in arrays if array != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    if opcode == "reduce-scatter":  # Its result is a shard of the full array.
        (axis,) = map(int, re.findall(r"dimensions=\{(\d+)\}", rest))
        arrays = [
            (dtype, (*shape[:axis], shape[axis] * group_size, *shape[axis + 1 :]))
            for dtype, shape in arrays
        ]
    kind = opcode.removesuffix("-start")
    return [Collective(kind, dtype, shape, group_size) for dtype, shape in arrays]


def _group_size(rest: str) -> int:
    """The number of devices in a replica group, in any of the forms of HLO."""
    if "source_target_pairs=" in rest:
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    if by_mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}, ", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_mesh[1]))
        # An axis may be split, as in 'x':(2)4: its part of size 4 after one of size 2.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", by_mesh[2])
        return math.prod(int(size or sizes[axis]) for axis, size in parts)
    raise ValueError(f"replica groups in an unknown form: {rest[:200]}")
