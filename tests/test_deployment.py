"""Kubernetes and Ray files: valid, consistent with each other, and with the server's settings.

Kubernetes' own kinds are validated against its published schemas; ServiceMonitor and ScaledObject
against models of their CRDs, which drop unknown fields. kustomize is not needed: `rendered` applies
the features that are used (resources, labels, images, RFC 6902 patches) and fails on any other.
"""

import copy
import re
import shutil
import subprocess
from functools import cache
from importlib import import_module
from math import isqrt
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from pcae_serve.bundle import decode_cost
from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.runtime import machine_memory
from pcae_serve.runtime.service import BATCH_S
from pcae_serve.runtime.uploads import MEMORY_SHARE
from pcae_serve.runtime.worker import TERMINATE_S
from pcae_serve.settings import Settings
from pcae_training.pretrain_settings import PretrainSettings
from tests.support.exposition import SERVED

ROOT = Path(__file__).parents[1]
KUBERNETES, RAY = ROOT / "docker" / "kubernetes", ROOT / "docker" / "ray"
RAY_GUIDE = ROOT / "docs" / "ray.md"
#: The oldest supported version: `sleep` as a preStop handler is on by default since 1.30.
OLDEST, NEWEST = "1.30", "1.37"
#: Services of compose.yaml that run the server.
SERVERS = ("cpu", "gpu", "tensorrt")
#: What the server takes at rest with the demo bundle, rounded up.
REST_BYTES = 300_000_000
#: Modules with the models of the operators' kinds.
CUSTOM = {
    "ServiceMonitor": "cloudcoil.models.prometheus_operator.v1",
    "ScaledObject": "cloudcoil.models.keda.v1alpha1",
}
ROOTS = ["base", "monitoring", "overlays/gpu", "training"]

Object = dict[str, Any]


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def rendered(folder: Path) -> list[Object]:
    """Return the objects that `kubectl apply -k` of a folder would apply."""
    plan = load(folder / "kustomization.yaml")
    known = {"apiVersion", "kind", "resources", "labels", "images", "patches"}
    assert set(plan) <= known, set(plan) - known
    objects = list[Object]()
    for name in plan["resources"]:
        path = (folder / name).resolve()
        objects += rendered(path) if path.is_dir() else [load(path)]
    for labels in plan.get("labels", []):
        assert set(labels) == {"pairs"}
        for each in objects:
            each["metadata"].setdefault("labels", {}).update(labels["pairs"])
    for image in plan.get("images", []):
        used = [c for each in objects for c in containers(each) if name_of(c) == image["name"]]
        assert used, f"nothing uses image {image['name']}"
        for container in used:
            container["image"] = f"{image['name']}:{image['newTag']}"
    for patch in plan.get("patches", []):
        [at] = [i for i, each in enumerate(objects) if is_(each, patch["target"])]
        objects[at] = jsonpatch.apply_patch(objects[at], load(folder / patch["path"]))
    return objects


def is_(each: Object, target: dict[str, str]) -> bool:
    return (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])


def containers(each: Object) -> list[Object]:
    template = each.get("spec", {}).get("template", {})
    return list(template.get("spec", {}).get("containers", []))


def name_of(container: Object) -> str:
    return str(container["image"]).partition(":")[0]


@cache
def applied(root: str) -> list[Object]:
    return rendered(KUBERNETES / root)


def one(root: str, kind: str) -> Object:
    [found] = [each for each in applied(root) if each["kind"] == kind]
    return found


# --- every file


def test_every_file_is_part_of_something() -> None:
    used = {KUBERNETES / root / "kustomization.yaml" for root in ROOTS}
    for kustomization in list(used):
        plan = load(kustomization)
        named = [*plan["resources"], *(patch["path"] for patch in plan.get("patches", []))]
        used |= {(kustomization.parent / name).resolve() for name in named}
    assert {file for file in KUBERNETES.rglob("*") if file.is_file()} <= used


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_matches_the_schema_of_kubernetes(root: str, version: str) -> None:
    for each in applied(root):
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CUSTOM)
def test_the_operators_know_every_field(kind: str) -> None:
    """Slow because importing one model builds all models of its operator, which takes 4 s."""
    each = one("monitoring", kind)
    model = getattr(import_module(CUSTOM[kind]), kind)
    understood = model.model_validate(copy.deepcopy(each))
    assert understood.model_dump(by_alias=True, exclude_unset=True, mode="json") == each
    wrong = copy.deepcopy(each)
    wrong["spec"]["intervall"] = 1  # the check itself can fail
    understood = model.model_validate(copy.deepcopy(wrong))
    assert understood.model_dump(by_alias=True, exclude_unset=True, mode="json") != wrong


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")
@pytest.mark.parametrize("root", ROOTS)
def test_kustomize_renders_the_objects_that_these_tests_read(root: str) -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def by_name(each: Object) -> tuple[str, str]:
        return each["kind"], each["metadata"]["name"]

    objects = sorted(yaml.safe_load_all(done.stdout), key=by_name)
    assert objects == sorted(applied(root), key=by_name)


