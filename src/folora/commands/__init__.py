"""The commands beside the stages: ``cli.py`` declares them, each does its work in the module of its name."""

from pathlib import Path

FOUNDATION = Path("artifacts/foundation")  # as in dvc.yaml, and so are these
RUNS, EVALUATIONS, REPORT = map(Path, ("artifacts/runs", "artifacts/evaluation", "results/report"))
