"""The description of the machine and its state."""

import os
import subprocess

import pytest
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


def git(folder, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A package of one file, in a folder that machine takes for its own."""
    (tmp_path / "vitnb").mkdir()
    (tmp_path / "vitnb" / "machine.py").write_text("x = 1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "vitnb" / "machine.py"))
    # A repository around the temporary folder would know nothing of it.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def commit_of(code) -> tuple[str | None, bool | None]:
    facts = machine.describe_machine()
    return facts["commit"], facts["dirty"]


def test_the_commit_of_the_code_and_changes_since(code):
    git(code, "init")
    git(code, "add", ".")
    git(code, "commit", "-m", "one")
    commit, dirty = commit_of(code)
    assert len(commit) == 40 and dirty is False
    git(code, "config", "status.showUntrackedFiles", "no")
    (code / "vitnb" / "new.py").write_text("x = 2")
    assert commit_of(code) == (commit, True)


def test_no_repository_is_no_clean_one(code):
    assert commit_of(code) == (None, None)


def test_a_repository_without_a_commit(code):
    git(code, "init")
    git(code, "add", ".")
    assert commit_of(code) == (None, None)


def test_the_commit_of_somebody_elses_repository_is_not_the_code_s(code):
    """An installed package lies in a folder that the project around it ignores."""
    (code / ".gitignore").write_text("vitnb")
    git(code, "init")
    git(code, "add", ".")
    git(code, "commit", "-m", "one")
    assert commit_of(code) == (None, None)


@pytest.mark.parametrize("failing", ["rev-parse", "ls-files", "status", ""])
def test_git_that_fails_or_is_missing_says_nothing(code, monkeypatch, failing):
    """It refuses a repository of another user ("dubious ownership")."""
    git(code, "init")
    git(code, "add", ".")
    git(code, "commit", "-m", "one")
    run = subprocess.run

    def broken(command, **options):
        if not failing:
            raise FileNotFoundError("git")
        if failing in command:
            raise subprocess.CalledProcessError(128, command)
        return run(command, **options)

    monkeypatch.setattr(machine.subprocess, "run", broken)
    assert commit_of(code) == (None, None)
