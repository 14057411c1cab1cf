for stage in STAGES.values():

    rule:
        name:
            stage.rule
        input:
            inputs_of(stage),
        output:
            outputs_of(stage),
        log:
            f"logs/{stage.rule}.log",
        benchmark:
            f"logs/{stage.rule}.benchmark.tsv"
        conda:
            "../envs/folora.yaml"
        threads: stage.threads
        resources:
            mem_mb=stage.mem_mb,
            runtime=stage.runtime,
            gpu=stage.gpus,
        params:
            command=stage.command,
            mark=mark_of(stage.name),
        shell:
            "({params.command} && touch {params.mark}) > {log} 2>&1"


onstart:
    try:
        HELD.enter_context(hold(Path(".snakemake")))
    except FoLoRAError as error:
        raise WorkflowError(str(error)) from error
    RECORDING.start()
    if workflow.local_exec:
        # its limit on jobs a second makes Snakemake look at all waiting jobs once a second for every job it has
        # finished, until that takes a core by itself; see its issue 2967
        workflow.scheduler.job_rate_limiter = None


onerror:
    RECORDING.finish()


onsuccess:
    RECORDING.finish()
    summary = Path("results/report/summary.txt")
    if summary.exists():
        print(summary.read_text())
