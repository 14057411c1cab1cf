"""The commands beside the stages: ``cli.py`` declares them, each does its work in the module of its name."""
