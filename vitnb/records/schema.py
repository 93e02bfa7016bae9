"""The shape of a record, and how an older one is read.

Version 1 had no number. ``upgrade`` is the only place that knows older shapes: all
readers see today's.
"""

from vitnb import variants
from vitnb.errors import UserError
from vitnb.records import SCHEMA

# The parts of a study that a notebook's question depends on, beside its parameters.
SECTIONS = {
    "pretrain": ("pretrain",),
    "finetune": ("data", "base", "pretrain", "finetune"),
    "evaluate": ("data", "latency"),
    "compare": ("data", "compare", "batch_sizes"),
    "waterfall": ("data", "compare"),
    "ablate": ("data", "ablate_bits"),
    "plan": ("data",),
    "infer": ("data",),
}


def upgrade(record: dict) -> dict:
    """Return a record in today's shape, whichever version of vitnb wrote it.

    What an older version did not store is None or missing, never guessed.

    Raises UserError for a record of a newer version.
    """
    version = record.get("schema", 1)
    if version > SCHEMA:
        raise UserError(
            f"record {record['name']} has schema {version}, and this vitnb reads up to "
            f"{SCHEMA}: read it with the version that wrote it, or a newer one"
        )
    if version == SCHEMA:
        return record
    record = dict(record)
    for step in (
        _upgrade_identity,
        _upgrade_engines,
        _upgrade_roofline,
        _upgrade_turns,
    ):
        step(record)
    return record | {"schema": SCHEMA, "written_as": version}


def _upgrade_identity(record: dict) -> None:
    """Version 1 named checkpoints in some records, and never data or host."""
    about = record.get("machine", {})
    gpu = about.get("gpu")
    device = record.get("device") or record.get("asked", {}).get("device")
    on_gpu = bool(gpu) and device != "cpu"
    record |= {"arrays": {}, "tables": []}
    record["identity"] = {
        "checkpoints": _named_checkpoints(record),
        "data": {},
        "code": about.get("code_sha256", ""),
        "packages": record.get("versions", {}),
        "dtype": record.get("dtype", ""),
        "device_kind": f"cuda {about.get('gpu_capability')}" if on_gpu else "cpu",
        "host": "",
        "cores": about.get("cores"),
        "threads": about.get("threads"),
        "device": gpu if on_gpu else about.get("cpu"),
        "device_id": about.get("gpu_uuid") if on_gpu else "",
        "driver": (about.get("driver") or "") if on_gpu else "",
    }


def _named_checkpoints(record: dict) -> dict[str, str]:
    """Return the checkpoints that a record of version 1 was measured on."""
    sums = record.get("checkpoint_sha256")
    if record["notebook"] == "evaluate" and sums:
        return {variants.parse(record["asked"]["variant"]).checkpoint: sums}
    if record["notebook"] == "waterfall" and sums:
        return dict(sums)
    if record["notebook"] == "plan" and "plan" in record:
        return {"merged": record["plan"]["merged_sha256"]}
    return {}


def _upgrade_engines(record: dict) -> None:
    """Version 1 named one engine for all batch sizes.

    Before there were engines, every variant ran operator by operator.
    """
    if record["notebook"] == "evaluate" and "timings" in record:
        sizes = [str(timing["batch_size"]) for timing in record["timings"]]
        record |= _engine_by_size(record, sizes)
        record.setdefault("scratch_bytes", 0)
    if record["notebook"] == "waterfall" and "steps" in record:
        sizes = list(record["blocks_ms"])
        record["steps"] = {
            name: step | _engine_by_size(step, sizes)
            for name, step in record["steps"].items()
        }
    if record["notebook"] == "compare" and "blocks_ms" in record:
        warmed = record.get("warm_up", {})
        record["warm_up"] = {size: warmed.get(size, {}) for size in record["blocks_ms"]}


def _engine_by_size(old: dict, sizes: list[str]) -> dict[str, dict[str, str]]:
    """Return the engine that version 1 named, for each batch size."""
    ran, reason = old.get("engine_ran", "eager"), old.get("engine_reason", "")
    reasons = dict.fromkeys(sizes, reason) if reason else {}
    return {"engine_ran": dict.fromkeys(sizes, ran), "engine_reason": reasons}


def _upgrade_roofline(record: dict) -> None:
    """Version 1 measured one product in every evaluate record, in its own dtype.

    It counted all operations of a forward together, also those of 8-bit Linears.
    """
    old = record.get("roofline")
    if not old:
        return
    dtype = record["dtype"]
    variant = variants.parse(record["asked"]["variant"])
    kind, missing = dtype, {}
    eight_bit = {"int8": "int8", "w8a8": "int8", "fp8": "float8"}
    if variant.weights in eight_bit:
        kind = f"{eight_bit[variant.weights]} and {dtype}"
        missing = {kind: f"only the {dtype} product was measured then"}
    elif variant.plan:  # the record does not say whether the plan keeps 8-bit Linears
        kind = f"{variant.name.partition('-')[0]} and {dtype}"
        missing = {kind: f"the record does not tell 8-bit products from {dtype} ones"}
    flops = {size: {kind: number} for size, number in old["flops"].items()}
    record["roofline"] = {"flops": flops}
    record["ceilings"] = {
        "products": {dtype: {"square": [old["matmul_tflops"]]}},
        "copy_gbs": [old["copy_gbs"]],
        "missing": missing,
    }


def _upgrade_turns(record: dict) -> None:
    """Version 1 did not store which process of a variant timed which round.

    The first of them had no external models, and no key for them.
    """
    if record["notebook"] == "compare":
        record["turns"] = None
        record["ended"] = dict.fromkeys(record.get("blocks_ms", {}))
        record["asked"] = {"peers": []} | record["asked"]
