# SPDX-License-Identifier: Apache-2.0
"""deploy/: every file goes through the checker of its kind, and they fit together.

No container engine is needed. What one would find out only by building and running the
images is not tested here; deploy/README.md says what was checked how.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vllm_rsparse.metrics import layout
from vllm_rsparse.metrics.exporter import Exporter, Facts

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
MANIFESTS = sorted((DEPLOY / "k8s").glob("*.yaml"))
SCRIPTS = [DEPLOY / "ray/rsparse-ray", DEPLOY / "cpu/install.sh", ROOT / ".ci/run"]


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def tool(name: str) -> str:
    """A checker of the development lock, or of the machine."""
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def passes(*command: object) -> None:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    passes(tool("shellcheck"), script)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(dockerfile: Path) -> None:
    passes(tool("hadolint"), dockerfile)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_reaches_the_build(dockerfile: Path) -> None:
    """COPY takes from the root what .dockerignore, an allow-list, lets through."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    copies = [line for line in dockerfile.read_text().splitlines() if "COPY" in line]
    for line in copies:
        words = line.split()[1:-1]
        if words[0].startswith("--from="):
            continue
        for word in words:
            assert (ROOT / word).exists(), word
            assert any(f"{word}/".startswith(f"{path}/") for path in allowed), word


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_are_not_root_and_report_their_health(name: str) -> None:
    last_stage = (DEPLOY / "docker" / name).read_text().split("\nFROM ")[-1]
    assert "\nUSER 10001:10001\n" in last_stage
    assert "/health" in last_stage.split("HEALTHCHECK")[1]
    assert "WORKDIR /home/rsparse" in last_stage  # not a checkout


def find_compose() -> list[str] | None:
    """Docker may be installed without the plugin, which is a package of its own."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True)
        return ["docker", "compose"] if asked.returncode == 0 else None
    return None


def test_compose_configuration() -> None:
    """`docker compose config`, version 1 or 2, where it is installed."""
    path = DEPLOY / "docker/compose.yaml"
    command = find_compose()
    if command is None:
        pytest.skip("docker compose is not installed")
    profiles = [f"--profile={name}" for name in ("cuda", "cpu", "prepare")]
    env = {**os.environ, "MODEL": "m", "GRAFANA_PASSWORD": "p"}
    command += ["--file", str(path), *profiles, "config", "--quiet"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compose_services() -> None:
    compose = read_yaml(DEPLOY / "docker/compose.yaml")
    assert set(compose["services"]) >= {"cuda", "cpu", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        if "build" in service:
            context = (DEPLOY / "docker" / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("../"):
                assert (DEPLOY / "docker" / source).is_file(), source
            elif not source.startswith("$"):
                assert source in compose["volumes"]
        for port in service.get("ports", []):
            assert port.startswith(("127.0.0.1:", "${BIND:-127.0.0.1}:")), port


def test_prometheus_scrapes_the_server() -> None:
    path = DEPLOY / "monitoring/prometheus.yml"
    (job,) = read_yaml(path)["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    compose = read_yaml(DEPLOY / "docker/compose.yaml")
    for name in ("cuda", "cpu"):
        service = compose["services"][name]
        assert host in service["networks"]["default"]["aliases"]
        assert service["ports"][0].endswith(f":{port}")
    if shutil.which("promtool"):
        passes("promtool", "check", "config", path)


def pod_templates(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = document["spec"]
    if document["kind"] in ("Job", "Deployment"):
        yield spec["template"]
    if document["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield group["template"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifest_schema(manifest: Path) -> None:
    """Kubernetes' own schemas; of a RayService, a custom resource, its pods'."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    document = read_yaml(manifest)
    version = kubernetes_validate.latest_version()
    if document["kind"] != "RayService":
        kubernetes_validate.validate(document, version, strict=True)
        return
    for template in pod_templates(document):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(wrapped, version, strict=True)


