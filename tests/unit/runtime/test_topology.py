from __future__ import annotations

import pytest

from services.runtime.errors import StartError
from services.runtime.topology import DEPLOY, SERVICES, load_topology, parse_topology

ONE = """
[settings]
max_resident_models = 2
[[process]]
name = "device-0"
services = ["extraction", "training", "extensions"]
device = "cuda:0"
memory_limit = "6GB"
"""


def test_a_process_with_every_service():
    topology = parse_topology("one", ONE)
    (process,) = topology.processes
    assert (process.name, process.services, process.device) == ("device-0", SERVICES, "cuda:0")
    assert process.memory_limit == 6_000_000_000
    assert topology.settings == {"MAX_RESIDENT_MODELS": "2"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (DEPLOY / "topologies").glob("*.toml")))
def test_every_topology_that_is_shipped_is_valid(name: str):
    found = {service for process in load_topology(name).processes for service in process.services}
    assert found - {"residency"} == set(SERVICES)


def test_gpus_have_a_cpu_beside_them_that_holds_what_they_have_no_room_for():
    holds = load_topology("dual-24gb").processes[-1]
    assert (holds.services, holds.device) == (("residency",), "cpu")


def test_process_names_that_scripts_rely_on():
    assert [process.name for process in load_topology("local").processes] == ["device-0"]
    assert [process.name for process in load_topology("local-split").processes] == [
        "extraction",
        "training",
        "extensions",
    ]


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ('device = "cuda:0"', 'device = "gpu"', "process[0].device"),
        ('name = "device-0"', 'name = "gateway"', "process[0].name"),
        ('name = "device-0"', "name = 7", "process[0].name"),
        ('"training", ', "", "training"),
        ('"training"', '"registry"', "process[0].services"),
        ('"training"', '"residency"', "process[0].services"),
        ('memory_limit = "6GB"', 'memory_limit = "much"', "process[0].memory_limit"),
        ('memory_limit = "6GB"', 'memory = "6GB"', "process[0].memory"),
        ("[settings]", "[setting]", "setting"),
        ("max_resident_models = 2", "max_resident_models = ", "line 3"),
    ],
)
def test_what_is_wrong_is_named(before: str, after: str, named: str):
    assert before in ONE
    with pytest.raises(StartError) as raised:
        parse_topology("one", ONE.replace(before, after))
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_two_processes_of_one_name_are_refused():
    with pytest.raises(StartError, match="two processes are called device-0"):
        parse_topology("two", ONE + ONE.split("2\n", 1)[1])


def test_an_unknown_topology_names_those_that_exist():
    with pytest.raises(StartError, match="dual-24gb, dual-cpu, jetson, local, local-split"):
        load_topology("nowhere")
