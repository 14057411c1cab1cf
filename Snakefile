# The same graph as dvc.yaml, run in parallel: one rule for each resolved DVC stage.
from snakemake.utils import min_version

min_version("9.27")


include: "workflow/rules/common.smk"


rule all:
    input:
        EVERY_OUTPUT,


include: "workflow/rules/stages.smk"
