"""The manifests in config/kubernetes, and the page docs/kubernetes.md: both fit together, and what they say works."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

import proxy
from proxy.cli import main
from proxy.config.loader import ConfigFile, ConnectionLimits
from proxy.server import GRACE_S
from tests.pod import (
    BUNDLES,
    IMAGE,
    KUBERNETES,
    Bundle,
    Manifest,
    Mounts,
    containers,
    read_manifests,
    serving_container,
)
from tests.printed import blocks, run

ROOT = Path(__file__).resolve().parents[1]
# What the page says is the oldest version.
OLDEST = "1.29"
# Not Kubernetes' own, so it publishes no schema of them.
CUSTOM = ("Kustomization", "ServiceMonitor", "PodMonitor")

SIDECAR = KUBERNETES / "sidecar"
PATCH = SIDECAR / "patch.yaml"
FILES = sorted(set(KUBERNETES.rglob("*.yaml")) - {PATCH})
each_bundle = pytest.mark.parametrize("name", BUNDLES)


def _of_kind(bundle: Bundle, *kinds: str) -> Bundle:
    return [each for each in bundle if each["kind"] in kinds]


def _workloads(bundle: Bundle) -> Bundle:
    return [each for each in bundle if any(containers(each))]


def _ours(bundle: Bundle) -> list[Manifest]:
    """The containers of our image."""
    return [
        dict(each) for manifest in bundle for each in containers(manifest) if each["image"].split(":")[0] == IMAGE
    ]


# ------------------------------------------------------------------------------------------------------ the schemas


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_kubernetes_accepts_each_manifest(path: Path, version: str) -> None:
    """By its published schemas of the oldest version that we name, and of the newest; unknown fields are errors."""
    manifests = read_manifests(path)
    assert manifests
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_see_a_field_that_does_not_exist() -> None:
    """Deep in a manifest too. A container with restartPolicy would be an unknown field before 1.28."""
    manifest = copy.deepcopy(_of_kind(BUNDLES["sqlite"], "StatefulSet")[0])
    sidecar = manifest["spec"]["template"]["spec"]["initContainers"][0]
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolicy"):
        kubernetes_validate.validate(manifest, "1.27", strict=True)
    sidecar["livenessProbe"]["periodSecond"] = 5
    with pytest.raises(kubernetes_validate.ValidationError, match="periodSecond"):
        kubernetes_validate.validate(manifest, OLDEST, strict=True)


def test_the_monitors_have_the_fields_of_their_definitions() -> None:
    """Those of monitoring.coreos.com/v1 that are used here, with their types; any other field is a mistake."""
    monitors = _of_kind(BUNDLES["service"], "ServiceMonitor") + read_manifests(SIDECAR / "podmonitor.yaml")
    for monitor, endpoints in zip(monitors, ("endpoints", "podMetricsEndpoints"), strict=True):
        assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
        assert monitor.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert monitor["spec"].keys() <= {"jobLabel", "selector", "namespaceSelector", endpoints}
        assert monitor["spec"]["selector"].keys() <= {"matchLabels", "matchExpressions"}
        _assert_endpoints_have_fields_of_the_operator(monitor["spec"][endpoints])


def _assert_endpoints_have_fields_of_the_operator(endpoints: list[Manifest]) -> None:
    assert endpoints
    for endpoint in endpoints:
        assert endpoint.keys() <= {"port", "path", "interval", "scrapeTimeout", "relabelings", "honorLabels"}
        assert re.fullmatch(r"\d+(ms|s|m)", endpoint["interval"])
        for rule in endpoint["relabelings"]:
            assert rule.keys() <= {"action", "regex", "sourceLabels", "targetLabel", "replacement"}


def test_prometheus_renames_no_label_of_the_metrics() -> None:
    """The operator adds labels of its own. Where a metric has one of the same name, the metric's is renamed."""
    added = {"namespace", "service", "pod", "container", "endpoint", "job", "instance", "node"}
    (monitor,) = _of_kind(BUNDLES["service"], "ServiceMonitor")
    (of_pods,) = read_manifests(SIDECAR / "podmonitor.yaml")
    dropped, same = (
        {rule["regex"] for rule in endpoint["relabelings"] if rule["action"] == "labeldrop"}
        for endpoint in (monitor["spec"]["endpoints"][0], of_pods["spec"]["podMetricsEndpoints"][0])
    )
    assert same == dropped
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `llm_quota_\w+` \| \w+ \| ([^|]*) \|", page, flags=re.MULTILINE)
    labels = {label for row in rows for label in re.findall(r"`(\w+)`", row)}
    assert "endpoint" in labels & added
    assert labels & added <= dropped
    (service,) = _selected(BUNDLES["service"], "Service", monitor["spec"]["selector"]["matchLabels"])
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "llm-quota-proxy", "the job of the alerts"


