"""The command line: ``vitnb`` and ``python -m vitnb`` are the same program."""

import argparse
import os
import sys
from pathlib import Path

from vitnb.errors import UserError, VariantError, describe_file_error, one_line


def _download(args) -> object:
    from vitnb.data.flowers102 import download
    from vitnb.study import ROOT

    to = Path(args.to).expanduser().absolute() if args.to else None
    return download(args.dataset, to or ROOT / "data" / args.dataset)


def _study(args) -> object:
    from vitnb.workflow import run_study

    return run_study(args.study, args.dry_run)


def _run(args) -> object:
    from vitnb.notebooks import run_notebook

    return run_notebook(args.notebook, args.p, args.allow_failed)


def _compare(args) -> object:
    from vitnb.measure.comparison import compare_study
    from vitnb.study import load_study

    return compare_study(load_study(args.study), args.device)


def _waterfall(args) -> object:
    from vitnb.measure.waterfall import run_waterfall
    from vitnb.study import load_study

    return run_waterfall(load_study(args.study), args.device)


def _plan(args) -> object:
    from vitnb.mixed_precision.search import make_plan
    from vitnb.study import load_study

    return make_plan(load_study(args.study), args.name, args.budget, args.widths)


def _report(args) -> object:
    from vitnb.report.page import write_report
    from vitnb.study import load_study

    return write_report(load_study(args.study))


def _publish(args) -> object:
    from vitnb.report.publication import publish
    from vitnb.study import ROOT, load_study

    to = Path(args.to).expanduser() if args.to else ROOT / "outputs" / "published"
    return publish(load_study(args.study), to)


def _pretrain(args) -> object:
    from vitnb.devices import select_device
    from vitnb.records.parameters import check_parameters
    from vitnb.study import Pretrain
    from vitnb.training import pretrain

    options = {"steps": args.steps, "batch_size": args.batch_size}
    check_parameters(options | {"seed": args.seed})
    given = {name: value for name, value in options.items() if value is not None}
    if args.study:
        if given or args.out or args.seed is not None:
            raise UserError(
                "a study says itself how its base is made: "
                "leave the options out, or the study"
            )
        return pretrain.pretrain_for_study(args.study)
    out, device = Path(args.out or "data/base").expanduser(), select_device("cuda")
    pretrain.pretrain(out, Pretrain(**given), seed=args.seed or 0, device=device)
    return out


def _show(args) -> None:
    from vitnb.records.reader import find_record, format_record

    print(format_record(find_record(args.record)))


def _diff(args) -> None:
    from vitnb.analysis.differences.pairs import find_differences
    from vitnb.analysis.differences.text import format_differences

    print(format_differences(find_differences(args.a, args.b)))


def _check(args) -> None:
    from vitnb.models.inspection import inspect_checkpoint

    print("\n".join(inspect_checkpoint(args.checkpoint)))


def _variants(args) -> None:
    from vitnb import variants

    print("\n".join(variants.SOURCE_STUDY))
    print(
        "and every other weights-attention or weights-attention-engine: "
        f"weights {', '.join(variants.CHECKPOINTS)}; "
        f"attention {', '.join(variants.ATTENTIONS)}; "
        f"engine {', '.join(variants.ENGINES)}; "
        "and plan:NAME as weights, for a plan of a study: see 'vitnb plan'"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitnb", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run, help: str, study: bool = False
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        if study:
            made.add_argument(
                "study",
                nargs="?",
                default="embedded",
                help="a name under studies/, or a YAML file (default: embedded)",
            )
        return made

    download = command(
        "download",
        _download,
        "fetch a published data set; run again, an interrupted one goes on",
    )
    download.add_argument("dataset", help="flowers-102 (Oxford, 330 MB)")
    download.add_argument(
        "--to", help="the folder that it makes (default: data/flowers-102)"
    )

    study = command(
        "study",
        _study,
        "run a whole study: every notebook and variant not done yet, then the report",
        study=True,
    )
    study.add_argument(
        "--dry-run", action="store_true", help="only list what would run"
    )

    run = command("run", _run, "run one notebook headless")
    run.add_argument("notebook", help="finetune, evaluate, ablate or infer")
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter; may be repeated",
    )
    run.add_argument(
        "--allow-failed",
        action="store_true",
        help="exit 0 if the variant cannot run here (its record says why)",
    )

    compare = command(
        "compare",
        _compare,
        "time a study's variants interleaved, a process each, and write the ratios",
        study=True,
    )
    waterfall = command(
        "waterfall",
        _waterfall,
        "measure one technique after the other: its gain, its cost",
    )
    waterfall.add_argument("study", help="a study that names batch sizes for it")
    for one in (compare, waterfall):
        one.add_argument(
            "--device", help="cpu or cuda (default: the GPU if there is one)"
        )

    plan = command(
        "plan",
        _plan,
        "choose what to keep in 16 (or 8) bits within a budget of bytes, export it, "
        "and validate it on images that chose nothing",
        study=True,
    )
    plan.add_argument(
        "--name",
        help="its variants are plan:NAME-sdpa and so on (default: plus12)",
    )
    plan.add_argument(
        "--budget",
        type=float,
        default=0.12,
        help="bytes beyond uniform NF4, as a share (default: 0.12)",
    )
    plan.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[16],
        help="what may be kept: 16 (the default), or 8 16",
    )

    show = command(
        "show",
        _show,
        "print a record: what was asked, what ran, on what, with which versions",
    )
    show.add_argument(
        "record",
        help="a JSON file, or the name of a record, such as evaluate-nf4-sdpa",
    )

    diff = command(
        "diff",
        _diff,
        "two records, or two studies' outputs, side by side: what was asked, what ran, "
        "what was found, and which differences are beyond noise",
    )
    for side in ("a", "b"):
        diff.add_argument(
            side,
            metavar=side.upper(),
            help="a record (JSON file or name), a study, or a folder of outputs",
        )

    command(
        "report",
        _report,
        "make report.html and the CSV tables from the records alone",
        study=True,
    )
    publish = command(
        "publish",
        _publish,
        "copy a study's small results (records, tables, figures, report) for git",
        study=True,
    )
    publish.add_argument(
        "--to",
        help="the folder that gets the study's (default: outputs/published)",
    )

    check = command("check", _check, "inspect a checkpoint folder")
    check.add_argument("checkpoint")

    command("variants", _variants, "list the variants")

    pretrain = command(
        "pretrain",
        _pretrain,
        "make the base model of a study that has a pretrain section, "
        "or the embedded one (needs a GPU)",
    )
    pretrain.add_argument(
        "study",
        nargs="?",
        help="whose base to make; left out, the options make the embedded one",
    )
    pretrain.add_argument(
        "--out", help="where the embedded base goes (default: data/base)"
    )
    pretrain.add_argument("--steps", type=int)
    pretrain.add_argument("--batch-size", type=int)
    pretrain.add_argument("--seed", type=int)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    A user's error, or a file that cannot be written or opened, is one line on standard
    error and exit code 1 (2: the command line itself is wrong).
    """
    args = _parser().parse_args(arguments)
    try:
        made = args.run(args)
        if made is not None:
            print(f"vitnb: {made}")
    except (UserError, VariantError) as error:
        print(f"vitnb: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vitnb: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        told = describe_file_error(error)
        if not told:
            raise
        print(f"vitnb: {one_line(told)}", file=sys.stderr)
        return 1
    return 0
