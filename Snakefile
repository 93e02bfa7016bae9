# Which notebook runs after which, for which variant: `python -m vitnb study NAME`.
#
# Every job takes all cores: a job that measures time shares the machine with no other.
# The outputs are marks, see vitnb/workflow.py.
# Priorities: the variants and their comparison come first, so that a run that is cut
# short has the main part.
from vitnb import variants
from vitnb.study import ROOT, load_study
from vitnb.workflow import job_names, mark

study = load_study(config.get("study", "embedded"))
asked = config.get("study", "embedded")
marks = study.outputs / ".jobs"
python = sys.executable
source = ROOT / "studies" / f"{asked}.yaml"
if asked.endswith((".yaml", ".yml")):
    source = asked
measured = [mark(study, name) for name in job_names(study)]
base = [mark(study, "pretrain")] if study.pretrain else []
# The variant of each name in file names.
named = {variants.parse(variant).file: variant for variant in study.variants}


def exported(variant):
    """Return the mark of the job that makes a variant's checkpoint."""
    plan = variants.parse(variant).plan
    return marks / (f"plan-{plan}" if plan else "finetune")


rule all:
    input:
        marks / "report",
        measured,  # a lost record is made again even if the report is newer


if study.pretrain:

    # A base depends on its settings alone: another change of the study keeps it.
    rule pretrain:
        output:
            touch(marks / "pretrain"),
        params:
            settings=vars(study.pretrain),
            seed=study.seed,
        threads: workflow.cores
        shell:
            "{python:q} -m vitnb pretrain {asked:q}"


rule finetune:
    input:
        source,
        base,
    output:
        touch(marks / "finetune"),
    threads: workflow.cores
    shell:
        "{python:q} -m vitnb run finetune -p study {asked:q}"


rule evaluate:
    input:
        source,
        lambda wildcards: exported(named[wildcards.variant]),
    output:
        touch(marks / "evaluate-{variant}"),
    params:
        variant=lambda wildcards: named[wildcards.variant],
    priority: 50
    threads: workflow.cores
    shell:
        "{python:q} -m vitnb run evaluate -p study {asked:q} -p variant {params.variant:q} --allow-failed"


rule compare:
    input:
        source,
        marks / "finetune",
        *(marks / f"evaluate-{name}" for name in named),
    output:
        touch(marks / "compare"),
    priority: 40
    threads: workflow.cores
    shell:
        "{python:q} -m vitnb compare {asked:q}"


if study.waterfall:

    rule waterfall:
        input:
            source,
            marks / "finetune",
        output:
            touch(marks / "waterfall"),
        priority: 30
        threads: workflow.cores
        shell:
            "{python:q} -m vitnb waterfall {asked:q}"


rule ablate:
    input:
        source,
        marks / "finetune",
    output:
        touch(marks / "ablate"),
    priority: 20
    threads: workflow.cores
    shell:
        "{python:q} -m vitnb run ablate -p study {asked:q}"


rule plan:  # for another budget: python -m vitnb plan
    input:
        source,
        marks / "finetune",
    output:
        touch(marks / "plan-{name}"),
    params:
        share=lambda wildcards: study.plans[wildcards.name],
    priority: 15
    threads: workflow.cores
    shell:
        "{python:q} -m vitnb plan {asked:q} --name {wildcards.name} --budget {params.share}"


rule infer:
    input:
        source,
        exported(study.infer_variant),
    output:
        touch(marks / "infer"),
    priority: 10
    threads: workflow.cores
    shell:
        "{python:q} -m vitnb run infer -p study {asked:q} -p variant {study.infer_variant:q}"


rule report:
    input:
        source,
        measured,
    output:
        touch(marks / "report"),
    threads: workflow.cores
    shell:
        "{python:q} -m vitnb report {asked:q}"