# ------------------------------------------------------------------------------------------------ the kustomize base


def test_the_base_lists_each_of_its_files() -> None:
    """But for the Secret: `apply -k` would put its placeholders in place of the keys."""
    (base,) = read_manifests(KUBERNETES / "service" / "kustomization.yaml")
    files = {path.name for path in FILES if path.parent.name == "service"}
    assert base["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert base.keys() == {"apiVersion", "kind", "resources", "images"}
    assert set(base["resources"]) == files - {"kustomization.yaml", "secret.example.yaml"}
    assert len(base["resources"]) == len(set(base["resources"]))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="NO KUBECTL HERE: the base is not built by kustomize")
def test_kustomize_builds_the_base() -> None:
    """It has each manifest of the files, and the tag can be replaced in one place."""
    built = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "service")], capture_output=True, text=True, check=True
    ).stdout
    names = {(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(built)}
    expected = {
        (each["kind"], each["metadata"]["name"])
        for each in BUNDLES["service"]
        if each["kind"] not in ("Kustomization", "Secret")
    }
    assert names == expected


def test_the_tag_of_the_image_is_the_version() -> None:
    """In each manifest and in the base. A release changes the number in the package; this test names the rest."""
    version = proxy.__version__
    for name, bundle in BUNDLES.items():
        assert {each["image"] for each in _ours(bundle)} == {f"{IMAGE}:{version}"}, name
    (base,) = _of_kind(BUNDLES["service"], "Kustomization")
    assert [(image["name"], image["newTag"]) for image in base["images"]] == [(IMAGE, version)]
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert set(re.findall(rf"{IMAGE}:(\d[\w.]*)", page)) <= {version}


# -------------------------------------------------------------------------------------------------------- references


def _selected(bundle: Bundle, kind: str, labels: Mapping[str, str]) -> Bundle:
    """The manifests of this kind whose own labels a selector matches."""
    return [each for each in _of_kind(bundle, kind) if labels.items() <= each["metadata"]["labels"].items()]


def _pods(bundle: Bundle, labels: Mapping[str, str]) -> Bundle:
    """The workloads whose pods a selector matches."""
    return [
        each
        for each in _workloads(bundle)
        if labels.items() <= each["spec"]["template"]["metadata"]["labels"].items()
    ]


def _port_names(workload: Manifest) -> set[str]:
    return {port["name"] for container in containers(workload) for port in container.get("ports", ())}


def _port_numbers(workload: Manifest) -> set[int]:
    return {port["containerPort"] for container in containers(workload) for port in container.get("ports", ())}


def _secret_keys(name: str, bundle: Bundle) -> set[str]:
    """The keys of the Secret: in its example, or in the command at the top of the file that makes it."""
    if examples := _of_kind(bundle, "Secret"):
        return set(examples[0]["stringData"])
    text = (KUBERNETES / "sidecar" / f"{name}.yaml").read_text(encoding="utf-8")
    return set(re.findall(r"--from-file=([\w-]+)", text.partition("apiVersion")[0]))


def _services(name: str, bundle: Bundle) -> Iterator[str]:
    for service in _of_kind(bundle, "Service"):
        where, found = f"Service {service['metadata']['name']}", _pods(bundle, service["spec"]["selector"])
        if len(found) != 1:
            yield f"{where} selects {len(found)} workloads"
        targets = {port["targetPort"] for port in service["spec"]["ports"]}
        # By number too. Older releases do not find a port by its name in a container below `initContainers`.
        if missing := targets - {port for each in found for port in _port_names(each) | _port_numbers(each)}:
            yield f"{where}: no port {missing}"


def _budgets(name: str, bundle: Bundle) -> Iterator[str]:
    for budget in _of_kind(bundle, "PodDisruptionBudget"):
        if [each["kind"] for each in _pods(bundle, budget["spec"]["selector"]["matchLabels"])] != ["Deployment"]:
            yield "the PodDisruptionBudget is not about the Deployment alone"


def _network_policies(name: str, bundle: Bundle) -> Iterator[str]:
    for policy in _of_kind(bundle, "NetworkPolicy"):
        found = _pods(bundle, policy["spec"]["podSelector"]["matchLabels"])
        if len(found) != len(_workloads(bundle)):
            yield "the NetworkPolicy does not select all pods"
        named = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        if named != {port for each in found for port in _port_names(each)}:
            yield f"the NetworkPolicy opens {named}"


def _monitors(name: str, bundle: Bundle) -> Iterator[str]:
    for monitor in _of_kind(bundle, "ServiceMonitor"):
        services = _selected(bundle, "Service", monitor["spec"]["selector"]["matchLabels"])
        offered = {port["name"] for each in services for port in each["spec"]["ports"]}
        if len(services) != 1 or {each["port"] for each in monitor["spec"]["endpoints"]} != offered:
            yield "the ServiceMonitor does not select the port of one Service"


def _ingresses(name: str, bundle: Bundle) -> Iterator[str]:
    offered = {
        (service["metadata"]["name"], port["name"])
        for service in _of_kind(bundle, "Service")
        for port in service["spec"]["ports"]
    }
    for ingress in _of_kind(bundle, "Ingress"):
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            backend = path["backend"]["service"]
            if (backend["name"], backend["port"]["name"]) not in offered:
                yield f"the Ingress leads to {backend}"


def _labels_of_pods(name: str, bundle: Bundle) -> Iterator[str]:
    for workload in _workloads(bundle):
        spec, template = workload["spec"], workload["spec"]["template"]
        labels = template["metadata"]["labels"]
        if "selector" in spec and spec["selector"]["matchLabels"] != labels:
            yield f"{workload['kind']}: the selector is not the labels of its pods"
        spread = str([template["spec"].get(field) for field in ("affinity", "topologySpreadConstraints")])
        for text in re.findall(r"'matchLabels': (\{[^}]*\})", spread):
            if yaml.safe_load(text) != labels:
                yield f"{workload['kind']}: it is spread by the labels of other pods"


def _names_in_pods(name: str, bundle: Bundle) -> Iterator[str]:
    """Names of other manifests: of a ConfigMap, the Secret, an account, and the Service of a StatefulSet."""
    names = {(each["kind"], each["metadata"]["name"]) for each in bundle if "metadata" in each}
    if name != "service":  # beside a sidecar it is made by a command
        names.add(("Secret", "my-app-llm-quota-proxy"))
    for workload in _workloads(bundle):
        pod = workload["spec"]["template"]["spec"]
        needed = {("ConfigMap", each["configMap"]["name"]) for each in pod["volumes"] if "configMap" in each}
        needed |= {("Secret", each["secret"]["secretName"]) for each in pod["volumes"] if "secret" in each}
        needed |= {("Secret", key["name"]) for key in _keys_in_environment(workload)}
        needed |= {("ServiceAccount", pod[field]) for field in ("serviceAccountName",) if field in pod}
        needed |= {("Service", workload["spec"][field]) for field in ("serviceName",) if field in workload["spec"]}
        yield from (f"{workload['kind']}: no {kind} {missing}" for kind, missing in sorted(needed - names))


def _keys_of_secret(name: str, bundle: Bundle) -> Iterator[str]:
    keys = _secret_keys(name, bundle)
    for workload in _workloads(bundle):
        used = {key["key"] for key in _keys_in_environment(workload)}
        for volume in workload["spec"]["template"]["spec"]["volumes"]:
            used |= {item["key"] for item in volume.get("secret", {}).get("items", ())}
        if missing := used - keys:
            yield f"{workload['kind']}: the Secret has no {missing}"


def _keys_in_environment(workload: Manifest) -> list[dict[str, str]]:
    variables = [each for container in containers(workload) for each in container.get("env", ())]
    return [each["valueFrom"]["secretKeyRef"] for each in variables if "valueFrom" in each]


def _volumes(name: str, bundle: Bundle) -> Iterator[str]:
    for workload in _workloads(bundle):
        mounts = [mount for container in containers(workload) for mount in container.get("volumeMounts", ())]
        declared = [*workload["spec"]["template"]["spec"]["volumes"]]
        declared += [claim["metadata"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
        if different := {mount["name"] for mount in mounts} ^ {each["name"] for each in declared}:
            yield f"{workload['kind']}: mounted and declared volumes differ: {different}"
        if any(mount.keys() & {"subPath", "subPathExpr"} for mount in mounts):
            yield f"{workload['kind']}: a subPath is never updated"


def _probes(name: str, bundle: Bundle) -> Iterator[str]:
    for container in _ours(bundle):
        ports = {port["name"] for port in container.get("ports", ())}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container and container[probe]["httpGet"]["port"] not in ports:
                yield f"{probe} has no port {container[probe]['httpGet']['port']}"
        if not container.get("livenessProbe", {}).get("httpGet", {}).get("port", "admin").endswith("admin"):
            yield "livenessProbe asks a listener that answers 503 when all its connections are used"


# Each yields the references that lead nowhere.
REFERENCES = (
    _services,
    _budgets,
    _network_policies,
    _monitors,
    _ingresses,
    _labels_of_pods,
    _names_in_pods,
    _keys_of_secret,
    _volumes,
    _probes,
)


def _mistakes(name: str, bundle: Bundle) -> list[str]:
    return [mistake for rule in REFERENCES for mistake in rule(name, bundle)]


@each_bundle
def test_each_reference_leads_somewhere(name: str) -> None:
    """Names of ConfigMaps, Secrets and their keys, accounts, volumes, ports; selectors and labels."""
    assert _mistakes(name, BUNDLES[name]) == []


def _change(kind: str, *path: str | int, to: Any) -> Callable[[Bundle], None]:
    def change(bundle: Bundle) -> None:
        at: Any = _of_kind(bundle, kind)[0]
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = to

    return change


TEMPLATE = ("spec", "template", "spec")
WRONG = [
    (_change("ConfigMap", "metadata", "name", to="other"), "no ConfigMap"),
    (_change("ServiceAccount", "metadata", "name", to="other"), "no ServiceAccount"),
    (_change("Deployment", *TEMPLATE, "volumes", 1, "secret", "secretName", to="other"), "no Secret"),
    (_change("Deployment", *TEMPLATE, "volumes", 2, "name", to="other"), "volumes differ"),
    (_change("Deployment", *TEMPLATE, "containers", 0, "volumeMounts", 0, "subPath", to="quotas.yaml"), "subPath"),
    (_change("Deployment", *TEMPLATE, "containers", 0, "readinessProbe", "httpGet", "port", to="web"), "no port"),
    (_change("Deployment", "spec", "selector", "matchLabels", to={"app": "other"}), "the selector"),
    (
        _change("Deployment", *TEMPLATE, "topologySpreadConstraints", 0, "labelSelector", "matchLabels", to={}),
        "spread",
    ),
    (_change("Service", "spec", "selector", to={"app.kubernetes.io/name": "llm-quota-proxy"}), "selects 2 workloads"),
    (_change("Service", "spec", "ports", 0, "targetPort", to="web"), "no port"),
    (_change("Service", "metadata", "name", to="other"), "the Ingress leads"),
    (_change("PodDisruptionBudget", "spec", "selector", "matchLabels", to={}), "the Deployment alone"),
    (_change("NetworkPolicy", "spec", "ingress", 0, "ports", 0, "port", to=8080), "the NetworkPolicy opens"),
    (_change("ServiceMonitor", "spec", "selector", "matchLabels", to={}), "the ServiceMonitor"),
    (_change("ServiceMonitor", "spec", "endpoints", 0, "port", to="api"), "the ServiceMonitor"),
]


@pytest.mark.parametrize(("change", "found"), WRONG, ids=[found for _, found in WRONG])
def test_a_reference_that_leads_nowhere_is_found(change: Callable[[Bundle], None], found: str) -> None:
    """Each kind of them, so that the test above can fail."""
    bundle = copy.deepcopy(BUNDLES["service"])
    change(bundle)
    assert any(found in mistake for mistake in _mistakes("service", bundle))


# ---------------------------------------------------------------------------------------------- rights and resources


@each_bundle
def test_our_containers_have_no_rights(name: str) -> None:
    """What Kubernetes' Pod Security Standard `restricted` asks for, and a read-only root."""
    for workload in _workloads(BUNDLES[name]):
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= {"configMap", "secret", "emptyDir"}
    ours = _ours(BUNDLES[name])
    assert ours
    for container in ours:
        security = {**container["securityContext"]}
        assert security.pop("seccompProfile", {}) in ({}, {"type": "RuntimeDefault"})
        assert security == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert container["resources"]["limits"].keys() == {"memory"}
        read_only = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert {path for path, is_so in read_only.items() if not is_so} <= {"/data", "/tmp"}
        assert {"name": "TMPDIR", "value": "/tmp"} in container["env"]


def test_the_user_of_the_manifests_is_that_of_the_image() -> None:
    """As a number, which Kubernetes needs to see that it is not root. The volume belongs to its group."""
    assert "\nUSER 10001:10001\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for bundle in BUNDLES.values():
        for workload in _workloads(bundle):
            assert workload["spec"]["template"]["spec"]["securityContext"]["fsGroup"] == 10001


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_the_proxy_is_a_sidecar(name: str) -> None:
    """It starts before the app and ends after it, and does not decide on readiness. Both have the same key."""
    (workload,) = _workloads(BUNDLES[name])
    pod = workload["spec"]["template"]["spec"]
    (sidecar,), (app,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    assert {"startupProbe", "livenessProbe"} <= sidecar.keys()
    assert "readinessProbe" not in sidecar
    environ = {each["name"]: each for each in app["env"]}
    given = {each["name"]: each for each in sidecar["env"]}
    assert environ["OPENAI_BASE_URL"]["value"] == "http://127.0.0.1:8080/v1"
    assert environ["OPENAI_API_KEY"]["valueFrom"] == given["APP_KEY"]["valueFrom"]


@each_bundle
def test_a_pod_has_the_time_that_a_stop_takes(name: str, tmp_path: Path) -> None:
    """The delay, the grace for calls in flight, 15 s for the rest, and 30 s for the app beside a sidecar.

    New calls arrive at a pod of the service until its readinessProbe fails. Beside an app nobody is left to call.
    """
    mounts = Mounts(BUNDLES[name], serving_container(BUNDLES[name]), folder=tmp_path)
    delay_s = ConfigFile(str(mounts.config.folder / "quotas.yaml"), mounts.environ).load().settings.shutdown_delay_s
    (workload,) = (each for each in _workloads(BUNDLES[name]) if each["kind"] != "Job")
    is_sidecar = name != "service"
    seconds = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert seconds >= delay_s + GRACE_S + 15 + (30 if is_sidecar else 0)
    if is_sidecar:
        assert delay_s == 0
    else:
        probe = serving_container(BUNDLES[name])["readinessProbe"]
        assert delay_s > probe["periodSeconds"] * probe["failureThreshold"]


def test_only_one_pod_uses_a_file() -> None:
    """SQLite's file is for one process. So one replica, which is stopped before its successor starts."""
    (workload,) = _workloads(BUNDLES["sqlite"])
    assert (workload["kind"], workload["spec"]["replicas"]) == ("StatefulSet", 1)
    assert workload["spec"]["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_a_rolling_update_takes_no_replica_away() -> None:
    """A new one is ready first. The budget takes at most one, and never waits for pods that are not ready anyway."""
    (deployment,) = _of_kind(BUNDLES["service"], "Deployment")
    spec = deployment["spec"]
    assert spec["replicas"] >= 2
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    (budget,) = _of_kind(BUNDLES["service"], "PodDisruptionBudget")
    assert (budget["spec"]["maxUnavailable"], budget["spec"]["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


# ---------------------------------------------------------------------------------------------- what is in front


def test_no_controller_uses_a_connection_that_the_proxy_closes() -> None:
    """Each controller on the page closes an idle connection before the proxy does. Otherwise a call may be a 502."""
    alb, envoy = blocks("kubernetes.md", "Ingress and streams")
    idle_s = [int(found) for found in re.findall(r"idle_timeout\.timeout_seconds=(\d+)", alb)]
    idle_s += [int(found) for found in re.findall(r"connectionIdleTimeout: (\d+)s", envoy)]
    assert len(idle_s) == 2
    assert max(idle_s) < ConnectionLimits().idle_s


def test_the_ingress_of_the_page_is_one() -> None:
    """With the annotations for ALB in place of those for nginx. The route for Envoy leads to the Service's port."""
    alb, envoy = blocks("kubernetes.md", "Ingress and streams")
    (ingress,) = _of_kind(copy.deepcopy(BUNDLES["service"]), "Ingress")
    changed = yaml.safe_load(alb)
    ingress["metadata"]["annotations"] = changed["metadata"]["annotations"]
    ingress["spec"] |= changed["spec"]
    kubernetes_validate.validate(ingress, OLDEST, strict=True)
    route, policy = yaml.safe_load_all(envoy)
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    ports = {
        (service["metadata"]["name"], port["port"])
        for service in _of_kind(BUNDLES["service"], "Service")
        for port in service["spec"]["ports"]
    }
    assert (backend["name"], backend["port"]) in ports
    assert policy["spec"]["targetRefs"][0]["name"] == route["metadata"]["name"]


# ------------------------------------------------------------------------------------------------- the configuration


def _config_text(bundle: Bundle) -> str:
    (config,) = _of_kind(bundle, "ConfigMap")
    text: str = config["data"]["quotas.yaml"]
    return text


@each_bundle
def test_check_has_nothing_to_say_about_the_configuration(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """`check --strict` on the file of the ConfigMap, with its Secret mounted: no mistake and no warning."""
    mounts = Mounts(BUNDLES[name], serving_container(BUNDLES[name]), folder=tmp_path)
    for variable, value in mounts.environ.items():
        monkeypatch.setenv(variable, value)
    result = CliRunner().invoke(
        main, ["check", "--strict", "--json", "--config", str(mounts.config.folder / "quotas.yaml")]
    )
    assert (result.exit_code, json.loads(result.output)["findings"]) == (0, [])


# ------------------------------------------------------------------------------------ a Deployment that exists

# As others write one: the patch knows nothing of it but the names of the Deployment and of its container. One
# variable is a value and one is from a ConfigMap, and there are a container and a volume more.
EXISTING: Manifest = yaml.safe_load("""
apiVersion: apps/v1
kind: Deployment
metadata: {name: my-app}
spec:
  replicas: 1
  strategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 1}}
  selector: {matchLabels: {run: chat}}
  template:
    metadata: {labels: {run: chat}}
    spec:
      securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
      containers:
        - name: app
          image: chat:7
          env:
            - {name: OPENAI_API_KEY, value: sk-of-the-upstream}
            - {name: OPENAI_BASE_URL, valueFrom: {configMapKeyRef: {name: chat, key: url}}}
            - {name: LOG, value: debug}
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
          volumeMounts: [{name: cache, mountPath: /cache}]
        - name: web
          image: nginx:1
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      volumes: [{name: cache, emptyDir: {}}]
""")
# Lists of other names are replaced as a whole (`items` of a Secret, `drop` of capabilities).
MERGE_KEYS = {
    "initContainers": "name",
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}


def _merged(old: Any, patch: Any, field: str = "") -> Any:
    """A strategic merge as of `kubectl patch`: null deletes a field, elements of lists are found by their key."""
    match patch:
        case dict():
            result = dict(old) if isinstance(old, dict) else {}
            for name, value in patch.items():
                if value is None:
                    result.pop(name, None)
                else:
                    result[name] = _merged(result.get(name), value, name)
            return result
        case list() if field in MERGE_KEYS:
            key = MERGE_KEYS[field]
            by_key = {each[key]: each for each in old or ()}
            for each in patch:
                if each.get("$patch") == "delete":
                    by_key.pop(each[key], None)
                else:
                    by_key[each[key]] = _merged(by_key.get(each[key]), each)
            return list(by_key.values())
        case _:
            return patch


def _existing(database: str, name: str) -> Bundle:
    """The manifests of a file that the command of the page makes for this database, but for the app's name."""
    sqlite, postgresql, _ = blocks("kubernetes.md", "Add it to a Deployment that exists")
    command = {"sqlite": sqlite, "postgresql": postgresql}[database]
    assert "s/my-app/chat/g" in command
    with TemporaryDirectory() as folder:
        run(command.replace("chat", "my-app"), folder=Path(folder), environ={"SIDECAR": str(SIDECAR)})
        return read_manifests(Path(folder) / name)


def _patched(database: str, deployment: Manifest = EXISTING) -> Manifest:
    (patch,) = _existing(database, "patch.yaml")
    merged: Manifest = _merged(deployment, patch)
    return merged


each_database = pytest.mark.parametrize("database", ["sqlite", "postgresql"])


@each_database
@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_the_patch_makes_a_valid_pod_of_one_that_exists(database: str, version: str) -> None:
    """What it has stays, the variables are replaced whatever they were made of, and all references lead somewhere."""
    deployment = _patched(database)
    kubernetes_validate.validate(deployment, version, strict=True)
    pod = deployment["spec"]["template"]["spec"]
    assert [each["name"] for each in pod["containers"]] == ["app", "web"]
    environ = {each["name"]: each for each in pod["containers"][0]["env"]}
    assert environ["LOG"] == {"name": "LOG", "value": "debug"}
    assert environ["OPENAI_BASE_URL"].keys() == {"name", "value"}
    assert environ["OPENAI_API_KEY"].keys() == {"name", "valueFrom"}
    assert environ["OPENAI_API_KEY"]["valueFrom"].keys() == {"secretKeyRef"}
    assert pod["securityContext"] == {**EXISTING["spec"]["template"]["spec"]["securityContext"], "fsGroup": 10001}
    bundle = [*_existing(database, "existing.yaml"), deployment]
    assert [*_names_in_pods(database, bundle), *_volumes(database, bundle), *_probes(database, bundle)] == []
    claims = {each["metadata"]["name"] for each in _of_kind(bundle, "PersistentVolumeClaim")}
    used = {each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each}
    assert used == claims
    assert len(claims) == (1 if database == "sqlite" else 0)
    assert (deployment["spec"]["strategy"] == {"type": "Recreate"}) is (database == "sqlite")
    assert _restricted_violations(pod) == []


def test_the_key_in_another_secret_of_the_page_is_mounted() -> None:
    """The volume on the page is valid in place of that of the manifest, at the path that the configuration reads."""
    _, block = blocks("kubernetes.md", "Deploy it")
    (volume,) = yaml.safe_load(block)
    manifest = copy.deepcopy(_of_kind(BUNDLES["sqlite"], "StatefulSet")[0])
    volumes = {each["name"]: each for each in manifest["spec"]["template"]["spec"]["volumes"]}
    assert volume["name"] in volumes
    manifest["spec"]["template"]["spec"]["volumes"] = list({**volumes, volume["name"]: volume}.values())
    kubernetes_validate.validate(manifest, OLDEST, strict=True)
    (source,) = volume["projected"]["sources"]
    assert [item["path"] for item in source["secret"]["items"]] == ["openai-api-key"]


def test_the_patch_for_postgresql_takes_the_volume_of_sqlite_away() -> None:
    """On a Deployment that had the other patch: the same pod as on one that had none."""
    moved = _patched("postgresql", _patched("sqlite"))["spec"]["template"]
    assert moved == _patched("postgresql")["spec"]["template"]


@each_database
def test_the_existing_pod_gets_what_the_whole_manifest_has(database: str) -> None:
    """The same container and the same configuration, so that what is shown of one is true of the other."""
    sidecar = _patched(database)["spec"]["template"]["spec"]["initContainers"][0]
    assert sidecar == serving_container(BUNDLES[database])
    text = _config_text(_existing(database, "existing.yaml"))
    assert yaml.safe_load(text) == yaml.safe_load(_config_text(BUNDLES[database]))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="NO KUBECTL HERE: its own merge is not compared")
@each_database
def test_kubectl_merges_the_patch_in_the_same_way(database: str, tmp_path: Path) -> None:
    """Without a cluster. Its order of elements is another one."""
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(EXISTING))
    (tmp_path / "patch.yaml").write_text(yaml.safe_dump(_existing(database, "patch.yaml")[0]))
    words = "patch --local -f old.yaml --type strategic --patch-file patch.yaml -o json"
    done = subprocess.run(["kubectl", *words.split()], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert _sorted(json.loads(done.stdout)) == _sorted(_patched(database))


def _sorted(value: Any) -> Any:
    """The same with lists in one order, and without fields that are null."""
    match value:
        case dict():
            return {name: _sorted(value[name]) for name in sorted(value) if value[name] is not None}
        case list():
            return sorted(map(_sorted, value), key=str)
        case _:
            return value


def _restricted_violations(pod: Manifest) -> list[str]:
    """What the Pod Security Standard `restricted` forbids in a pod, of the fields that our manifests use."""
    found = []
    of_pod = pod.get("securityContext", {})
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        own = container.get("securityContext", {})
        both = {**of_pod, **own}
        rules = {
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "seccompProfile": both.get("seccompProfile") == {"type": "RuntimeDefault"},
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities": own.get("capabilities") == {"drop": ["ALL"]},
        }
        found += [f"{container['name']}: {rule}" for rule, is_kept in rules.items() if not is_kept]
    kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
    allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected"}
    return found + sorted(kinds - allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_standard_restricted_admits_each_pod(path: Path) -> None:
    """Also the app's container of the examples, and the Job that copies a database."""
    for workload in _workloads(read_manifests(path)):
        assert _restricted_violations(workload["spec"]["template"]["spec"]) == [], workload["kind"]


def test_a_pod_that_the_standard_does_not_admit_is_seen() -> None:
    """Each rule, so that the test above can fail."""
    pod = {"containers": [{"name": "app"}], "volumes": [{"name": "host", "hostPath": {"path": "/"}}]}
    rules = ("runAsNonRoot", "seccompProfile", "allowPrivilegeEscalation", "capabilities")
    assert _restricted_violations(pod) == [*(f"app: {rule}" for rule in rules), "hostPath"]


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_the_other_files_select_the_pods_of_the_app(name: str) -> None:
    """The PodMonitor and the NetworkPolicy: their labels, and the port for metrics."""
    monitor, policy = (read_manifests(SIDECAR / f"{each}.yaml")[0] for each in ("podmonitor", "networkpolicy"))
    for labels in (monitor["spec"]["selector"]["matchLabels"], policy["spec"]["podSelector"]["matchLabels"]):
        (workload,) = _pods(BUNDLES[name], labels)
    assert {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]} == _port_names(workload)
    opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert _port_numbers(workload) < opened


def test_the_job_copies_between_the_databases_of_the_manifests() -> None:
    """From the file of one to the URL of the other, with the volume of the first and the password of the second."""
    (job,) = read_manifests(SIDECAR / "copy-database.yaml")
    (container,) = containers(job)
    urls = [yaml.safe_load(_config_text(BUNDLES[name]))["database"] for name in ("sqlite", "postgresql")]
    assert container["args"] == ["copy-database", *urls]
    bundle = BUNDLES["sqlite"]
    assert [
        *_names_in_pods("copy", [*bundle, job]),
        *_volumes("copy", [job]),
        *_keys_of_secret("postgresql", [job]),
    ] == []
    (volume,) = (each for each in job["spec"]["template"]["spec"]["volumes"] if "persistentVolumeClaim" in each)
    (workload,) = _workloads(bundle)
    (claim,) = workload["spec"]["volumeClaimTemplates"]
    pod = f"{workload['metadata']['name']}-0"
    assert volume["persistentVolumeClaim"]["claimName"] == f"{claim['metadata']['name']}-{pod}"


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_the_quota_in_a_comment_is_valid(name: str, tmp_path: Path) -> None:
    """Of requests, with its model, both without the #. The page's example is valid in their place."""
    replaced = {"# hourly: {": "hourly: {", "# gpt-4.1: {": "gpt-4.1: {"}
    mounts = Mounts(BUNDLES[name], serving_container(BUNDLES[name]), folder=tmp_path, replaced=replaced)
    file = mounts.config.folder / "quotas.yaml"
    assert {"daily", "hourly"} < _quotas(file, mounts)
    (example,) = blocks("kubernetes.md", "Quotas")
    text = file.read_text()
    file.write_text(text[: text.index("groups:")] + example + text[text.index("users:") :])
    assert _quotas(file, mounts) == {"daily", "hourly"}


def _quotas(file: Path, mounts: Mounts) -> set[str]:
    policy = ConfigFile(str(file), mounts.environ).load().policy
    return {quota.name for quota in policy.groups["apps"].quotas}
