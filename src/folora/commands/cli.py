"""The commands beside the stages: what is stale and why, what came out, what to ship, publish and throw away."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from folora.commands import EVALUATIONS, FOUNDATION, REPORT, RUNS
from folora.console import print_table
from folora.errors import redacted

if TYPE_CHECKING:
    from folora.commands.forget import Forgetting

app = typer.Typer()

PANEL = "Beside the stages"
DEFAULT_PARAMS = Path("params.yaml")
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file.")]
Runs = Annotated[Path, typer.Option(help="Folder with METHOD/RUN.")]
Evaluations = Annotated[Path, typer.Option(help="Folder with the results of every evaluation.")]


@app.command(rich_help_panel=PANEL, epilog="Example: folora methods --json")
def methods(as_json: AsJson = False) -> None:
    """List every kind of method, with its paper, what it trains, freezes and exports (--json: and its options).

    Below it the options that go with any of them.
    """
    from folora.commands.methods import SharedOption, shared_options
    from folora.methods import describe_kinds

    kinds, with_any = describe_kinds(), shared_options()
    columns = [name for name in kinds[0] if name != "options"]
    if as_json:
        _print_json({"kinds": kinds, "with_any": [vars(one) for one in with_any]})
    else:
        print_table(columns, [[kind[name] for name in columns] for kind in kinds])
        print("With any of them (kl_budget: with those whose change can be scaled back):")
        print_table(SharedOption.HEAD, [one.cells() for one in with_any])


@app.command(rich_help_panel=PANEL, epilog="Example: folora params proxy")
def params(
    key: Annotated[str, typer.Argument(help="A section or key; left out: all.")] = "",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/params.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what params.yaml may hold: every key, its bounds and what it means."""
    from folora.commands.params import HEAD, markdown, reference

    entries = reference(key)
    if as_json:
        _print_json([vars(entry) for entry in entries])
    elif as_markdown:
        print(markdown(entries), end="")
    else:
        print_table(HEAD, [entry.cells() for entry in entries])


