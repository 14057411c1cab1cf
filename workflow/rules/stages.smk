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
        params:
            command=stage.command,
            mark=mark_of(stage.name),
        shell:
            "({params.command} && touch {params.mark}) > {log} 2>&1"


onstart:
    RECORDING.start()


onerror:
    RECORDING.finish()


onsuccess:
    RECORDING.finish()
    summary = Path("results/report/summary.txt")
    if summary.exists():
        print(summary.read_text())
