# What DVC knows: the resolved stages, and which of them are stale.
#
# DVC decides what is stale, Snakemake only in which order it runs. A stage that is neither stale nor below a stale one
# sees its inputs as ancient; a stale stage gets a marker file, newer than its outputs, as an input. What a job has
# finished is recorded with DVC, so that after either runner the other finds nothing to do.
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from folora.dag import below, is_folder, resolve_stages, stale_stages
from folora.devices import main_memory
from folora.errors import FoLoRAError
from folora.finished import Recording, mark_of
from folora.hold import hold

ROOT = Path(workflow.basedir)
MARKERS = Path(".snakemake/stale")
STAGES = resolve_stages(ROOT)

# a process that Snakemake starts for a single job takes no DVC lock: what is stale was settled when the run began
STALE = stale_stages(ROOT) & STAGES.keys() if workflow.is_main_process else set()
UNSETTLED = below(STAGES, STALE)
RECORDING = Recording()
HELD = ExitStack()  # in the place of Snakemake's own lock, which outlives a kill (profiles/default/profile.yaml)
EVERY_OUTPUT = [path for stage in STAGES.values() for path in stage.outputs]

if workflow.is_main_process:
    # what a killed job left incomplete is stale to DVC, unless the other runner has finished it since
    shutil.rmtree(".snakemake/incomplete", ignore_errors=True)
    # a clock that was set back leaves outputs in the future, and Snakemake fails a job whose inputs are newer than it
    for path in map(Path, EVERY_OUTPUT):
        for dated in (path, path / ".snakemake_timestamp"):
            if dated.exists() and dated.stat().st_mtime > time.time():
                dated.touch()

if workflow.resource_settings.nodes is None and "mem_mb" not in workflow.global_resources:
    # jobs at once fit this machine, and one that asks for more runs alone; a cluster's jobs it would cut short
    workflow.register_resource("mem_mb", main_memory() // 10**6)

MARKERS.mkdir(parents=True, exist_ok=True)
for name in STALE:
    # Snakemake passes over an input that is newer but has the checksum of the last run
    (MARKERS / STAGES[name].rule).write_text(str(time.time_ns()))


def inputs_of(stage):
    if stage.name not in UNSETTLED:
        return [ancient(path) for path in stage.inputs]
    marker = [str(MARKERS / stage.rule)] if stage.name in STALE else []
    return [*stage.inputs, *marker]


def outputs_of(stage):
    paths = [directory(path) if is_folder(path) else path for path in stage.outputs]
    if stage.name == "report":  # what `snakemake --report` shows
        return [report(path, htmlindex="index.html", category="Comparison") for path in paths]
    return paths
