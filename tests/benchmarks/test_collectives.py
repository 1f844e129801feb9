"""The benchmark of collectives, on a model that compiles within seconds."""

import pytest

from benchmarks import collectives as benchmark
from benchmarks.hlo import Collective, collectives
from examples.llama.run.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[32,1024]) -> f32[32,128] {
  %all-reduce.3 = f32[32,1024]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[32,256]{1,0} dynamic-slice(%all-reduce.3, %zero, %offset), dynamic_slice_sizes={32,256}
}

%body (state: (s32[], bf16[16])) -> (s32[], bf16[16]) {
  %part.1 = bf16[2]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %pair = (f32[4]{0}, f32[16]{0}, u32[], u32[]) all-gather-start(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = f32[16]{0} all-gather-done(%pair)
}

%nothing (x: f32[8]) -> f32[8] {
  ROOT %same = f32[8]{0} copy(%x)
}

%refresh (x: f32[8]) -> f32[8] {
  ROOT %moved = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main_spmd (p: f32[32,1024]) -> f32[] {
  %fusion = f32[32,256]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %both = (f32[], f32[1024]{0}) all-reduce(%a, %b), replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y':(2)2}, use_global_device_ids=true, to_apply=%add
  %loop = (s32[], bf16[16]) while(%start), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %chosen = f32[8]{0} conditional(%is_refresh, %x, %x), branch_computations={%nothing, %refresh}
}
"""


def test_reads_every_form_of_collective():
    always = [
        Collective("reduce-scatter", "f32", (32, 1024), 4),
        Collective("all-reduce", "f32", (), 2),
        Collective("all-reduce", "f32", (1024,), 2),
        Collective("reduce-scatter", "bf16", (8,), 4, times=3),
        Collective("all-gather", "f32", (16,), 4, times=3),
    ]
    assert collectives(PROGRAM) == always
    moved = Collective("collective-permute", "f32", (8,), 2)
    assert collectives(PROGRAM, rare=True) == [*always, moved]
    sent = [
        3 / 4 * 4 * 32 * 1024,
        4,
        4 * 1024,
        3 * 3 / 4 * 2 * 8,
        3 * 3 / 4 * 4 * 16,
        4 * 8,
    ]
    assert [each.sent_bytes for each in [*always, moved]] == sent
    trip_count = 'backend_config={"known_trip_count":{"n":"3"}}'
    unknown = collectives(PROGRAM.replace(trip_count, "metadata={}"))
    assert sum(each.sent_bytes for each in unknown) == float("inf")


def test_rejects_unknown_replica_groups():
    with pytest.raises(ValueError, match="replica groups in an unknown form"):
        collectives(
            PROGRAM.replace("replica_groups=[2,4]<=[8]", "replica_groups=(2,4)")
        )


def table_rows(text):
    """The cells of each row of a Markdown table."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


@pytest.mark.slow
def test_table_has_bytes_sent_and_of_state_per_device(capsys):
    sizes = [
        "--target",
        "cpu",
        "--models",
        "tiny",
        "--devices",
        "2",
        "8",
        "--rank",
        "8",
    ]
    benchmark.main([*sizes, "--optimizers", "adamw", "apollo-mini"])
    rows = table_rows(capsys.readouterr().out)
    assert rows[0] == ["optimizer", "sent, 2", "sent, 8", "state, 2", "state, 8"]
    numbers = {row[0]: [float(cell) for cell in row[1:]] for row in rows[2:]}
    assert list(numbers) == ["adamw", "apollo-mini"]
    assert numbers["adamw"][:2] == [0, 0]
    for sent_by_2, sent_by_8, state_by_2, state_by_8 in numbers.values():
        # The model's size is constant, so each of k devices sends (k - 1) / k of it.
        assert sent_by_8 <= 2 * sent_by_2
        assert state_by_8 < state_by_2 / 3
    # APOLLO-Mini sends norms only.
    assert 0 < numbers["apollo-mini"][0] < 0.001


@pytest.mark.parametrize("optimizer", ["galore", "apollo-svd"])
def test_stand_in_for_the_svd_sends_as_much(optimizer, monkeypatch):
    run = benchmark.run_of(benchmark.Options(rank=8), "tiny", optimizer, 8)
    with_svd = benchmark.compiled_cost(run, "cpu")
    monkeypatch.setattr(benchmark, "compiles_svds", lambda target: False)
    assert benchmark.compiled_cost(run, "cpu") == with_svd
    assert with_svd.sent_at_refresh > with_svd.sent


@pytest.mark.slow
def test_contracted_axis_sharded_sends_vectors(capsys):
    sizes = ["--target", "cpu", "--models", "tiny", "--devices", "8"]
    optimizers = ["--optimizers", "apollo-mini"]
    benchmark.main([*sizes, *optimizers, "--sharding", "contracted"])
    rows = {row[0]: row[1:] for row in table_rows(capsys.readouterr().out)}
    channels = 4 * (4 * 128 + 3 * 344)
    # An all-reduce of one float32 per channel.
    expected = 2 * 7 / 8 * channels * 4 / 1e6
    assert float(rows["apollo-mini"][0]) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ("--models 8b", "8b"),
        ("--optimizers shampoo", "shampoo"),
        ("--devices 12", "12"),
        ("--devices", "--devices is empty"),
        ("--models", "--models is empty"),
        ("--optimizers", "--optimizers is empty"),
        ("--target v9", "v9"),
        ("--sharding channel", "channel"),
        ("--jobs 0", "0"),
    ],
)
def test_rejects_options(args, match):
    with pytest.raises(UsageError, match=match):
        benchmark.parse(benchmark.Options, args.split(), "collectives")