def test_a_broken_manifest_would_be_found() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    document = read_yaml(DEPLOY / "k8s/rayservice.yaml")
    (_, template) = pod_templates(document)
    template["spec"]["containers"][0]["ressources"] = {}
    wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            wrapped, kubernetes_validate.latest_version(), strict=True
        )


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_pods_are_restricted_and_bounded(manifest: Path) -> None:
    for template in pod_templates(read_yaml(manifest)):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            resources = container["resources"]
            assert resources["limits"]["memory"] == resources["requests"]["memory"]
            assert "cpu" in resources["requests"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_manifests_fit_together() -> None:
    documents = {path.stem: read_yaml(path) for path in MANIFESTS}
    claim = documents["pvc"]["metadata"]["name"]
    for document in documents.values():
        for template in pod_templates(document):
            claims = [
                volume["persistentVolumeClaim"]["claimName"]
                for volume in template["spec"]["volumes"]
                if "persistentVolumeClaim" in volume
            ]
            assert claims == [claim]
    (server,) = pod_templates(documents["deployment"])
    (job,) = pod_templates(documents["prepare-job"])
    labels = server["metadata"]["labels"]
    selector = documents["deployment"]["spec"]["selector"]["matchLabels"]
    assert selector.items() <= labels.items()
    assert documents["service"]["spec"]["selector"].items() <= labels.items()
    # What the Job writes is served, from the same mount: the links in it are absolute.
    prepared = job["spec"]["containers"][0]["args"][1]
    container = server["spec"]["containers"][0]
    assert container["args"][0] == prepared
    assert prepared in documents["rayservice"]["spec"]["serveConfigV2"]
    (target,) = documents["service"]["spec"]["ports"]
    assert target["targetPort"] in [port["name"] for port in container["ports"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_serve_application_of_the_rayservice() -> None:
    engine = pytest.importorskip("vllm.engine.arg_utils")
    spec = read_yaml(DEPLOY / "k8s/rayservice.yaml")["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (config,) = application["args"]["llm_configs"]
    known = {field.name for field in dataclasses.fields(engine.AsyncEngineArgs)}
    assert set(config["engine_kwargs"]) <= known
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    size = config["engine_kwargs"]["tensor_parallel_size"]
    assert group["replicas"] * int(group["rayStartParams"]["num-gpus"]) == size
    dockerfile = (DEPLOY / "docker/Dockerfile.ray").read_text()
    assert f"RAY_VERSION={spec['rayClusterConfig']['rayVersion']}\n" in dockerfile


def test_ray_cluster_launcher_file() -> None:
    ray = pytest.importorskip("ray")
    schema = Path(ray.__file__).parent / "autoscaler/ray-schema.json"
    document = read_yaml(DEPLOY / "ray/cluster.yaml")
    jsonschema.validate(document, json.loads(schema.read_text()))
    assert document["file_mounts"] == {}


def test_dashboard() -> None:
    dashboard = json.loads((DEPLOY / "monitoring/grafana/rsparse.json").read_text())
    (source,) = read_yaml(DEPLOY / "monitoring/grafana/datasources.yml")["datasources"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"]["uid"] == source["uid"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_dashboard_asks_for_metrics_that_exist(tmp_path: Path) -> None:
    loggers = pytest.importorskip("vllm.v1.metrics.loggers")
    theirs = Path(loggers.__file__).read_text()
    header = layout.Header(0, {"q_proj": 1})
    layout.counts_path(tmp_path, 0).write_bytes(bytes(8 * header.slots))
    layout.write_header(tmp_path, header)
    exporter = Exporter(tmp_path)
    exporter.facts = Facts({"version": "1"}, {"q_proj": 0.5})
    ours = {s.name for family in exporter.collect() for s in family.samples}
    text = (DEPLOY / "monitoring/grafana/rsparse.json").read_text()
    names = set(re.findall(r"\b(vllm(?:_rsparse_|:)[a-z_]+)", text))
    assert len(names) > 8
    for name in names:
        if name.startswith("vllm:"):
            base = re.sub(r"_(total|bucket|count|sum)$", "", name)
            assert f'"{base}"' in theirs, name
        else:
            assert name in ours


def test_readme_names_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    paths = set(re.findall(r"\bdeploy/[\w./-]*\w", text))
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
    for path in (*DOCKERFILES, *MANIFESTS):
        assert path.name in text, path