# --- the pod


def pod(root: str = "base") -> Object:
    return dict(one(root, "Deployment")["spec"]["template"]["spec"])


def environment(root: str = "base") -> dict[str, str]:
    return {each["name"]: each["value"] for each in containers(one(root, "Deployment"))[0]["env"]}


def test_the_environment_makes_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        assert name.removeprefix("PCAE_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    settings = Settings()
    [container] = pod()["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(settings.bundle), str(settings.cache_dir), "/tmp"} <= mounts
    assert settings.api_keys_file is not None
    assert str(settings.api_keys_file.parent) in mounts
    [volume] = [v for v in pod()["volumes"] if "secret" in v]
    assert [item["path"] for item in volume["secret"]["items"]] == [settings.api_keys_file.name]
    assert {port["containerPort"] for port in container["ports"]} == {settings.port}


def test_the_grace_period_exceeds_sleep_and_drain() -> None:
    [container] = pod()["containers"]
    sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = float(environment()["PCAE_DRAIN_S"])
    needed_s = sleep_s + drain_s + BATCH_S + TERMINATE_S
    assert pod()["terminationGracePeriodSeconds"] > needed_s
    probe = container["readinessProbe"]
    assert sleep_s > probe["periodSeconds"] * probe["failureThreshold"]


def memory_limits() -> dict[str, int]:
    """Return the memory limits of the server's containers in bytes."""
    limits = {
        root: container["resources"]["limits"]["memory"]
        for root in ("base", "overlays/gpu")
        for each in rendered(KUBERNETES / root)
        if each["kind"] == "Deployment"
        for container in each["spec"]["template"]["spec"]["containers"]
    }
    services = load(ROOT / "docker" / "compose.yaml")["services"]
    limits |= {name: service["mem_limit"] for name, service in services.items() if name in SERVERS}
    return {
        name: int(limit.lower().removesuffix("gi").removesuffix("g")) << 30
        for name, limit in limits.items()
    }


def test_memory_limits_leave_room_for_any_image_that_the_settings_accept() -> None:
    """Requests get a share of the limit, less what the server takes at rest."""
    settings, limits = Settings(), memory_limits()
    assert set(limits) == {"base", "overlays/gpu", *SERVERS}
    side = isqrt(settings.max_pixels)
    body_bytes = int(settings.max_body_mb * 1e6)
    largest_bytes = body_bytes + max(
        decode_cost.predict(Layout(codec, side, side, samples=4, orientation=6), body_bytes).bytes
        for codec in decode_cost.RATES
    )
    for name, limit in limits.items():
        budget_bytes = machine_memory.GROUP_SHARE * limit - REST_BYTES
        assert budget_bytes >= largest_bytes, name
        assert MEMORY_SHARE * budget_bytes >= 3 * body_bytes, name  # the most copies of a body
    text = (ROOT / "docs" / "operations.md").read_text()
    assert f"The limits in `docker/` ({limits['base'] >> 30} GB for CPUs)" in text


def test_probes_use_routes_of_the_server() -> None:
    [container] = pod()["containers"]
    paths = {kind: container[kind]["httpGet"]["path"] for kind in container if "Probe" in kind}
    assert paths == {
        "startupProbe": "/readyz", "livenessProbe": "/livez", "readinessProbe": "/readyz",
    }  # fmt: skip
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > 10 * 6  # --profile-s, and more


@pytest.mark.parametrize("root", ["base", "overlays/gpu", "training"])
def test_a_pod_has_few_privileges(root: str) -> None:
    [each] = [o for o in applied(root) if containers(o)]
    spec = each["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsNonRoot"]) == (
        10001,
        True,
    )
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}


