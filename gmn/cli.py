"""The command line: `gmn meta-train`, `prune`, `curve`, `report`, `cost`, `inspect`, `convert`, `export`, ..."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gmn import __version__
from gmn.cli_bench import bench_app
from gmn.cli_options import (
    AddressOption,
    AllowCodeOption,
    BuilderOption,
    ClassesOption,
    CpusOption,
    EngineOption,
    GpusOption,
    InputOption,
    LayoutOption,
    ModelArgument,
    NetworkOption,
    WeightsOption,
)
from gmn.cli_zoo import zoo_app
from gmn.errors import GmnError
from gmn.exits import Stopped, verdict
from gmn.launch import SHARED, crash, fail, rank

if TYPE_CHECKING:
    from gmn.recipe import AnyRecipe


class Commands(TyperGroup):
    """The commands, with Ctrl-C passed on to `main`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make trained neural networks smaller: with graph metanetworks, and with votes of the nearest tasks.",
    epilog="Exit codes: 0 done, 1 something was found, 2 a mistake, 3 the disk, 4 out of memory, 130 Ctrl-C.",
)

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a built-in recipe.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a field: --set prune.speed_up=2")]
RunOption = Annotated[Path | None, typer.Option("--run", help="The run folder. Default: runs/NAME")]
PrunedOption = Annotated[Path | None, typer.Option("--run", help="The run folder. Default: runs/NAME-pruned")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Of everything random.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"gmn {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show which gmn this is.")
    ] = False,
) -> None:
    """Options of all commands; `main` reads --debug itself."""
    if rank() is not None and (name := context.invoked_subcommand) not in SHARED:
        hint = f"several processes share the work of {' and '.join(f'gmn {shared}' for shared in SHARED)} only"
        raise GmnError("a command for one process", got=f"gmn {name} in several", hint=hint)


def _show(settings: AnyRecipe, folder: Path, work: Callable[..., dict[str, Any]], engine: str, **ask: Any) -> None:
    """Let an engine do a recipe's work, in one process or several, and show what came out."""
    from gmn import distributed, report
    from gmn.engine import engine_named

    chosen, device = engine_named(engine, **ask), getattr(settings, "device", "auto")
    with distributed.launched(device, settings.method, engine) as team, chosen as worker:
        found = work(engine=worker)
    if team.leads:
        report.show(found, folder)


META_TRAIN = (
    "Examples:  gmn meta-train quickstart   |   gmn meta-train my.yaml --seed 1 --resume   |   gmn meta-train matrix"
    "   |   accelerate launch -m gmn meta-train my.yaml   |   gmn meta-train votes.yaml --engine ray --address auto"
)


@app.command("meta-train", epilog=META_TRAIN)
def meta_train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    seed: SeedOption = None,
    run: RunOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    engine: EngineOption = "here",
    address: AddressOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Learn a metanetwork from data models, or several, or a zoo; then prune with it and without it, and compare."""
    from gmn import pipeline  # torch takes seconds to import: not for --help
    from gmn import recipe as recipes

    settings = recipes.load_recipe(recipe, overrides or (), seed=seed)
    folder = run or Path("runs") / settings.name
    work = partial(pipeline.meta_train, settings, folder, resume=resume, overwrite=overwrite)
    _show(settings, folder, work, engine, address=address, cpus=cpus, gpus=gpus)


PRUNE = "gmn prune my.yaml --meta runs/quickstart"
WEIGHTS = f"{PRUNE} --set prune.pattern=2:4 --set prune.speed_up=null --set data_models.initial_speed_up=1"


@app.command(
    epilog=f"Examples:  {PRUNE} --set prune.speed_up=3   |   {PRUNE} --set criterion.score=taylor   |   {WEIGHTS}"
)
def prune(
    recipe: RecipeArgument,
    meta: Annotated[Path, typer.Option("--meta", help="A run folder, a saved metanetwork or a zoo.")],
    overrides: SetOption = None,
    seed: SeedOption = None,
    run: PrunedOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    engine: EngineOption = "here",
    address: AddressOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Prune the recipe's network with what was learnt in another run."""
    from gmn import pipeline
    from gmn import recipe as recipes

    settings = recipes.load_recipe(recipe, overrides or (), seed=seed)
    folder = run or Path("runs") / f"{settings.name}-pruned"
    work = partial(pipeline.prune_recipe, settings, folder, meta, resume=resume, overwrite=overwrite)
    _show(settings, folder, work, engine, address=address, cpus=cpus, gpus=gpus)


