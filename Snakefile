# Which notebook runs after which, for which variant: `python -m vitnb study NAME`.
#
# Every job takes all cores: a job that measures time shares the machine with no other.
# Priorities: the variants and their comparison come first, so that a run that is cut
# short has the main part.
from vitnb import variants
from vitnb.study import ROOT, load_study

study = load_study(config.get("study", "embedded"))
asked = config.get("study", "embedded")
records = study.outputs / "records"
source = ROOT / "studies" / f"{asked}.yaml"
if asked.endswith((".yaml", ".yml")):
    source = asked
base = []
if study.pretrain:
    base.append(records / "pretrain.json")
measured = [
    *base,
    records / "finetune.json",
    *(records / f"evaluate-{variants.parse(variant).file}.json" for variant in study.variants),
    records / "compare.json",
    records / "ablate.json",
    *(records / f"plan-{name}.json" for name in study.plans),
    records / "infer.json",
]
if study.waterfall:
    measured.append(records / "waterfall.json")
# The variant of each name in file names.
named = {variants.parse(variant).file: variant for variant in study.variants}


def exported(variant):
    """Return the record of the job that makes a variant's checkpoint."""
    plan = variants.parse(variant).plan
    return records / (f"plan-{plan}.json" if plan else "finetune.json")


rule all:
    input:
        study.outputs / "report.html",
        measured,  # a lost record is made again even if the report is newer


if study.pretrain:

    # A base depends on its settings alone: another change of the study keeps it.
    rule pretrain:
        output:
            records / "pretrain.json",
            directory(study.own_base),
        params:
            settings=vars(study.pretrain),
            seed=study.seed,
        threads: workflow.cores
        shell:
            "{sys.executable} -m vitnb pretrain {asked}"


rule finetune:
    input:
        source,
        base,
    output:
        records / "finetune.json",
        *(directory(study.checkpoint(name)) for name in ("merged", "nf4", "int8")),
    threads: workflow.cores
    shell:
        "{sys.executable} -m vitnb run finetune -p study {asked}"


rule evaluate:
    input:
        source,
        lambda wildcards: exported(named[wildcards.variant]),
    output:
        records / "evaluate-{variant}.json",
    params:
        variant=lambda wildcards: named[wildcards.variant],
    priority: 50
    threads: workflow.cores
    shell:
        "{sys.executable} -m vitnb run evaluate -p study {asked} -p variant {params.variant} --allow-failed"


rule compare:
    input:
        source,
        records / "finetune.json",
        *(records / f"evaluate-{name}.json" for name in named),
    output:
        records / "compare.json",
        study.outputs / "ratios.csv",
    priority: 40
    threads: workflow.cores
    shell:
        "{sys.executable} -m vitnb compare {asked}"


if study.waterfall:

    rule waterfall:
        input:
            source,
            records / "finetune.json",
        output:
            records / "waterfall.json",
            study.outputs / "waterfall.csv",
        priority: 30
        threads: workflow.cores
        shell:
            "{sys.executable} -m vitnb waterfall {asked}"


rule ablate:
    input:
        source,
        records / "finetune.json",
    output:
        records / "ablate.json",
        study.outputs / "ablation.csv",
    priority: 20
    threads: workflow.cores
    shell:
        "{sys.executable} -m vitnb run ablate -p study {asked}"


rule plan:  # for another budget: python -m vitnb plan
    input:
        source,
        records / "finetune.json",
    output:
        records / "plan-{name}.json",
        study.outputs / "plans" / "{name}.json",
        directory(study.checkpoint("plan-{name}")),
    params:
        share=lambda wildcards: study.plans[wildcards.name],
    priority: 15
    threads: workflow.cores
    shell:
        "{sys.executable} -m vitnb plan {asked} --name {wildcards.name} --budget {params.share}"


rule infer:
    input:
        source,
        exported(study.infer_variant),
    output:
        records / "infer.json",
        study.outputs / "predictions.csv",
    priority: 10
    threads: workflow.cores
    shell:
        "{sys.executable} -m vitnb run infer -p study {asked} -p variant {study.infer_variant}"


rule report:
    input:
        source,
        measured,
    output:
        study.outputs / "report.html",
        study.outputs / "summary.csv",
        study.outputs / "accuracy.csv",
        study.outputs / "claims.csv",
    threads: workflow.cores
    shell:
        "{sys.executable} -m vitnb report {asked}"