@app.command(rich_help_panel=PANEL, epilog="Example: folora use controls && dvc repro")
def use(
    preset: Annotated[str, typer.Argument(help="A name in workflow/presets, or default: the committed params.yaml.")],
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Make a preset the current parameter file; values of your own that git does not have are not overwritten."""
    from folora.presets import use_preset

    use_preset(preset, params_file)
    print(f"{params_file} is now {preset}: dvc repro runs what it needs")


@app.command(hidden=True)
def record(stages: Annotated[list[str], typer.Argument(help="Names of stages that have just run.")]) -> None:
    """Record stages with DVC; what Snakemake does while it runs."""
    import logging

    from folora.dag import record_stages

    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # it has a bar for everything else
    record_stages(Path.cwd(), stages)


@app.command(rich_help_panel=PANEL, epilog="Example: folora why train@folora-1e-2-s0")
def why(
    stage: Annotated[str, typer.Argument(help="A stage, or the name that several share: train.")],
    as_json: AsJson = False,
) -> None:
    """Say which dependency or parameter makes a stage run again."""
    from folora.commands.why import explain

    reasons = explain(Path.cwd(), stage)
    if as_json:
        _print_json([reason.as_json() for reason in reasons])
    else:
        print(*(line for reason in reasons for line in reason.lines()), sep="\n")


@app.command(rich_help_panel=PANEL, epilog="Example: folora verify --against ../reference")
def verify(
    against: Annotated[
        Path | None, typer.Option(help="Folder of another run, to compare files; left out: the hashes that git has.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Commit whose dvc.lock has the hashes.")] = "HEAD",
    as_json: AsJson = False,
) -> None:
    """Say whether the outputs here are those of another run: bit by bit, or within tolerances; exit code 1 if not."""
    from folora.commands.verify import Verdict, level_of, summary, verify_files, verify_hashes

    verdicts = verify_hashes(Path.cwd(), revision) if against is None else verify_files(Path.cwd(), against)
    level = level_of(verdicts)
    if as_json:
        _print_json({"level": level, "stages": [vars(one) for one in verdicts]})
    else:
        print_table(Verdict.HEAD, [one.cells() for one in verdicts])
        print(summary(verdicts))
    if level is None:
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL, epilog="Example: folora doctor || echo mend this first")
def doctor(as_json: AsJson = False, params_file: ParamsFile = DEFAULT_PARAMS) -> None:
    """Check machine, environment and folder, and say what to do; exit code 1 if something is a problem."""
    from folora.commands.doctor import PROBLEM, examine

    findings = examine(params_file)
    if as_json:
        _print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            advice = f": {finding.advice}" if finding.advice else ""
            print(f"{finding.level:8} {finding.what}: {finding.seen}{advice}")
    if any(finding.level == PROBLEM for finding in findings):
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL, epilog="Example: folora compare lora-1e-2-s0 folora-2e-2-s0")
def compare(
    first: Annotated[str, typer.Argument(help="Entry of runs in params.yaml.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    runs: Runs = RUNS,
    evaluations: Evaluations = EVALUATIONS,
    as_json: AsJson = False,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Put two runs side by side: parameters that differ, and what each learned and kept at its last checkpoint."""
    from folora.commands.compare import compare_runs
    from folora.params import load_params

    pair = compare_runs(load_params(params_file), first, second, runs, evaluations)
    if as_json:
        _print_json(pair.as_json())
    else:
        print_table(["", first, second, "difference"], pair.rows())


@app.command(rich_help_panel=PANEL, epilog="Example: folora cost --json")
def cost(
    runs: Runs = RUNS,
    page: Annotated[Path | None, typer.Option(help="Write a copy of the report's page with the costs in it.")] = None,
    report: Annotated[Path, typer.Option(help="Folder of the report.")] = REPORT,
    as_json: AsJson = False,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Show what the stages cost in this folder, and the step time and memory of each method against the reference."""
    from folora.commands.cost import MethodCost, StageCost, costs_here, write_page
    from folora.params import load_params

    stages, methods = costs_here(load_params(params_file), runs)
    if page is not None:
        write_page(stages, methods, report, page)
        print(page)
    elif as_json:
        _print_json({"stages": [vars(one) for one in stages], "methods": [vars(one) for one in methods]})
    else:
        print_table(StageCost.HEAD, [one.cells() for one in stages])
        print_table(MethodCost.HEAD, [one.cells() for one in methods])


@app.command(rich_help_panel=PANEL, epilog="Example: folora plan --params workflow/presets/baselines.yaml")
def plan(as_json: AsJson = False, params_file: ParamsFile = DEFAULT_PARAMS) -> None:
    """Say what a parameter file asks of this machine: memory, disk, tokens and about how long, before it is spent."""
    from folora.commands.first_rows import check_tasks
    from folora.commands.plan import make_plan
    from folora.commands.stage_plans import StagePlan, duration
    from folora.coverage import print_coverage
    from folora.params import load_params

    params = load_params(params_file)
    check_tasks(params)
    made = make_plan(params)
    if as_json:
        _print_json(made.as_json())
        return
    print_coverage(made.covered)
    print_table(StagePlan.HEAD, [stage.cells() for stage in made.stages])
    seconds = sum(stage.seconds for stage in made.stages)
    print(f"about {duration(seconds)} of computing, items of evaluation tasks left out")
    print(*made.warnings, sep="\n")


@app.command(rich_help_panel=PANEL, epilog="Example: folora prefetch && HF_HUB_OFFLINE=1 dvc repro")
def prefetch(params_file: ParamsFile = DEFAULT_PARAMS) -> None:
    """Fetch the model, the data sets and the evaluation tasks of a hub now; afterwards no stage needs the network."""
    from folora.commands.prefetch import prefetch as fetch
    from folora.params import load_params

    stages, tasks = fetch(load_params(params_file))
    print(f"stages: {', '.join(stages) or 'none that fetch'}")
    print(f"evaluation tasks: {', '.join(tasks) or 'none of a hub'}")


@app.command(rich_help_panel=PANEL, epilog="Example: folora pick --keep 0.98")
def pick(
    keep: Annotated[float, typer.Option(min=0, help="Least share of the base model's kept accuracy.")] = 0.95,
    task: Annotated[str | None, typer.Option(help="Entry of tasks; left out: each of them.")] = None,
    runs: Runs = RUNS,
    evaluations: Evaluations = EVALUATIONS,
    foundation: Annotated[Path, typer.Option(help="Output of the foundation stage.")] = FOUNDATION,
    as_json: AsJson = False,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Choose the run to ship: the best on validation among those that kept enough; and say how to load and serve it."""
    from folora.commands.pick import pick_run, usage
    from folora.params import load_params

    params = load_params(params_file)
    choices = [pick_run(params, name, keep, runs, evaluations) for name in ([task] if task else params.tasks)]
    uses = [usage(choice, foundation) for choice in choices]
    if as_json:
        _print_json([vars(choice) | vars(how) for choice, how in zip(choices, uses, strict=True)])
    else:
        print(*(f"{choice.text()}\n\n{how.text()}\n" for choice, how in zip(choices, uses, strict=True)), sep="\n")


@app.command(rich_help_panel=PANEL, epilog="Example: folora export folora-2e-2-s0 --output exported")
def export(
    run: Annotated[str, typer.Argument(help="Entry of runs in params.yaml; folora pick names one.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model, in float32.")] = False,
    runs: Runs = RUNS,
    evaluations: Evaluations = EVALUATIONS,
    foundation: Annotated[Path, typer.Option(help="Output of the foundation stage.")] = FOUNDATION,
    heldout: Annotated[Path, typer.Option(help="Held-out proxy text.")] = Path("artifacts/heldout.parquet"),
    task_rows: Annotated[Path, typer.Option(help="Folder with the rows of every task.")] = Path("artifacts/task"),
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Write a run's adapter, or the merged model, with a model card that says what it learned and what it kept."""
    from folora.base import open_base
    from folora.commands.export import Places, export_run
    from folora.devices import take_devices
    from folora.params import load_params
    from folora.spread import gpu_count

    params, places = load_params(params_file), Places(runs, evaluations, foundation, heldout, task_rows)
    with ExitStack() as held:
        if merge:
            take_devices(held, min(1, gpu_count(open_base(foundation).loading.device)))
        difference = export_run(params, run, places, output, merge=merge)
    print(output if difference is None else f"{output}: merging changed no logit by more than {difference:.1e}")


@app.command(rich_help_panel=PANEL, epilog="Example: folora push exported me/my-adapter")
def push(
    folder: Annotated[Path, typer.Argument(help="Written by folora export.")],
    repository: Annotated[str, typer.Argument(help="Hub id of the repository; made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="A new repository can be seen by everyone.")] = False,
) -> None:
    """Upload an exported folder to a hub. Nothing else of this project does."""
    from folora.commands.export import push_folder

    print(push_folder(folder, repository, private=not public))


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: folora forget ~/adapters/mine --spectrum artifacts/spectrum/spelled/sampled",
)
def forget(
    adapter: Annotated[Path, typer.Argument(help="Folder of any PEFT adapter for the base model.")],
    foundation: Annotated[Path, typer.Option(help="Output of the foundation stage.")] = FOUNDATION,
    heldout: Annotated[Path, typer.Option(help="Held-out proxy text.")] = Path("artifacts/heldout.parquet"),
    spectrum: Annotated[
        Path | None, typer.Option(help="Folder with moments; left out: those of the first task and source.")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Folder with evaluation tasks; left out: evaluation.tasks.")
    ] = None,
    as_json: AsJson = False,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Measure how much an adapter forgets, also one made elsewhere: KL, perplexity, kept tasks, and each layer."""
    import torch

    from folora.base import open_base
    from folora.commands.forget import Yardsticks, measure_forgetting
    from folora.devices import take_devices
    from folora.params import load_params
    from folora.spread import gpu_count

    params = load_params(params_file)
    torch.set_num_threads(params.threads.evaluate)
    task, source = next(iter(params.tasks)), next(iter(params.proxy.sources))
    moments = spectrum or Path(f"artifacts/spectrum/{task}/{source}")
    yardsticks = Yardsticks(heldout, moments, tasks or Path(params.evaluation.tasks))
    base = open_base(foundation)
    with ExitStack() as held:
        take_devices(held, gpu_count(base.loading.device))
        found = measure_forgetting(params, adapter, base, yardsticks)
    if as_json:
        _print_json(found.as_json())
    else:
        _print_forgetting(found)


@app.command(rich_help_panel=PANEL, epilog="Example: folora publish --uri http://mlflow.example.org:5000")
def publish(
    uri: Annotated[str | None, typer.Option(help="Left out: MLFLOW_TRACKING_URI, or tracking.uri.")] = None,
    runs: Runs = RUNS,
    evaluations: Evaluations = EVALUATIONS,
    as_json: AsJson = False,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Send every finished run to an MLflow server or database from its artefacts; twice is once."""
    from folora.commands.publish import publish_runs
    from folora.params import load_params
    from folora.tracking import address

    params = load_params(params_file)
    place = uri or address(params.tracking)
    done = publish_runs(params, runs, evaluations, place)
    if as_json:
        _print_json(vars(done))
        return
    print(f"{len(done.sent)} runs with results are in {redacted(place)}, experiment {params.tracking.experiment}")
    for names, state in ((done.unmeasured, "there, but not evaluated yet"), (done.missing, "not trained yet")):
        if names:
            print(f"{state}: {', '.join(names)}")


@app.command(rich_help_panel=PANEL, epilog="Example: folora clean --yes")
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; deletes with --yes only.")] = False,
) -> None:
    """Delete what stages made that params.yaml no longer names, logs, and what killed processes left; asks first."""
    from folora.commands.clean import find_leftovers, remove, stages_that_read
    from folora.dag import resolve_stages
    from folora.params import load_params

    params, stages = load_params(DEFAULT_PARAMS), resolve_stages(Path.cwd())
    leftovers = find_leftovers(params, stages)
    if as_json:
        _print_json([{**vars(left), "path": str(left.path)} for left in leftovers])
    elif leftovers:
        print_table(
            ["path", "why", "MB"], [[str(left.path), left.reason, f"{left.size / 1e6:.1f}"] for left in leftovers]
        )
        if readers := stages_that_read(leftovers, stages):
            print(f"folders that hold some of it are read by these, which run again without it: {', '.join(readers)}")
        print(f"frees {sum(left.size for left in leftovers) / 1e6:.1f} MB; what DVC caches: dvc gc --workspace")
    else:
        print("nothing to delete")
    if not leftovers or (as_json and not yes):
        return
    if not yes:
        typer.confirm("Delete?", abort=True)
    remove(leftovers)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_forgetting(found: Forgetting) -> None:
    perplexities = f"perplexity {found.perplexity:.3f} (base {found.base_perplexity:.3f})"
    print(f"KL to the base {found.kl:.4f} nats per token, {perplexities}")
    if found.kept:
        kept = [[name, f"{before:.3f}", f"{after:.3f}"] for name, (before, after) in found.kept.items()]
        print_table(["kept task", "base", "adapted"], kept)
    if found.layers:
        rows = [(layer.layer, layer.penalty, layer.utility) for layer in found.layers]
        rows.append(("mean", found.mean("penalty"), found.mean("utility")))
        shown = [[name, f"{penalty:.2e}", f"{utility:.2e}"] for name, penalty, utility in rows]
        print_table(["relative change of", "penalty", "utility"], shown)
    if found.unmeasured:
        print(f"not measured layer by layer: {', '.join(found.unmeasured)}")
    if found.unasked:
        print(f"not asked, no such task in the folder nor of the harness: {', '.join(found.unasked)}")
