"""What a checkpoint may do when it is opened: no code runs, and nothing is fetched."""

import builtins
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from bitsandbytes.backends.cpu import ops as bnb_cpu
from huggingface_hub import constants

import vitnb
from vitnb import variants
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.errors import UserError
from vitnb.models import checkpoints, inspection, loader, pretrained
from vitnb.study import ROOT, Study
from vitnb.training import baselines

# --- Code of a checkpoint ---

CODE = """
from pathlib import Path
Path({mark!r}).write_text("PWNED")
from transformers import PretrainedConfig, ViTForImageClassification, ViTImageProcessor
class Config(PretrainedConfig):
    model_type = "stranger"
class Model(ViTForImageClassification):
    config_class = Config
class Processor(ViTImageProcessor):
    pass
"""
PARTS = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")


def ask_for_code(folder: Path, model_type: str, processor_type: str) -> Path:
    """Make a checkpoint ask for code of its own; return the file that the code writes.

    Names that transformers does not know can be loaded by that code alone.
    """
    mark = folder / "PWNED"
    (folder / "stranger.py").write_text(CODE.format(mark=str(mark)))
    classes = ("stranger.Config", "stranger.Model", "stranger.Processor")
    named = {"auto_map": dict(zip(PARTS, classes, strict=True))}
    for file, own in (
        ("config.json", {"model_type": model_type}),
        ("preprocessor_config.json", {"image_processor_type": processor_type}),
    ):
        values = json.loads((folder / file).read_text())
        values.pop("image_processor_type", None)
        (folder / file).write_text(json.dumps(values | own | named))
    return mark


@pytest.fixture
def base(mini, tmp_path) -> Study:
    """The mini study with a copy of its base."""
    shutil.copytree(pretrained.find_base(mini), tmp_path / "base")
    return replace(mini, base=str(tmp_path / "base"))


def open_everywhere(study: Study) -> dict:
    """Return {name: a function that opens the study's base} for every way to do it."""
    folder = Path(pretrained.find_base(study))
    full = variants.parse("fp32-sdpa")

    def measure_baseline():
        train = load_split(study, "train").subsample(8)
        processor = checkpoints.load_processor(ROOT / "data" / "base")
        images = dataset.load_into_memory(train, processor)
        return baselines.random_init_baseline(study, 4, images, images)

    return {
        "check": lambda: inspection.inspect_checkpoint(folder),
        "processor": lambda: checkpoints.load_processor(folder),
        "base": lambda: pretrained.load_base(study, ["a", "b"]),
        "baseline": measure_baseline,
        "variant": lambda: loader.load_variant(study, full, folder),
    }


OPENERS = ("check", "processor", "base", "baseline", "variant")


@pytest.fixture
def questions(monkeypatch) -> list[str]:
    """Questions that a library asked the user, who answers each with yes."""
    asked = []

    def answer(question=""):
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return asked


@pytest.mark.parametrize("name", OPENERS)
def test_code_of_a_checkpoint_is_refused_without_a_question(base, questions, name):
    open_base = open_everywhere(base)[name]
    mark = ask_for_code(Path(base.base), "stranger", "StrangerProcessor")
    with pytest.raises(UserError) as refused:
        open_base()
    assert len(str(refused.value).splitlines()) == 1
    assert "which is never run: take another" in str(refused.value)
    assert not mark.exists() and questions == []


def test_code_is_ignored_where_transformers_has_its_own(base, questions):
    mark = ask_for_code(Path(base.base), "vit", "ViTImageProcessor")
    model = pretrained.load_base(base, ["a", "b"])
    processor = checkpoints.load_processor(pretrained.find_base(base))
    checkpoints.check_image_size(model, processor, base.base)
    assert type(model) is transformers.ViTForImageClassification
    assert not mark.exists() and questions == []


def test_an_adapter_is_no_checkpoint(base, tmp_path):
    """Transformers would load the model that the adapter names, from anywhere."""
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    named = {"base_model_name_or_path": str(tmp_path / "other"), "peft_type": "LORA"}
    (tmp_path / "base" / "adapter_config.json").write_text(json.dumps(named))
    for name in ("check", "base", "variant"):
        with pytest.raises(UserError, match="an adapter and not a whole model"):
            {
                "check": lambda: inspection.inspect_checkpoint(tmp_path / "base"),
                "base": lambda: pretrained.load_base(base, ["a", "b"]),
                "variant": lambda: loader.load_variant(
                    base, variants.parse("fp32-sdpa"), tmp_path / "base"
                ),
            }[name]()


