"""The description of the machine and its state."""

import os

import torch

from vitnb.records import machine


def test_throttle_reasons_by_their_bits():
    """NVML's bits: 0x1 idle, 0x4 software power cap, 0x40 hardware thermal."""
    assert machine.throttle_reasons("0x0000000000000000") == []
    assert machine.throttle_reasons("0x0000000000000044") == [
        "software power cap",
        "hardware thermal",
    ]
    assert machine.throttle_reasons("0x1") == ["idle"]
    assert machine.throttle_reasons("[N/A]") is None
    assert machine.throttle_reasons(None) is None


def test_what_runs_here():
    facts = machine.describe_machine()
    assert facts["cores"] == os.cpu_count()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu"]
    has_gpu = torch.cuda.is_available()
    assert (facts["gpu"] is not None) == (facts["gpu_uuid"] is not None) == has_gpu
    versions = machine.versions()
    assert torch.__version__.startswith(versions["torch"])
    assert versions["flash-attn"]


def test_the_driver_s_line_becomes_numbers(monkeypatch):
    """nvidia-smi prints a line of values; one that the driver does not give is None."""
    commands = []

    class Properties:
        uuid = "5f3c"

    values = {
        "clocks.sm": "1980",
        "clocks.mem": "3201",
        "power.draw": "[N/A]",
        "temperature.gpu": "41",
        "clocks_event_reasons.active": "0x0000000000000004",
    }

    def nvidia_smi(*command):
        commands.append(command)
        (query,) = (word for word in command if word.startswith("--query-gpu="))
        fields = query.removeprefix("--query-gpu=").split(",")
        if not set(fields) <= set(values):
            return ""
        return ", ".join(values[field] for field in fields)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    monkeypatch.setattr(machine, "_output_of", nvidia_smi)
    state = machine.machine_state()
    assert (state["gpu_mhz"], state["gpu_memory_mhz"]) == (1980.0, 3201.0)
    assert (state["gpu_watts"], state["gpu_celsius"]) == (None, 41.0)
    assert state["gpu_throttled"] == ["software power cap"]
    assert all("--id=GPU-5f3c" in command for command in commands)
