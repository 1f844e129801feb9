"""The bytes that a compiled program sends and moves, from the text of its HLO.

Collectives are found in loops, conditionals, fusions and asynchronous pairs alike.
Bytes are counted for the algorithms that send the fewest. With k devices in a group,
and B bytes in the full array that is reduced, gathered or exchanged, each device sends

    all-reduce                                2 (k - 1) / k B
    reduce-scatter, all-gather, all-to-all      (k - 1) / k B
    collective-permute, collective-broadcast                B

`moved_bytes` counts what the kernels of one device read from its main memory and write
to it. Operands in a faster memory, such as a TPU's VMEM, cost nothing there; the copy
that brought them does.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

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
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_ARRAY_AND_LAYOUT = re.compile(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?")
# The main memory is space 0, which layouts leave out.
_OTHER_MEMORY = re.compile(r"S\([1-9]\d*\)")
_SLICES = ("dynamic-slice", "slice", "gather")
# Other opcodes call only functions of scalars, such as the sum of a reduction.
_CALLERS = ("fusion", "call", "async-start")
_NO_KERNELS = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "copy-done",
        "fusion-done",
        "async-done",
        "partition-id",
        "replica-id",
        "opt-barrier",
    )
)
_CALLED = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation)=%([^\s,)]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"(\d+)\)")


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


def moved_bytes(program: str) -> float:
    """Returns the bytes that a compiled program moves between kernels and main memory.

    A kernel reads each operand once, or the slices of it that it uses, and writes its
    results, or the slices that it updates. A loop counts as often as it runs, and a
    conditional counts its branch that moves the most.
    """
    return _Program(program, rare=True).moved_bytes()


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


def _main_bytes(result: str) -> float:
    """Returns the size of the arrays of a result that are in the main memory."""
    return sum(
        _bytes(array)
        for array in _ARRAY_AND_LAYOUT.findall(result)
        if not _OTHER_MEMORY.search(array)
    )


def _bytes(result: str) -> float:
    """Returns the size of the arrays of a result, in whatever memory."""
    return sum(
        math.prod(shape) * _bits(dtype) / 8
        for dtype, shape in _arrays(result)
        if dtype != "token"
    )


class _Instruction(NamedTuple):
    result: str  # Its type, with the layout.
    opcode: str
    rest: str  # The line after the opcode's bracket.
    is_root: bool

    def operands(self) -> list[str]:
        """Returns the names of the operands."""
        depth = 1
        for index, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return re.findall(r"%([^\s,()]+)", self.rest[:index])
        raise ValueError(f"operands without an end: {self.rest[:200]}")

    def called(self) -> str:
        """Returns the name of the computation that a fusion calls."""
        (name,) = re.findall(r"calls=%([^\s,)]+)", self.rest)
        return name

    def is_free(self) -> bool:
        """Whether it only gives arrays another name, or waits for them."""
        return (
            self.opcode in _NO_KERNELS
            or self.opcode.endswith("-done")
            # It makes one array of neighbouring slices in a TPU's VMEM.
            or 'custom_call_target="ConcatBitcast"' in self.rest
        )

    def transferred(self) -> list[str]:
        """Returns the arrays of an asynchronous copy: both ends, without its flag."""
        return [
            array
            for array in _ARRAY_AND_LAYOUT.findall(self.result)
            if not re.match(r"[us]32\[\]", array)
        ]


class _Program:
    def __init__(self, text: str, rare: bool) -> None:
        self._rare = rare
        # The computations by name, and in each the instructions by name.
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._entry = name = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                name = found[2]
                self._computations[name] = {}
                self._entry = name if found[1] else self._entry
            elif name and (found := _INSTRUCTION.match(line)):
                self._computations[name][found[2]] = _Instruction(
                    found[3], found[4], found[5], is_root=bool(found[1])
                )

    def collectives(self, name: str = "") -> Iterator[Collective]:
        """Yields the collectives of the computation `name`, by default of the entry."""
        name = name or self._entry
        for result, opcode, rest, _ in self._computations[name].values():
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
        for _, opcode, rest, _ in self._computations[name or self._entry].values():
            if opcode == "while":
                body, times = self._body(rest)
                total += times * self.launches(body)
            elif opcode == "conditional":
                total += max(map(self.launches, self._branches(rest)))
            elif opcode in ("call", "async-start"):
                total += sum(map(self.launches, _CALLED.findall(rest)))
            elif opcode not in _NO_KERNELS:
                total += 1
        return total

    def moved_bytes(self, name: str = "") -> float:
        """The bytes that the computation `name` moves, by default the whole program."""
        computation = self._computations[name or self._entry]
        total = 0.0
        for instruction in computation.values():
            _, opcode, rest, _ = instruction
            if opcode == "while":
                body, times = self._body(rest)
                total += times * self.moved_bytes(body)
            elif opcode == "conditional":
                total += max(map(self.moved_bytes, self._branches(rest)))
            elif opcode in ("call", "async-start"):
                total += sum(map(self.moved_bytes, _CALLED.findall(rest)))
            elif not instruction.is_free():
                total += self._read(computation, instruction)
                total += self._written(computation, instruction, instruction.result)
        return total

    def _read(
        self, computation: dict[str, _Instruction], instruction: _Instruction
    ) -> float:
        operands = instruction.operands()
        sizes = {name: _main_bytes(computation[name].result) for name in operands}
        if instruction.opcode in ("copy-start", "slice-start"):
            # A result is the array at the destination, beside one at the source.
            (copied, *_) = sorted(map(_bytes, instruction.transferred()))
            return min(copied, sizes[operands[0]])
        if instruction.opcode in _SLICES:
            return min(_bytes(instruction.result), sizes[operands[0]])
        if instruction.opcode == "dynamic-update-slice":
            return sizes[operands[1]]
        if instruction.opcode != "fusion":
            return sum(sizes.values())
        return sum(
            min(
                size,
                sum(
                    self._read_of_parameter(instruction.called(), index, size)
                    for index, operand in enumerate(operands)
                    if operand == name
                ),
            )
            for name, size in sizes.items()
            if size
        )

    def _read_of_parameter(self, name: str, index: int, size: float) -> float:
        """Returns the bytes of a parameter that a fused computation reads.

        Args:
            name: of the computation.
            index: of the parameter.
            size: of the whole parameter, in bytes.
        """
        computation = self._computations[name]
        aliases = [
            name
            for name, instruction in computation.items()
            if instruction.opcode == "parameter"
            and instruction.rest.startswith(f"{index})")
        ]
        total = 0.0
        # The list grows while the loop runs: a bitcast is a further name of the same.
        for alias in aliases:
            for user, instruction in computation.items():
                operands = instruction.operands() if "%" in instruction.rest else []
                if alias not in operands:
                    continue
                if instruction.opcode == "bitcast":
                    aliases.append(user)
                elif instruction.opcode in _SLICES:
                    total += _bytes(instruction.result)
                elif instruction.opcode == "fusion":
                    total += sum(
                        self._read_of_parameter(instruction.called(), position, size)
                        for position, operand in enumerate(operands)
                        if operand == alias
                    )
                # A dynamic-update-slice does not read the part of its first operand
                # that it keeps.
                elif not (
                    instruction.opcode == "dynamic-update-slice"
                    and operands.index(alias) == 0
                ):
                    return size
        return min(total, size)

    def _written(
        self,
        computation: dict[str, _Instruction],
        instruction: _Instruction,
        result: str,
    ) -> float:
        """Returns the bytes that an instruction writes to a result's memory."""
        if instruction.opcode in ("copy-start", "slice-start"):
            first, *_, last = instruction.transferred()
            return _main_bytes(first if instruction.opcode == "copy-start" else last)
        if not _main_bytes(result):
            return 0.0
        if instruction.opcode == "bitcast":
            (operand,) = instruction.operands()
            return self._written(computation, computation[operand], result)
        if instruction.opcode == "dynamic-update-slice":
            return _bytes(computation[instruction.operands()[1]].result)
        if instruction.opcode != "fusion":
            return _main_bytes(result)
        called = self._computations[instruction.called()]
        (root,) = (each for each in called.values() if each.is_root)
        if root.opcode != "tuple":
            return self._written(called, root, result)
        return sum(
            self._written(called, called[name], part)
            for name, part in zip(
                root.operands(), _ARRAY_AND_LAYOUT.findall(result), strict=True
            )
        )

    def _body(self, rest: str) -> tuple[str, float]:
        """Returns the body of a loop, and how often it runs."""
        (body,) = re.findall(r"body=%([^\s,)]+)", rest)
        if count := _TRIP_COUNT.search(rest):
            return body, int(count[1])
        # The TPU compiler does not say. JAX's loops count from 0 to a constant.
        condition = re.search(r"condition=%([^\s,)]+)", rest)
        computation = self._computations.get(condition[1], {}) if condition else {}
        constants = [
            int(found[1])
            for each in computation.values()
            if each.opcode == "constant" and (found := _CONSTANT.match(each.rest))
        ]
        less = any("direction=LT" in each.rest for each in computation.values())
        return body, constants[0] if less and len(constants) == 1 else math.inf

    def _branches(self, rest: str) -> list[str]:
        listed = _BRANCHES.findall(rest)
        names = [name for names in listed for name in re.findall(r"%([^\s,]+)", names)]
        return names or _CALLED.findall(rest)

    def _loop(self, rest: str) -> Iterator[Collective]:
        body, times = self._body(rest)
        for collective in self.collectives(body):
            yield dataclasses.replace(collective, times=times * collective.times)

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
