"""What the machine says of itself."""

import os

import torch

from vitnb.records import machine


def test_throttle_reasons_by_their_bits():
    """NVML's bits: 0x1 idle, 0x4 software power cap, 0x40 hardware thermal."""
    assert machine.throttle_reasons("0x0000000000000000") == []
    assert machine.throttle_reasons("0x0000000000000044") == ["software power cap", "hardware thermal"]
    assert machine.throttle_reasons("0x1") == ["idle"]
    assert machine.throttle_reasons("[N/A]") is None and machine.throttle_reasons(None) is None


def test_what_runs_here():
    found = machine.describe_machine()
    assert found["cores"] == os.cpu_count() and found["threads"] == torch.get_num_threads() and found["cpu"]
    assert (found["gpu"] is None) == (found["gpu_uuid"] is None) == (not torch.cuda.is_available())
    assert torch.__version__.startswith(machine.versions()["torch"]) and machine.versions()["flash-attn"]


def test_the_driver_s_line_becomes_numbers(monkeypatch):
    """A GPU's state from a line as nvidia-smi prints it; a field that the driver does not give is None."""
    asked = []

    class Properties:
        uuid = "5f3c"

    def said(*words):
        asked.append(words)
        fields = next(w for w in words if w.startswith("--query-gpu=")).split("=")[1].split(",")
        answers = {"clocks.sm": "1980", "power.draw": "[N/A]", "temperature.gpu": "41", "clocks.mem": "3201",
                   "clocks_event_reasons.active": "0x0000000000000004"}  # fmt: skip
        return ", ".join(answers.get(field, "") for field in fields) if set(fields) <= set(answers) else ""

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    monkeypatch.setattr(machine, "_output_of", said)
    found = machine.machine_state()
    assert (found["gpu_mhz"], found["gpu_watts"], found["gpu_celsius"]) == (1980.0, None, 41.0)
    assert found["gpu_throttled"] == ["software power cap"]
    assert all("--id=GPU-5f3c" in words for words in asked)
