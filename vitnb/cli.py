"""The command line: ``vitnb`` and ``python -m vitnb`` are the same program."""

import argparse
import os
import sys
from pathlib import Path

from vitnb.errors import UserError, VariantError, one_line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitnb", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    download = commands.add_parser("download", help="fetch a published data set; run again, an interrupted one goes on")
    download.add_argument("dataset", help="flowers-102 (Oxford, 330 MB)")
    download.add_argument("--to", help="the folder that it makes (default: data/flowers-102)")

    study = commands.add_parser(
        "study", help="run a whole study: every notebook and variant that is not done yet, then the report"
    )
    study.add_argument(
        "study", nargs="?", default="embedded", help="a name under studies/, or a YAML file (default: embedded)"
    )
    study.add_argument("--dry-run", action="store_true", help="only list what would run")

    run = commands.add_parser("run", help="run one notebook headless")
    run.add_argument("notebook", help="finetune, evaluate, ablate or infer")
    run.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter; may be repeated"
    )
    run.add_argument(
        "--allow-failed", action="store_true", help="exit 0 if the variant cannot run here (its record says why)"
    )

    compare = commands.add_parser(
        "compare", help="let a study's variants take turns, a live process each, and write the ratios of their times"
    )
    compare.add_argument("study", nargs="?", default="embedded")
    compare.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")

    waterfall = commands.add_parser(
        "waterfall", help="measure one technique after the other: its gain, its cost in accuracy and memory"
    )
    waterfall.add_argument("study", help="a study that names batch sizes for it")
    waterfall.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")

    plan = commands.add_parser(
        "plan",
        help="choose what to keep in 16 (or 8) bits within a budget of bytes, export it, and prove it on images that chose nothing",
    )
    plan.add_argument("study", nargs="?", default="embedded")
    plan.add_argument("--name", help="its variants are plan:NAME-sdpa and so on (default: plus12 for --budget 0.12)")
    plan.add_argument("--budget", type=float, default=0.12, help="bytes beyond uniform NF4, as a share (default: 0.12)")
    plan.add_argument("--widths", type=int, nargs="+", default=[16], help="what may be kept: 16 (the default), or 8 16")

    show = commands.add_parser("show", help="print a record: what was asked, what ran, on what, with which versions")
    show.add_argument("record", help="a JSON file, or the name of a record of a study, such as evaluate-nf4-sdpa")

    report = commands.add_parser("report", help="make report.html and the CSV tables from the records alone")
    report.add_argument("study", nargs="?", default="embedded")

    publish = commands.add_parser(
        "publish", help="copy what is small of a study's results, for a repository: records, tables, figures, report"
    )
    publish.add_argument("study", nargs="?", default="embedded")
    publish.add_argument("--to", help="the folder that gets a folder of the study's name (default: outputs/published)")

    check = commands.add_parser("check", help="look through a checkpoint folder")
    check.add_argument("checkpoint")

    commands.add_parser("variants", help="list the variants")

    pretrain = commands.add_parser(
        "pretrain", help="make the base model of a study that has a pretrain section, or the embedded one (needs a GPU)"
    )
    pretrain.add_argument("study", nargs="?", help="whose base to make; left out, the options make the embedded one")
    pretrain.add_argument("--out", help="where the embedded base goes (default: data/base)")
    pretrain.add_argument("--steps", type=int)
    pretrain.add_argument("--batch-size", type=int)
    pretrain.add_argument("--seed", type=int)
    return parser


def _download(args) -> None:
    from vitnb import download, studies

    to = Path(args.to).expanduser().absolute() if args.to else studies.ROOT / "data" / args.dataset
    print(f"vitnb: {download.get(args.dataset, to)}")


def _study(args) -> None:
    from vitnb import scheduler

    print(f"vitnb: {scheduler.run(args.study, args.dry_run)}")


def _run(args) -> None:
    from vitnb import runner

    print(f"vitnb: {runner.run(args.notebook, args.p, args.allow_failed)}")


def _compare(args) -> None:
    from vitnb import compare, studies

    print(f"vitnb: {compare.run(studies.load(args.study), args.device)}")


def _waterfall(args) -> None:
    from vitnb import studies, waterfall

    print(f"vitnb: {waterfall.run(studies.load(args.study), args.device)}")


def _plan(args) -> None:
    from vitnb import planning, studies

    print(f"vitnb: {planning.run(studies.load(args.study), args.name, args.budget, args.widths)}")


def _show(args) -> None:
    from vitnb import show

    print(show.told(show.find(args.record)))


def _report(args) -> None:
    from vitnb import report, studies

    print(f"vitnb: {report.write(studies.load(args.study))}")


def _publish(args) -> None:
    from vitnb import publish, studies

    to = Path(args.to).expanduser() if args.to else studies.ROOT / "outputs" / "published"
    print(f"vitnb: {publish.publish(studies.load(args.study), to)}")


def _check(args) -> None:
    from vitnb import check

    print("\n".join(check.check(args.checkpoint)))


def _variants(args) -> None:
    from vitnb import variants

    print("\n".join(variants.SOURCE))
    print(f"and every other weights-attention or weights-attention-engine: weights {', '.join(variants.CHECKPOINTS)}; "
          f"attention {', '.join(variants.ATTENTIONS)}; engine {', '.join(variants.ENGINES)}; "
          "and plan:NAME as weights, for a plan of a study: see 'vitnb plan'")  # fmt: skip


def _pretrain(args) -> None:
    from vitnb import models, pretrain, studies

    given = {name: getattr(args, name) for name in ("steps", "batch_size") if getattr(args, name) is not None}
    if not args.study:
        out = args.out or "data/base"
        pretrain.pretrain(out, studies.Pretrain(**given), seed=args.seed or 0, device=models.device("cuda"))
    elif given or args.out or args.seed is not None:
        raise UserError("a study says itself how its base is made: leave the options out, or the study")
    else:
        out = pretrain.of_study(args.study)
    print(f"vitnb: {out}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's error is one line on standard error and exit code 1 (2: the command line itself)."""
    args = _parser().parse_args(arguments)
    action = {
        "download": _download,
        "study": _study,
        "run": _run,
        "compare": _compare,
        "waterfall": _waterfall,
        "plan": _plan,
        "show": _show,
        "report": _report,
        "publish": _publish,
        "check": _check,
        "variants": _variants,
        "pretrain": _pretrain,
    }
    try:
        action[args.command](args)
    except (UserError, VariantError) as error:
        print(f"vitnb: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vitnb: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