def test_a_base_in_the_user_s_own_folder(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = pretrained.find_base(replace(base, base="~/base"))
    assert found == str(tmp_path / "base")
    with pytest.raises(UserError, match=r"no base model at .*nowhere: put the"):
        pretrained.find_base(replace(base, base="~/nowhere"))


# --- The network ---


@pytest.fixture
def calls(monkeypatch) -> list:
    """Addresses that were asked for; there is no network."""
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    checkpoints.fetch_base.cache_clear()
    return asked


@pytest.fixture
def hub_study(mini) -> Study:
    return replace(mini, base="someone/a-model-that-is-nowhere")


def test_nothing_but_a_study_s_base_is_asked_of_the_hub(mini, hub_study, calls):
    name = hub_study.base
    for open_model in (
        lambda: checkpoints.load_processor(name),
        lambda: checkpoints.read_model(name),
        lambda: checkpoints.read_config(name),
        lambda: transformers.AutoModel.from_pretrained(name),
    ):
        with pytest.raises((UserError, OSError)):
            open_model()
    loader.load_variant(mini, variants.parse("nf4-sdpa"))
    inspection.inspect_checkpoint(mini.checkpoint("int8"))
    pretrained.load_base(mini, ["a", "b"], "nf4")
    assert pretrained.find_base(hub_study) == name, "finding it fetches nothing"
    assert calls == []


def test_the_base_of_a_study_is_asked_of_the_hub(hub_study, calls):
    wanted = "base 'someone/a-model-that-is-nowhere' is no folder, and the hub does not"
    with pytest.raises(UserError, match=wanted):
        checkpoints.load_processor(pretrained.find_base(hub_study))
    assert calls and constants.HF_HUB_OFFLINE, "the hub is closed again"


def test_a_user_who_closed_the_hub_keeps_it_closed(hub_study, calls, monkeypatch):
    monkeypatch.delenv(vitnb.BASES_FROM_HUB)
    with pytest.raises(UserError, match="the hub does not give it"):
        pretrained.load_base(hub_study, ["a", "b"])
    assert calls == []


def test_a_base_from_the_hub_is_fetched_once_and_without_pickles(
    mini, hub_study, calls, monkeypatch
):
    """The hub is played: it writes the files that it is asked for."""
    fetched = []

    def download(name, allow_patterns, ignore_patterns):
        assert not constants.HF_HUB_OFFLINE
        fetched.append((name, allow_patterns, ignore_patterns))
        return pretrained.find_base(mini)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    base = pretrained.find_base(hub_study)
    model = pretrained.load_base(hub_study, ["a", "b"])
    processor = checkpoints.load_processor(base)
    checkpoints.check_image_size(model, processor, base)
    assert checkpoints.read_config(base, num_labels=3).num_labels == 3
    assert fetched == [(hub_study.base, ["*.json", "*.safetensors"], ["*/*"])]
    assert constants.HF_HUB_OFFLINE and calls == []
    checkpoints.fetch_base.cache_clear()


# Plays a CPU with AVX512-BF16 on which ``kernels`` is installed, without a network.
FRESH = """
import importlib.abc, importlib.machinery, socket, sys

class Play(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def run_and_play(module):
            run(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = run_and_play
        return spec

def refuse(*address, **_):
    print("asked for", address)
    raise OSError("there is no network")

sys.meta_path.insert(0, Play())
socket.getaddrinfo = socket.socket.connect = refuse
{imports}
from bitsandbytes.backends.cpu import ops
from bitsandbytes import functional
from transformers.utils.import_utils import is_kernels_available
assert functional.has_avx512bf16(), "the play has begun"
print("own product:", ops.gemm_4bit_forward_kernel is None)
print("kernels:", is_kernels_available())
"""
KERNELS = """
print("the package kernels is imported")
def get_kernel(name, **_):
    print("fetched", name)
    class Kernel:
        gemm_4bit_forward = print
    return Kernel
"""


@pytest.mark.parametrize(
    ("imports", "printed"),
    [
        ("from vitnb.models import loader", ["own product: True", "kernels: False"]),
        (
            "import bitsandbytes\nfrom vitnb.models import loader",
            [
                "the package kernels is imported",
                "fetched kernels-community/quantization-bitsandbytes",
                "own product: True",
                "kernels: False",
            ],
        ),
    ],
    ids=["vitnb first", "bitsandbytes first"],
)
def test_no_kernel_comes_from_the_hub(tmp_path, imports, printed):
    """bitsandbytes fetches one for NF4 if ``kernels`` is there when it is imported.

    A program may have imported it before this package. NF4 is computed by
    bitsandbytes' own product, either way.
    """
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(KERNELS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    closed = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "USE_HUB_KERNELS")
    environment = {k: v for k, v in os.environ.items() if k not in closed}
    ended = subprocess.run(
        [sys.executable, "-c", FRESH.format(imports=imports)],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == printed


def test_nf4_is_computed_by_bitsandbytes_own_product():
    assert bnb_cpu.gemm_4bit_forward_kernel is None


@pytest.mark.parametrize(
    ("given", "may_fetch"),
    [({}, True), ({"HF_HUB_OFFLINE": "0"}, True), ({"HF_HUB_OFFLINE": "on"}, False)],
)
@pytest.mark.parametrize("first", ["vitnb", "huggingface_hub.constants"])
def test_the_hub_is_closed_in_this_process_and_in_its_children(given, may_fetch, first):
    code = (
        f"import os, {first}, vitnb; from huggingface_hub import constants; "
        "print(constants.HF_HUB_OFFLINE, vitnb.BASES_FROM_HUB in os.environ, "
        "os.environ['HF_HUB_OFFLINE'])"
    )
    own = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", vitnb.BASES_FROM_HUB)
    environment = {k: v for k, v in os.environ.items() if k not in own} | given
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    closed, marked, value = ended.stdout.split()
    assert closed == "True" and value in ("1", "on")
    assert marked == str(may_fetch)
