"""The bytes that compiled programs move, on small programs counted by hand."""

import math
import os
import subprocess
import sys

import pytest

from benchmarks.hlo import moved_bytes

# Float32 arrays of 1024 bytes, of which some are in a TPU's VMEM, which is `S(1)`.
MAIN, FAST = "f32[16,16]{1,0:T(8,128)}", "f32[16,16]{1,0:T(8,128)S(1)}"
ROW = "f32[1,16]{1,0:T(8,128)}"
SIZE, ROW_SIZE = 1024, 64

FUSED = f"""
%double (x: f32[16,16]) -> f32[16,16] {{
  %x = {MAIN} parameter(0)
  ROOT %sum = {MAIN} add(%x, %x)
}}

%row_of (x: f32[16,16], i: s32[]) -> f32[1,16] {{
  %x.1 = {MAIN} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  %same = {MAIN} bitcast(%x.1)
  ROOT %row = {ROW} dynamic-slice(%same, %i, %i), dynamic_slice_sizes={{1,16}}
}}

%with_row (x: f32[16,16], row: f32[1,16], i: s32[]) -> f32[16,16] {{
  %x.2 = {MAIN} parameter(0)
  %row.1 = {ROW} parameter(1)
  %i.1 = s32[]{{:S(6)}} parameter(2)
  ROOT %updated = {MAIN} dynamic-update-slice(%x.2, %row.1, %i.1, %i.1)
}}
"""


def program(*instructions: str, others: str = "") -> str:
    """Returns a program that ends with the last instruction."""
    *first, last = instructions
    lines = [f"  {line}" for line in first] + [f"  ROOT {last}"]
    return "\n".join(
        [
            f"{FUSED}{others}",
            "ENTRY %main (x: f32[16,16]) -> f32[16,16] {",
            f"  %x = {MAIN} parameter(0)",
            "  %zero = s32[]{:S(6)} constant(0)",
            *lines,
            "}",
            "",
        ]
    )


def test_a_kernel_reads_each_operand_once_and_writes_its_result() -> None:
    doubled = f"%y = {MAIN} fusion(%x, %x), kind=kLoop, calls=%double"
    assert moved_bytes(program(doubled)) == 2 * SIZE


def test_a_bitcast_moves_nothing() -> None:
    assert moved_bytes(program(f"%y = {MAIN} bitcast(%x)")) == 0


def test_a_slice_reads_what_it_takes() -> None:
    taken = f"%y = {ROW} fusion(%x, %zero), kind=kLoop, calls=%row_of"
    assert moved_bytes(program(taken)) == 2 * ROW_SIZE


def test_an_update_of_a_slice_moves_the_slice() -> None:
    taken = f"%row = {ROW} fusion(%x, %zero), kind=kLoop, calls=%row_of"
    given = f"%y = {MAIN} fusion(%x, %row, %zero), kind=kLoop, calls=%with_row"
    assert moved_bytes(program(taken, given)) == 4 * ROW_SIZE


def test_the_vmem_is_read_for_nothing_after_the_copy() -> None:
    start = f"%start = ({FAST}, {MAIN}, u32[]{{:S(2)}}) copy-start(%x)"
    done = f"%done = {FAST} copy-done(%start)"
    sums = [
        f"%one = {FAST} add(%done, %done)",
        f"%two = {FAST} add(%one, %done)",
        f"%y = {MAIN} add(%two, %done)",
    ]
    assert moved_bytes(program(start, done, *sums)) == 2 * SIZE


def test_parts_that_are_copied_count_as_parts() -> None:
    half = "f32[8,16]{1,0:T(8,128)S(1)}"
    starts = [
        f"%start.{i} = (({MAIN}), {half}, s32[]{{:S(2)}}) slice-start(%x), "
        f"slice={{[{8 * i}:{8 * i + 8}], [0:16]}}"
        for i in range(2)
    ]
    done = [f"%done.{i} = {half} slice-done(%start.{i})" for i in range(2)]
    whole = (
        f"%whole = {FAST} custom-call(%done.0, %done.1), "
        'custom_call_target="ConcatBitcast"'
    )
    assert moved_bytes(program(*starts, *done, whole)) == SIZE


@pytest.mark.parametrize(
    ("known", "direction", "times"),
    [
        (', backend_config={"known_trip_count":{"n":"7"}}', "GT", 7),
        ("", "LT", 5),
        ("", "GT", math.inf),
    ],
)
def test_a_loop_counts_as_often_as_it_runs(
    known: str, direction: str, times: float
) -> None:
    state = f"(s32[]{{:S(6)}}, {MAIN})"
    loop = f"""
%condition (state: (s32[], f32[16,16])) -> pred[] {{
  %state = {state} parameter(0)
  %count = s32[]{{:S(6)}} get-tuple-element(%state), index=0
  %five = s32[]{{:S(6)}} constant(5)
  ROOT %more = pred[]{{:S(6)}} compare(%count, %five), direction={direction}
}}

%body (state: (s32[], f32[16,16])) -> (s32[], f32[16,16]) {{
  %state.1 = {state} parameter(0)
  %count.1 = s32[]{{:S(6)}} get-tuple-element(%state.1), index=0
  %array = {MAIN} get-tuple-element(%state.1), index=1
  %twice = {MAIN} fusion(%array), kind=kLoop, calls=%double
  ROOT %next = {state} tuple(%count.1, %twice)
}}
"""
    before = f"%before = {state} tuple(%zero, %x)"
    run = f"%after = {state} while(%before), condition=%condition, body=%body{known}"
    y = f"%y = {MAIN} get-tuple-element(%after), index=1"
    assert moved_bytes(program(before, run, y, others=loop)) == times * 2 * SIZE


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
def test_the_compiler_for_tpus_adds_no_passes_to_a_step(layout: str) -> None:
    """SGD, AdamW, APOLLO-Mini and RACS move at most the bytes that they must move."""
    pytest.importorskip("libtpu")
    optimizers = ("sgd", "adamw", "apollo-mini", "racs")
    command = ("-m", "benchmarks.step_traffic", "--model", "1b", "--layers", "2")
    result = subprocess.run(
        [sys.executable, *command, "--layouts", layout, "--optimizers", *optimizers],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    rows = [line.split(" | ") for line in result.stdout.splitlines() if layout in line]
    ratios = {
        name.removeprefix("| "): float(cells[-1].strip(" |")) for name, *cells in rows
    }
    # The tables draw normal entries too, which are in memory for a moment.
    assert len(ratios) == 6
    assert all(ratio <= 1.02 for ratio in ratios.values()), ratios
