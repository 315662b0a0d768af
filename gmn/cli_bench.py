"""The commands of `gmn bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gmn.cli_options import AllowCodeOption, BuilderOption, ClassesOption, InputOption, numbers, words

DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]

bench_app = typer.Typer(no_args_is_help=True, help="Measure gmn here: conversions, time, memory, many tasks.")
BENCH = "Example:  gmn bench convert --suite timm --only swin   (results are kept: call it again to go on)"


@bench_app.command("convert", epilog=BENCH)
def bench_convert(
    suite: Annotated[str, typer.Option("--suite", help="torchvision, torchvision-video, timm or extra.")],
    out: Annotated[Path | None, typer.Option("--out", help="Default: bench/convert-SUITE.jsonl")] = None,
    limit_seconds: Annotated[float, typer.Option("--limit-seconds", help="Time for one network.")] = 300.0,
    only: Annotated[str | None, typer.Option("--only", metavar="REGEX", help="Only networks with such a name.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Networks at a time.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try anew what failed before.")] = False,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the suite's section of a page.")] = None,
) -> None:
    """Convert every network of a suite to a graph and back; exit code 1 if one fails."""
    from gmn import bench

    limits = bench.Limits(limit_seconds, jobs)
    if not bench.bench(suite, out, limits, only=only, retry=retry_failed, page=markdown):
        raise typer.Exit(1)


@bench_app.command("vote", epilog="Example:  gmn bench vote --tasks 1000 --neighbours 10")
def bench_vote(
    network: Annotated[str, typer.Option("--network", help="cifar.resnet20, torchvision.X, timm.X, ...")] = (
        "cifar.resnet20"
    ),
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="Size of the zoo.")] = 1000,
    neighbours: Annotated[int, typer.Option("--neighbours", min=1, help="How many vote.")] = 10,
) -> None:
    """Time the vote itself on synthetic masks: search by prototypes, draw, averages. For LEEP see bench scaling."""
    from gmn import bench_vote as bench

    bench.show(bench.vote_cost(network, tasks, neighbours))


LATENCY = "Examples:  gmn bench latency runs/quickstart --threads 1,2   |   gmn bench latency BASE PRUNED --batch 1,32"


@bench_app.command("latency", epilog=LATENCY)
def bench_latency(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="As of gmn export, the first is the base; a run: its base and rows."),
    ],
    batch: Annotated[str, typer.Option("--batch", help="Samples per batch.")] = "1,32",
    threads: Annotated[str | None, typer.Option("--threads", help="Of the CPU. Default: torch's choice.")] = None,
    device: DeviceOption = "auto",
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Passes of each, after two to warm up.")] = 30,
    size: InputOption = None,
    classes: ClassesOption = None,
    options: BuilderOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON.")] = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Time networks side by side: speed-up in FLOPs against speed-up in time on this device."""
    from gmn import bench_latency as bench
    from gmn import subject

    choices = subject.Choices(size, classes, None, options or ())
    counts = numbers("--batch", batch), numbers("--threads", threads)
    bench.run(models, choices, *counts, device=device, rounds=rounds, output=output)


METANETWORK = (
    "Example:  gmn bench metanetwork --graphs resnet56 --threads 1,2   (pyg alone takes gigabytes and minutes)"
)


@bench_app.command("metanetwork", epilog=METANETWORK)
def bench_metanetwork(
    graphs: Annotated[str, typer.Option("--graphs", help="Of resnet20, resnet56, vgg19, resnet50, vit_b_16.")] = (
        "resnet20,resnet56"
    ),
    backends: Annotated[str, typer.Option("--backends", help="Of blocks, compiled, bf16, pyg.")] = "blocks,pyg",
    threads: Annotated[str, typer.Option("--threads", help="Threads of each process.")] = "1",
    passes: Annotated[str, typer.Option("--passes", help="forward, or backward too.")] = "backward",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Passes of each, after one to warm up.")] = 7,
    chunk_mb: Annotated[float | None, typer.Option("--chunk-mb", help="max_chunk_mb of the blocks backend.")] = None,
    device: DeviceOption = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON.")] = None,
) -> None:
    """Time a pass through a metanetwork and its peak memory, the backends taking turns."""
    from gmn import bench_metanetwork as bench

    cases = bench.Cases(words(graphs), words(backends), numbers("--threads", threads), words(passes), device)
    bench.show(bench.bench(cases, rounds=rounds, chunk_mb=chunk_mb), output)


METASTEP = "Examples:  gmn bench metastep --ways gmn,bf16   |   gmn bench metastep --network vit_b_16   (inside 8 GB)"


@bench_app.command("metastep", epilog=METASTEP)
def bench_metastep(
    network: Annotated[str, typer.Option("--network", help="One of the graphs of bench metanetwork.")] = "resnet20",
    images: Annotated[int | None, typer.Option("--images", min=1, help="The big batch; default: by network.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a mini-batch.")] = 250,
    ways: Annotated[str | None, typer.Option("--ways", help="Of gmn, channels_last, bf16, published.")] = None,
    threads: Annotated[str, typer.Option("--threads", help="Threads of each process.")] = "1",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Steps of each, after one to warm up.")] = 7,
    device: DeviceOption = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON.")] = None,
) -> None:
    """Time one step of meta-training by its parts, and its peak memory, the ways taking turns."""
    from gmn import bench_metastep as bench

    chosen = None if ways is None else words(ways)
    sizes = {"images": images, "batch_size": batch_size, "rounds": rounds}
    bench.show(bench.bench(network, chosen, numbers("--threads", threads), **sizes, device=device), output)


SCALING = (
    "Examples:  gmn bench scaling --processes 1,2   |   gmn bench scaling --processes 1 --tasks 100,1000 -o s.json"
)


@bench_app.command("scaling", epilog=SCALING)
def bench_scaling(
    network: Annotated[str, typer.Option("--network", help="One of the graphs of bench metanetwork.")] = "resnet20",
    processes: Annotated[str, typer.Option("--processes", help="That share a step of meta-training.")] = "1,2",
    images: Annotated[int | None, typer.Option("--images", min=1, help="The big batch; default: by network.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Steps of each, after one to warm up.")] = 3,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Sizes of zoos to build and search.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON.")] = None,
) -> None:
    """Time a step of meta-training over processes, and the size and search of a zoo over tasks."""
    from gmn import bench_scaling as bench

    steps = bench.bench_step(network, numbers("--processes", processes), images=images, rounds=rounds)
    bench.show(steps, bench.bench_zoo(network, numbers("--tasks", tasks)), output)