@app.command(epilog="Examples:  gmn keys prune   |   gmn keys meta_train.lr   |   gmn keys --method vote zoo")
def keys(
    section: Annotated[
        str, typer.Argument(help="Such as prune or finetune.after_prune. Default: which there are.")
    ] = "",
    method: Annotated[str, typer.Option("--method", help="metanetwork, vote or matrix.")] = "metanetwork",
) -> None:
    """List the keys of a recipe, or of a section of it: what each takes, its default and its meaning."""
    from gmn import recipe_keys

    recipe_keys.show(method, section)


@app.command(epilog="Example:  gmn report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Show the table of a finished run and draw its plots."""
    from gmn import report as reports
    from gmn.run import load_report, open_run, reading

    folder = open_run(run)
    with reading(folder):
        reports.show(load_report(folder), folder)


@app.command(epilog="Examples:  gmn cost runs/quickstart   |   gmn cost runs/quickstart --networks 1,10 -o cost.json")
def cost(
    run: Annotated[Path, typer.Argument(help="The folder of a run with a metanetwork.")],
    networks: Annotated[str, typer.Option("--networks", help="Numbers of networks to share meta-training.")] = "1,5,20",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON.")] = None,
) -> None:
    """Show minutes and peak memory of meta-training and of one pruning by each row, and what that is per network."""
    from gmn import cost_cli

    cost_cli.cost(run, networks=networks, output=output)


RunArgument = Annotated[Path, typer.Argument(help="The folder of a run that meta-trained.")]
TUNED = "Images that each network is fine-tuned on before its curve; 0: none. The paper's figures are fine-tuned."
FinetuneOption = Annotated[int, typer.Option("--finetune-images", min=0, help="Brief fine-tuning of each checkpoint.")]


@app.command(epilog="Example:  gmn curve runs/quickstart --checkpoints 0,2,5")
def curve(
    run: RunArgument,
    checkpoints: Annotated[
        str | None, typer.Option("--checkpoints", help="Epochs: 0,2,5; 0: no metanetwork. Default: 0, best, last")
    ] = None,
    points: Annotated[int, typer.Option("--points", min=2, help="Points of a curve; N:M has M of its own.")] = 12,
    images: Annotated[int, typer.Option("--images", min=1, help="At most so many validation images a point.")] = 2000,
    drop: Annotated[float, typer.Option("--drop", min=0, help="Accuracy lost at the turning point.")] = 0.02,
    finetune_images: Annotated[int, typer.Option("--finetune-images", min=0, help=TUNED)] = 0,
    allow_code: AllowCodeOption = False,
) -> None:
    """Draw accuracy against speed-up for some checkpoints of a run.

    By default nothing is fine-tuned: the networks are as the metanetwork leaves them.

    The paper's figures have them after fine-tuning too: --finetune-images, as many as finetune.after_meta reads.
    """
    from gmn import curve_cli

    size = {"points": points, "images": images, "drop": drop, "finetune_images": finetune_images}
    curve_cli.curve(run, checkpoints=checkpoints, **size)


@app.command(epilog="Example:  gmn select runs/quickstart --min-accuracy 0.97   (add --use to make it the run's)")
def select(
    run: RunArgument,
    min_accuracy: Annotated[float, typer.Option("--min-accuracy", help="Validation accuracy before pruning.")],
    finetune_images: FinetuneOption = 10_000,
    use: Annotated[bool, typer.Option("--use", help="Make it the run's metanetwork.")] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Find the last checkpoint that keeps networks accurate, by binary search; later ones make them easier to prune."""
    from gmn import curve_cli

    curve_cli.select(run, min_accuracy=min_accuracy, finetune_images=finetune_images, use=use)


INSPECT = "Examples:  gmn inspect torchvision.resnet50   |   gmn inspect timm.vit_tiny_patch16_224 --draw vit.png"
CONVERT = (
    "Examples:  gmn convert timm.resnet18 -o graph.safetensors   |   gmn convert graph.safetensors -o w.safetensors"
)


@app.command(epilog=INSPECT)
def inspect(
    model: ModelArgument,
    size: InputOption = None,
    classes: ClassesOption = None,
    layout: LayoutOption = None,
    options: BuilderOption = None,
    weights: WeightsOption = None,
    network: NetworkOption = None,
    draw: Annotated[Path | None, typer.Option("--draw", help="Draw the graph into this picture.")] = None,
    groups: Annotated[bool, typer.Option("--groups/--no-groups", help="The table of coupled channels.")] = True,
    allow_code: AllowCodeOption = False,
) -> None:
    """Show what of a network is in its graph, and which channels belong together."""
    from gmn import convert_cli, subject

    choices = subject.Choices(size, classes, layout, options or (), weights, network)
    convert_cli.inspect(model, choices, draw=draw, groups=groups)


@app.command(epilog=CONVERT)
def convert(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")],
    size: InputOption = None,
    classes: ClassesOption = None,
    layout: LayoutOption = None,
    options: BuilderOption = None,
    weights: WeightsOption = None,
    network: NetworkOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Write a network's graph to a file; or a graph file's network to a state dict."""
    from gmn import convert_cli, subject

    choices = subject.Choices(size, classes, layout, options or (), weights, network)
    convert_cli.convert(model, output, choices, overwrite=overwrite)


EXPORT = "Examples:  gmn export runs/quickstart -o out   |   gmn export MODEL -o out --format onnx --batch 1"


@app.command(epilog=EXPORT)
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run folder, the folder of a saved network, or a network's name.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write into.")],
    formats: Annotated[str, typer.Option("--format", help="Of safetensors, pt2, onnx.")] = "safetensors,pt2,onnx",
    batch: Annotated[str, typer.Option("--batch", metavar="dynamic|N", help="Samples that the files take.")] = (
        "dynamic"
    ),
    row: Annotated[str | None, typer.Option("--row", help="Of a run. Default: the best on validation images.")] = None,
    size: InputOption = None,
    classes: ClassesOption = None,
    options: BuilderOption = None,
    weights: WeightsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Write a network for other programs, each file opened again and compared: safetensors, torch.export, ONNX."""
    from gmn import export_cli, subject

    choices = subject.Choices(size, classes, None, options or (), weights)
    export_cli.export(model, output, choices, formats=formats, batch=batch, row=row, overwrite=overwrite)


@app.command(epilog="Example:  gmn join runs/graph-mask-voting   (while gmn meta-train works on it elsewhere)")
def join(
    run: Annotated[Path, typer.Argument(help="The run folder of a vote recipe.")], allow_code: AllowCodeOption = False
) -> None:
    """Share the work of a vote run that is under way: tasks of its zoo, then its comparison from the end."""
    from gmn import pipeline

    pipeline.join(run)


STUDY = "Examples:  gmn study iou runs/graph-mask-voting   |   gmn study neighbours RUN --neighbours 1,3,10"


@app.command(epilog=STUDY)
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="iou, recall, neighbours, iterations or similarity.")],
    run: Annotated[Path, typer.Argument(help="The run folder of a vote recipe.")],
    similarity: Annotated[
        str | None,
        typer.Option("--similarity", help="Default: the recipe's. Study `similarity`: also several, with commas."),
    ] = None,
    targets: Annotated[int, typer.Option("--targets", min=1, help="At most so many tasks are averaged over.")] = 12,
    neighbours: Annotated[
        str | None, typer.Option("--neighbours", help="Study `neighbours`: how many vote. Default: 1,3,5,10.")
    ] = None,
    iterations: Annotated[
        str | None, typer.Option("--iterations", help="Studies `iterations` and `similarity`: numbers of steps.")
    ] = None,
    engine: EngineOption = "here",
    address: AddressOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Study a finished vote run: what similar tasks share, and how the vote's accuracy depends on its settings."""
    from gmn import study_cli
    from gmn.engine import engine_named

    counts = {"neighbours": neighbours, "iterations": iterations}
    with engine_named(engine, address=address, cpus=cpus, gpus=gpus) as worker:
        study_cli.study(name, run, similarity=similarity, targets=targets, **counts, engine=worker)


app.add_typer(bench_app, name="bench")
app.add_typer(zoo_app, name="zoo")


def main() -> None:
    """Entry point: what ends a command is one line and an exit code (`gmn.exits`); a bug keeps its traceback."""
    debug = "--debug" in sys.argv[1:]
    arguments: list[Any] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        sys.exit(app(arguments, standalone_mode=False, prog_name="gmn") or 0)
    except (Exception, KeyboardInterrupt, Stopped) as error:
        found = verdict(error, resumable=arguments[:1] in (["meta-train"], ["prune"]))
        if debug or found is None:
            crash(error)
            raise
        fail(found[1], found[0])
