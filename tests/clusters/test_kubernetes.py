"""examples/kubernetes against the schemas of Kubernetes, JobSet and Kubeflow Trainer; what each file says twice."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models
from toy_runs import ROOT

from nemo_brain.core.signals import EXIT_CODE

FOLDER = ROOT / "examples" / "kubernetes"


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def check(document: dict[str, Any]) -> None:
    """ValueError for a field that is unknown, missing or of another type."""
    if document["apiVersion"].startswith("trainer.kubeflow.org"):
        model = getattr(models, f"TrainerV1alpha1{document['kind']}")
        if model.from_dict(document).to_dict() != document:  # it leaves out what it does not know
            raise ValueError("unknown fields")
        return
    try:
        kubernetes_validate.validate(document, "1.33", strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(str(error)) from error


@pytest.mark.parametrize("file", [path.name for path in sorted(FOLDER.glob("*.yaml"))])
def test_every_object_is_one_of_its_schema(file):
    for document in documents(file):
        check(document)


def places(value: Any) -> list[dict[str, Any]]:
    """All the mappings in it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] * isinstance(value, dict) + [place for one in inner for place in places(one)]


@pytest.mark.parametrize("file", [path.name for path in sorted(FOLDER.glob("*.yaml"))])
def test_a_misspelt_field_is_found_wherever_it_stands(file):
    free = ({"storage"}, {"batch.kubernetes.io/job-name"}, {"nvidia.com/gpu"})  # maps with any keys
    for document in documents(file):
        for place in places(document):
            if place.keys() in free or any("/" in key for key in place):
                continue
            place["fieldd"] = 1
            with pytest.raises(ValueError):
                check(document)
            del place["fieldd"]


def container(pod: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    (only,) = pod["containers"]
    return only, {one["name"]: one.get("value") for one in only["env"]}


def claimed(pod: dict[str, Any]) -> bool:
    """Whether the pod's first volume is the one of volume.yaml."""
    (claim,) = documents("volume.yaml")
    return pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_jobs_pods_are_as_many_and_meet_where_it_says():
    service, job = documents("job.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    first, variables = container(pod)
    nodes, name = spec["completions"], job["metadata"]["name"]
    assert spec["parallelism"] == nodes == int(variables["PET_NNODES"])
    assert int(variables["PET_NPROC_PER_NODE"]) == first["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert variables["PET_MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert claimed(pod)


def test_the_train_job_is_of_its_runtime():
    runtime, job = documents("trainjob.yaml")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    # Trainer looks for these two names.
    assert node["name"] == container(pod)[0]["name"] == "node"
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert claimed(pod)


def test_our_exit_code_is_not_counted():
    job, (runtime, _) = documents("job.yaml")[-1], documents("trainjob.yaml")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    for spec, action in ((job["spec"], "Ignore"), (node["template"]["spec"], "FailJob")):
        *_, rule = spec["podFailurePolicy"]["rules"]
        assert rule["action"] == action and EXIT_CODE in rule["onExitCodes"]["values"]
    (rule,) = runtime["spec"]["template"]["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
