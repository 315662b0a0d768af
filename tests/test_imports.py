"""The rules of the source tree.

* A module imports its own layer and lower ones: structure, then graphs, then pruning, then training, then commands.
* The metanetwork sees a graph and nothing else: it never imports what knows modules or architectures.
* No file is over 400 lines, no function over 60.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {
        "errors",
        "address",
        "graph",
        "groups",
        "settings",
        "settings_fit",
        "settings_report",
        "settings_pattern",
        "settings_matrix",
        "settings_network",
        "settings_vote",
        "spread",
        "names",
        "permission",
        "heads",
        "masks",
        "spec_check",
    }
    | {"views", "drawing", "placement", "strokes", "phases", "stages", "memory", "traffic", "launch"},
    {
        *(
            "records",
            "batches",
            "trace",
            "trace_export",
            "flow",
            "builder",
            "assemble",
            "rules",
            "reader",
            "convert",
            "converters",
        ),
        *(
            "layers",
            "layers_pyg",
            "metanetwork",
            "blockwise",
            "edge_chunks",
            "edge_sections",
            "edge_columns",
            "edge_tape",
        ),
    },
    {"weight_statistics", "criteria", "members", "scores", "limits", "savings", "surgery", "ranking", "costs", "vote"}
    | {"similarity", "measures", "overlap", "wordnet"}
    | {"weight_masks", "weight_ranking"},
    *(
        {
            "data",
            "images",
            "sources",
            "cifar",
            "networks",
            "state_dict",
            "room",
            *("training", "reconstruct"),
            "fit_options",
            "library_pruner",
            "gradients",
            "consoles",
            "progress",
            *("processes", "bookmark", "guard", "loop"),
            "checkpoint",
            "meta_train",
            "filter_pruning",
            "tasks",
            "vote_prune",
            *("distributed", "replicas", "meta_shares", "engine", "ray_engine", "away"),
            *("backbone", "head_pruning", "simsiam", "reptile", "zoo_build", "neighbours"),
        }
        | {"graph_file", "graph_header", "graph_copies", "network_source", "example"}
        | {"inspection", "inspection_report"}
        | {"export", "export_formats", "sparse_format"}
        | {"suites", "suite_networks", "jsonl"}
        | {"zoo", "zoo_check", "zoo_claims", "zoo_files", "zoo_format"}
        | {"zoo_index", "zoo_reading", "zoo_rows", "zoo_task"},
        {"subject", "convert_cli", "zoo_cli"}
        | {"bench", "bench_checks", "bench_convert", "bench_report", "bench_vote"}
        | {"bench_metanetwork", "bench_metastep", "bench_workers", "bench_latency", "bench_scaling"}
        | {"export_cli", "run_networks"}
        | {
            "pipeline",
            "baselines",
            "budget",
            "initial",
            *("compare", "compare_rows"),
            *("learnt", "run_cost", "cost_cli"),
            *("curve", "curve_cli", "checkpoint_search", "report_page", "statistics_plots"),
            "job",
            "meta_job",
            "kind_job",
            "prune_job",
            "vote_job",
            *("matrix", "matrix_runs", "matrix_report"),
            "trials",
            "vote_compare",
            "vote_report",
            "vote_page",
            "studies",
            "study_cli",
            *("run", "lock", "exits"),
            "report",
            "plots",
            *("recipe", "recipe_bases", "recipe_errors", "recipe_keys", "recipe_yaml"),
            *("cli", "cli_bench", "cli_options", "cli_zoo"),
            "api",
            "__init__",
            "__main__",
        }
        | {"study_plots", "page"},
    ),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
BLIND = (
    "metanetwork",
    "layers",
    "layers_pyg",
    "blockwise",
    "edge_chunks",
    "edge_sections",
    "edge_columns",
    "edge_tape",
    "vote",
)
ARCHITECTURES = {"convert", "converters", "rules", "reader", "builder", "assemble", "flow", "records", "trace"} | {
    "cifar",
    "networks",
}
FILES = sorted([*(ROOT / "gmn").glob("*.py"), *(ROOT / "converters").glob("*.py")])


def module_name(path: Path) -> str:
    return "converters" if path.parent.name == "converters" else path.stem


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of gmn that a file imports, also inside functions and by name; typing imports included."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"gmn.{alias.name}" for alias in node.names] if node.module == "gmn" else [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "gmn":
                yield rest.partition(".")[0] if rest.partition(".")[0] in LAYER else "__init__"


def test_every_module_has_a_layer() -> None:
    assert {module_name(path) for path in FILES} == set(LAYER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_module_imports_no_higher_layer(path: Path) -> None:
    name = module_name(path)
    higher = {other for other in imported(ast.parse(path.read_text())) if LAYER[other] > LAYER[name]}
    assert not higher


@pytest.mark.parametrize("name", [name for name in BLIND if (ROOT / "gmn" / f"{name}.py").exists()])
def test_the_metanetwork_sees_only_a_graph(name: str) -> None:
    """Also through what it imports."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        tree = ast.parse((ROOT / "gmn" / f"{module}.py").read_text())
        waiting += sorted(set(imported(tree)) - seen)
    assert not seen & ARCHITECTURES
    assert {"graph", "errors"} <= seen or name in ("blockwise", "edge_columns")  # which see tensors only


def test_the_rule_sees_imports_of_every_form() -> None:
    source = "import gmn.data\nfrom gmn.cli import main\nfrom gmn import api\ndef f():\n    from gmn.run import Run\n"
    assert set(imported(ast.parse(source))) == {"data", "cli", "api", "run"}
    assert set(imported(ast.parse('importlib.import_module("gmn.converters.layouts")'))) == {"converters"}
    assert set(imported(ast.parse("from gmn import Prune, __version__"))) == {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if (f.end_lineno or 0) - f.lineno >= 60} == {}
