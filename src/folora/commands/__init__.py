"""The commands beside the stages: ``cli.py`` declares them, each does its work in the module of its name."""

from pathlib import Path

RUNS, EVALUATIONS = Path("artifacts/runs"), Path("artifacts/evaluation")  # as dvc.yaml has them
