"""Which records of a study belong together, and which are of another model or code.

A record belongs to its study's newest fine-tuning if it was measured on checkpoints
that the fine-tuning, or a plan of it, has made, and on the images of the newest record.
What does not belong is *outdated*: its numbers are left out, and a reason stands in
their place. Records of several versions of the code are named, and so are devices.
"""

from vitnb import variants

# Notebooks and measurements that begin without a fine-tuned checkpoint.
WITHOUT_CHECKPOINT = ("finetune", "pretrain", "ceilings")


def device_name(record: dict) -> str:
    """Return the name of the device that a record was measured on."""
    return record["identity"]["device"]


def newest(records: list[dict], notebook: str) -> dict | None:
    """Return the newest successful record of a notebook; None without one."""
    chosen = [
        record
        for record in records
        if record["notebook"] == notebook and record["status"] == "ok"
    ]
    return chosen[-1] if chosen else None


def checkpoints_made(records: list[dict]) -> dict[str, str] | None:
    """Return the SHA-256 of each export of the newest fine-tuning and of its plans.

    It is None where no fine-tuning has a record: then nothing is known.
    """
    training = newest(records, "finetune")
    if training is None:
        return None
    made = dict(training["checkpoint_sha256"])
    for record in records:
        plan = record.get("plan")
        if record["notebook"] != "plan" or record["status"] != "ok":
            continue
        if plan["merged_sha256"] == made.get("merged"):
            made[f"plan-{plan['name']}"] = record["checkpoint_sha256"]
    return made


def outdated_reasons(records: list[dict]) -> dict[str, str]:
    """Say of each record that does not belong to the others why it does not.

    Args:
        records: of one study, oldest first.

    Returns:
        {name of a record: reason}, without the records that belong.
    """
    made = checkpoints_made(records)
    training = newest(records, "finetune")
    images = _images_of_newest(records)
    reasons = {}
    for record in records:
        if record["status"] != "ok" or record["notebook"] in WITHOUT_CHECKPOINT:
            continue
        reason = ""
        if made is not None:
            reason = _other_checkpoint(record, made, training)
        reason = reason or _other_images(record, images)
        if reason:
            reasons[record["name"]] = f"{reason}: measure it again"
    return reasons


def _other_checkpoint(record: dict, made: dict[str, str], training: dict) -> str:
    """Say that a record is of another checkpoint, if it is."""
    measured = record["identity"]["checkpoints"]
    for name, sums in measured.items():
        if made.get(name) != sums:
            maker = "plan" if name.startswith("plan-") else "finetune"
            return f"measured on another checkpoint than the newest {maker} record made"
    if not measured and record["started"] < training["started"]:
        return "older than the newest fine-tuning, and names no checkpoint"
    return ""


def _images_of_newest(records: list[dict]) -> dict[str, str]:
    """Return the digest of each split in the newest record that has one."""
    images: dict[str, str] = {}
    for record in records:
        if record["status"] == "ok":
            images |= record["identity"]["data"]
    return images


def _other_images(record: dict, images: dict[str, str]) -> str:
    """Say that a record is of other images than the newest, if it is."""
    for split, digest in record["identity"]["data"].items():
        if digest != images[split]:
            return f"measured on other {split} images than the newest record"
    return ""


def comparison_record(records: list[dict]) -> dict | None:
    """Return the comparison that verdicts follow from; None without one.

    It is the one without a wish for a device, or else the newest.
    """
    for record in records:
        if record["name"] == "compare" and record["status"] == "ok":
            return record
    return newest(records, "compare")


def main_device(records: list[dict]) -> str:
    """Return the device that a study's verdicts are about.

    It is the comparison's; without one that of the newest baseline, or of the newest
    record.
    """
    compared = comparison_record(records)
    if compared:
        return device_name(compared)
    evaluated = [r for r in records if r["notebook"] == "evaluate"]
    baseline = [r for r in evaluated if r["asked"]["variant"] == variants.BASELINE]
    return device_name((baseline or evaluated or records)[-1])


def code_notes(records: list[dict]) -> list[str]:
    """Name the records that were measured by other code or packages than the others.

    Args:
        records: those that stand side by side.

    Returns:
        A sentence for each kind of mixture; none if all are of one code.
    """
    notes = []
    by_code: dict[str, list[dict]] = {}
    for record in records:
        by_code.setdefault(record["identity"]["code"], []).append(record)
    if len(by_code) > 1:
        groups = [
            f"{_names(group)} by commit {_commit(group[-1])}"
            for group in by_code.values()
        ]
        notes.append(
            "these numbers were not all measured by the same code: " + "; ".join(groups)
        )
    packages = {tuple(sorted(r["identity"]["packages"].items())) for r in records}
    if len(packages) > 1:
        changed = sorted(
            {
                name
                for name, _ in set.union(*map(set, packages))
                if len({dict(one).get(name) for one in packages}) > 1
            }
        )
        notes.append(
            "these numbers were not all measured with the same versions of "
            + ", ".join(changed)
        )
    return notes


def _commit(record: dict) -> str:
    return (record["machine"].get("commit") or "unknown")[:7]


def _names(group: list[dict]) -> str:
    names = [record["name"] for record in group]
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    return " and ".join(names)
