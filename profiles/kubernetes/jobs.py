"""Send a stage to Kubernetes as a Job, say how it does, and delete it: what Snakemake calls with this profile.

    python profiles/kubernetes/jobs.py submit --cores 1 --megabytes 1000 --minutes 60 --gpus 0 SCRIPT
    python profiles/kubernetes/jobs.py status NAME
    python profiles/kubernetes/jobs.py cancel NAME...

Image, volume and namespace stand in ``job.yaml`` beside it. Needs ``pip install 'folora[kubernetes]'``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException
from ruamel.yaml import YAML
from urllib3.exceptions import HTTPError

MANIFEST = Path(__file__).parent / "job.yaml"


def main() -> None:
    """Do what is asked; a mistake is one line on standard error and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser("submit")
    for option in ("--cores", "--megabytes", "--minutes", "--gpus"):
        submit.add_argument(option, type=int, required=True)
    submit.add_argument("script")
    commands.add_parser("status").add_argument("name")
    commands.add_parser("cancel").add_argument("names", nargs="+")
    asked = parser.parse_args()
    manifest = YAML(typ="safe").load(MANIFEST)
    namespace = manifest["metadata"]["namespace"]
    try:
        config.load_config()
        batch = client.BatchV1Api()
        if asked.command == "submit":
            body = stage_job(manifest, asked.script, asked.cores, asked.megabytes, asked.minutes, asked.gpus)
            print(batch.create_namespaced_job(namespace, body).metadata.name)
        elif asked.command == "status":
            print(status(batch, namespace, asked.name))
        else:
            for name in asked.names:
                batch.delete_namespaced_job(name, namespace, propagation_policy="Background")
    except (ApiException, ConfigException, HTTPError) as error:
        sys.exit(f"kubernetes: {' '.join(str(error).split())}")


def stage_job(
    manifest: dict[str, Any], script: str, cores: int, megabytes: int, minutes: int, gpus: int
) -> dict[str, Any]:
    """The Job of one stage: the manifest with the stage's command and resources."""
    job = copy.deepcopy(manifest)
    job["spec"]["backoffLimit"] = 0  # Snakemake sends it again
    pod = job["spec"]["template"]["spec"]
    pod["activeDeadlineSeconds"] = 60 * minutes  # of the pod, not of the Job, whose time runs while it waits for a node
    container = pod["containers"][0]
    container["command"] = ["sh", script]
    limits = {"memory": f"{megabytes}M"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    container["resources"] = {"requests": {"cpu": str(cores), **limits}, "limits": limits}
    return job


def status(batch: client.BatchV1Api, namespace: str, name: str) -> str:
    """``running``, ``success`` or ``failed``, the words that Snakemake knows."""
    try:
        found = batch.read_namespaced_job_status(name, namespace).status
    except ApiException as error:
        if error.status == 404:
            return "failed"  # someone has deleted it
        if error.status < 500:
            raise
        return "running"  # as far as one knows while the cluster does not answer
    except HTTPError:
        return "running"
    ended = {condition.type for condition in found.conditions or [] if condition.status == "True"}
    return "success" if "Complete" in ended else "failed" if "Failed" in ended else "running"


if __name__ == "__main__":
    main()