def test_claims_selectors_and_ports_match() -> None:
    deployment, service = one("base", "Deployment"), one("base", "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        one("base", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels
    claims = {o["metadata"]["name"] for o in applied("base") if "Claim" in o["kind"]}
    used = [v["persistentVolumeClaim"]["claimName"] for v in pod()["volumes"] if len(v) > 1
            and "persistentVolumeClaim" in v]  # fmt: skip
    assert set(used) == claims
    [container] = pod()["containers"]
    names = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    monitor, scaled = one("monitoring", "ServiceMonitor"), one("monitoring", "ScaledObject")
    selector = monitor["spec"]["selector"]["matchLabels"]
    assert selector.items() <= service["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_the_gpu_overlay_changes_what_a_gpu_needs() -> None:
    base, gpu = pod()["containers"][0], pod("overlays/gpu")["containers"][0]
    assert (base["image"], gpu["image"]) == ("pcae-serve:cpu", "pcae-serve:gpu")
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in base["resources"]["limits"]
    startup = gpu["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 15 * 60
    assert gpu["env"] == base["env"]


# --- the autoscaler


def queries() -> dict[str, str]:
    triggers = one("monitoring", "ScaledObject")["spec"]["triggers"]
    return {trigger["name"]: trigger["metadata"]["query"] for trigger in triggers}


def test_the_autoscaler_reads_metrics_of_the_server() -> None:
    assert set(queries()) == {"accuracy-debt", "predicted-wait", "missed"}
    job = one("base", "Service")["metadata"]["name"]  # how the operator names a job
    for query in queries().values():
        assert query.count("(") == query.count(")")
        asked = re.findall(r"(\bpcae_\w+)\{([^}]*)\}", query)
        assert len(asked) == len(re.findall(r"\bpcae_\w+", query.replace('"pcae-serve"', "")))
        for name, matchers in asked:
            wanted = dict(re.findall(r'(\w+)=~?"([^"]*)"', matchers))
            assert wanted.pop("job") == job
            for label, values in wanted.items():
                for value in values.split("|"):
                    known = [labels.get(label) for labels in SERVED[name]]
                    assert value in known, (name, label, value)
            assert name in SERVED
        assert query.endswith("or vector(0)")  # one number, also without requests


def test_the_autoscaler_reads_neither_cpu_nor_latency() -> None:
    triggers = one("monitoring", "ScaledObject")["spec"]["triggers"]
    assert {trigger["type"] for trigger in triggers} == {"prometheus"}
    assert {trigger["metricType"] for trigger in triggers} == {"Value"}
    assert not re.search("cpu|stage_seconds|duration", " ".join(queries().values()))


# --- training


def torchrun(command: list[str]) -> tuple[Any, list[str]]:
    """Parse a command line with torchrun's parser; return its own part and the program's."""
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(command)
    return given, [given.training_script, *given.training_script_args]


def test_the_training_job_uses_existing_flags() -> None:
    job = one("training", "Job")
    [container] = containers(job)
    assert container["command"][0] == "torchrun"
    given, program = torchrun(container["command"][1:])
    assert given.module
    assert program[:2] == ["pcae_training.cli", "pretrain"]
    flags = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in program[2:]}
    assert flags <= set(PretrainSettings.model_fields)
    assert "resume_or_begin" in flags
    service = one("training", "Service")
    host, _, port = given.rdzv_endpoint.partition(":")
    name = job["metadata"]["name"]
    assert host == f"{name}-0.{job['spec']['template']['spec']['subdomain']}"
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert int(port) == service["spec"]["ports"][0]["port"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


# --- Ray


def test_the_ray_file_agrees_with_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load(RAY / "serve.yaml")
    [application] = plan["applications"]
    for name, value in application["runtime_env"]["env_vars"].items():
        assert name.removeprefix("PCAE_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.host == plan["http_options"]["host"]  # so that keys are required
    assert settings.api_keys_file is not None
    [deployment] = application["deployments"]
    assert deployment["max_ongoing_requests"] > settings.queue_limit
    source = (ROOT / "pcae_serve" / "integrations" / "ray.py").read_text()
    module, _, name = application["import_path"].partition(":")
    assert module == "pcae_serve.integrations.ray"
    assert f"\n{name} = " in source
    policy = deployment["autoscaling_config"]["policy"]["policy_function"]
    assert f"def {policy.partition(':')[2]}(" in source
    assert f'name="{deployment["name"]}"' in source


@pytest.mark.parametrize("file", [RAY_GUIDE, RAY / "serve.yaml"], ids=lambda file: file.name)
def test_the_callback_of_the_proxy_exists(file: Path) -> None:
    [path] = re.findall(r"\bRAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=(\S+)", file.read_text())
    module, _, name = path.partition(":")
    assert callable(getattr(import_module(module), name))


@pytest.mark.slow
def test_ray_accepts_its_file() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="pip install '.[ray]'")
    schema.ServeDeploySchema.model_validate(load(RAY / "serve.yaml"))
