"""What can be said of the examples' configurations without the programs that read them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexllm_vllm.config import FinetuningConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
MONITORING = EXAMPLES / "monitoring"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture
def services() -> dict[str, Any]:
    services: dict[str, Any] = load(MONITORING / "compose.yaml")["services"]
    return services


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """What lies where in a container, of what is mounted from here."""
    pairs = (volume.split(":")[:2] for volume in service["volumes"])
    return {inside: outside for outside, inside in pairs if outside.startswith(".")}


def test_the_compose_file_is_whole(services: dict[str, Any]) -> None:
    known = {"image", "command", "environment", "volumes", "ports", "extra_hosts", "restart",
             "depends_on"}  # fmt: skip
    compose = load(MONITORING / "compose.yaml")
    assert set(compose) == {"services", "volumes"}
    for service in services.values():
        assert set(service) <= known
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), "pinned"
        assert set(service.get("depends_on", ())) <= set(services)
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        named = {v.split(":")[0] for v in service["volumes"]} - set(mounts(service).values())
        assert named <= set(compose["volumes"])


def test_what_it_mounts_exists_and_is_read_where_it_is_mounted(services: dict[str, Any]) -> None:
    for service in services.values():
        assert mounts(service)
        for outside in mounts(service).values():
            assert (MONITORING / outside).exists(), outside
    config = next(c for c in services["prometheus"]["command"] if c.startswith("--config.file="))
    assert config.removeprefix("--config.file=") in mounts(services["prometheus"])
    (provider,) = load(MONITORING / "dashboards.yml")["providers"]
    folder = provider["options"]["path"]
    assert mounts(services["grafana"])[folder] == "../grafana"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/finetuning.json"


def test_grafana_finds_prometheus_and_prometheus_the_server(services: dict[str, Any]) -> None:
    (source,) = load(MONITORING / "datasources.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    dashboard = json.loads((EXAMPLES / "grafana" / "finetuning.json").read_text())
    wanted = {v["query"] for v in dashboard["templating"]["list"] if v["type"] == "datasource"}
    assert source["type"] in wanted
    (scrape,) = load(MONITORING / "prometheus.yml")["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert port == "8000"
    assert f"{host}:host-gateway" in services["prometheus"]["extra_hosts"]


def test_nginx_takes_as_much_as_the_server() -> None:
    text = (EXAMPLES / "nginx" / "nginx.conf").read_text()
    (size,) = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(size) << 20 > FinetuningConfig.max_file_bytes
    for line in ("proxy_request_buffering off;", "proxy_buffering off;"):
        assert line in text
