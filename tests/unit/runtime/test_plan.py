from __future__ import annotations

import socket
from pathlib import Path

import pytest

from services.runtime.errors import StartError
from services.runtime.plan import Plan, connectable, device_spec, gateway_spec, make_plan, registry_spec
from services.runtime.ports import parse_address, reserve_all
from services.runtime.topology import load_topology


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("LENSMESH_MODEL_ROOTS", "LENSMESH_DATASET_ROOTS", "LENSMESH_DEVICE_MEMORY_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def plan_of(topology: str, state: Path) -> Plan:
    return make_plan(load_topology(topology), state, ("127.0.0.1", 0), {"LENSMESH_LIFELINE": "x"})


def test_every_address_is_another_one(home: Path):
    plan = plan_of("local-split", home)
    addresses = [plan.http, *plan.grpc.values(), *plan.metrics.values()]
    ports = {int(address.rpartition(":")[2]) for address in addresses} | {plan.postgres_port, plan.nats_port}
    assert len(ports) == len(addresses) + 2
    assert set(plan.addresses()) == {"registry", "extraction", "training", "extensions"}
    assert len(set(plan.addresses().values())) == 4


def test_services_that_share_a_process_share_its_address(home: Path):
    addresses = plan_of("local", home).addresses()
    assert addresses["extraction"] == addresses["training"] == addresses["extensions"] != addresses["registry"]


def test_the_gateway_learns_of_every_service_by_its_proto_package(home: Path):
    plan = plan_of("local-split", home)
    backends = dict(pair.split("=") for pair in gateway_spec(plan).environment["LENSMESH_BACKENDS"].split(","))
    assert backends == {f"lensmesh.{name}.v1": address for name, address in plan.addresses().items()}


def test_a_process_sees_only_the_gpu_it_owns(home: Path):
    plan = plan_of("dual-24gb", home)
    second = device_spec(plan, plan.topology.processes[1])
    assert second.environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert second.argv[-6:-4] == ("--device", "cuda:1")
    assert second.environment["LENSMESH_DEVICE_MEMORY_LIMIT"] == str(22 * 1024**3)
    assert "CUDA_VISIBLE_DEVICES" not in set(registry_spec(plan).environment) - set(plan.environment)


def test_what_the_user_set_wins_over_the_topology(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LENSMESH_DEVICE_MEMORY_LIMIT", "1GiB")
    monkeypatch.setenv("LENSMESH_MAX_RESIDENT_MODELS", "9")
    plan = plan_of("jetson", home)
    environment = device_spec(plan, plan.topology.processes[0]).environment
    assert environment["LENSMESH_DEVICE_MEMORY_LIMIT"] == "1GiB"
    assert environment["LENSMESH_MAX_RESIDENT_MODELS"] == "9"


def test_settings_of_the_topology_reach_every_process(home: Path):
    plan = plan_of("jetson", home)
    assert registry_spec(plan).environment["LENSMESH_MAX_RESIDENT_MODELS"] == "2"


def test_the_callers_roots_come_first_and_ours_are_outside_the_state(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LENSMESH_MODEL_ROOTS", f"{home}/models:relative")
    roots = [Path(part) for part in plan_of("local", home / "state").environment["LENSMESH_MODEL_ROOTS"].split(":")]
    assert roots[:2] == [home / "models", Path.cwd() / "relative"]
    assert (roots[2] / "tiny-gpt2" / "config.json").exists()
    (dataset_root,) = plan_of("local", home / "state").environment["LENSMESH_DATASET_ROOTS"].split(":")
    assert Path(dataset_root).is_dir()
    assert home / "state" not in Path(dataset_root).parents


def test_a_port_that_is_taken_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            reserve_all([("127.0.0.1", 0), ("127.0.0.1", port)])


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), (":8080", ("127.0.0.1", 8080)), ("[::1]:0", ("::1", 0))],
)
def test_addresses(text: str, address: tuple[str, int]):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "localhost", "localhost:", "localhost:http", "localhost:65536", "localhost:-1"])
def test_what_is_no_address(text: str):
    with pytest.raises(StartError, match="HOST:PORT"):
        parse_address(text)


def test_a_client_reaches_a_wildcard_listener_over_loopback():
    assert [connectable(one) for one in ("0.0.0.0:1", "[::]:2", "10.0.0.1:3")] == [
        "127.0.0.1:1",
        "[::1]:2",
        "10.0.0.1:3",
    ]
