"""How often the comparison errs: a variant against itself, with and without extra work.

``python tests/benchmarks/same_against_same.py`` repeats the comparison of a study, with
as many names, fresh processes, batch sizes, budget and rule to stop as the study has.
But all names are one variant. One such comparison is a launch. Of each launch the first
two names are compared, as decided beforehand: launches are independent, the pairs of
one launch are not. A launch of ``same.csv`` that calls them different is a false call.
In a launch of ``slower.csv``, the second name does 2% more work: one that does not call
it slower is a miss. ``pairs.csv`` has all pairs of all launches.

Each set of cores that ``--cores`` names, such as ``0,1 2,3``, runs a part of the
launches, with a thread for each of its cores. Every launch is written as it ends, into
``launches`` beside the tables. A launch that lies there is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from vitnb import statistics
from vitnb.study import ROOT, Study, load_study

VARIANT = "fp32-sdpa"
KINDS = ("same", "slower")
EXTRA = {"same": 0.0, "slower": 0.02}
GRACE_MINUTES = 1.0  # for launches that were started in time


def name_copies(study: Study) -> list[str]:
    """Return as many names as the study compares: a, b, c and so on."""
    return [chr(ord("a") + i) for i in range(len(study.variants))]


def choose_cores(cores: str) -> None:
    """Run this process, and all that it starts, on these cores alone."""
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})


def run_launch(study: Study, kind: str, number: int) -> dict:
    """Compare copies of one variant once, as ``vitnb compare`` compares variants.

    Returns:
        rows: of every pair at every batch size. The first name is b, the second a, so a
            ratio above 1 says that the second takes longer.
        failed: what failed; empty if nothing did.
    """
    from slower import load_copy, load_slower_copy

    from vitnb.analysis.comparison import pair_ratios
    from vitnb.measure.comparison import measure_comparison

    names, begin = name_copies(study), time.monotonic()
    loads = dict.fromkeys(names, load_copy)
    if kind == "slower":
        loads[names[1]] = load_slower_copy
    copies = replace(study, variants=names, peers=[], seed=number)
    measured = measure_comparison(copies, "cpu", loads=loads)
    seconds, rows = time.monotonic() - begin, []
    for size, blocks in measured["blocks_ms"].items():
        ratios = pair_ratios(blocks, measured["turns"][size])
        for (a, b), ratio in ratios.items():
            if a > b:
                rows.append(
                    {
                        "launch": number,
                        "batch_size": int(size),
                        "a": a,
                        "b": b,
                        "ratio": ratio.ratio,
                        "low": ratio.low,
                        "high": ratio.high,
                        "p": ratio.p,
                        "df": ratio.df,
                        "rounds": ratio.samples,
                        "excludes_one": ratio.excludes_one,
                        "different": ratio.different,
                        "ended": measured["ended"][size],
                        "seconds": round(seconds, 1),
                    }
                )
    failed = [f"{name}: {reason}" for name, reason in measured["failed"].items()]
    return {"rows": rows, "failed": "; ".join(failed)}


def run_share(options: argparse.Namespace) -> None:
    """Run the launches of one set of cores, and write a file each.

    None is started that would not end in time if it took as long as the longest so far.
    """
    choose_cores(options.cores[options.share])
    from vitnb.records.files import write_file

    study = chosen_study(options)
    about = describe_setting(study)
    start, longest = time.monotonic(), 0.0
    for kind, number in planned_launches(options)[options.share :: len(options.cores)]:
        path = launch_path(options, kind, number)
        if path.is_file():
            continue
        begin = time.monotonic()
        if begin - start + longest > 60 * options.minutes:
            return
        try:
            done = run_launch(study, kind, number)
        except Exception as error:  # the next launch may work
            done = {"rows": [], "failed": f"{type(error).__name__}: {error}"}
        write_file(path, json.dumps(done | {"number": number, "about": about}))
        longest = max(longest, time.monotonic() - begin)
        print(
            f"{kind} {number}: {done['failed'] or 'done'}, "
            f"{time.monotonic() - begin:.0f} s",
            flush=True,
        )


def describe_setting(study: Study) -> dict:
    """Return what all launches of a run have in common, for every row."""
    from vitnb.records import machine

    here = machine.describe_machine()
    return {
        "study": study.name,
        "variant": VARIANT,
        "names": len(study.variants),
        "processes": study.compare.processes,
        "most_rounds": study.compare.rounds,
        "most_seconds": study.compare.seconds,
        "forwards": study.compare.forwards,
        "precision": study.compare.precision,
        "level": statistics.PAIR_LEVEL,
        "margin": statistics.PAIR_MARGIN,
        "device": here["cpu"],
        "threads": here["threads"],
        "commit": here["commit"],
        "dirty": here["dirty"],
        "code_sha256": here["code_sha256"],
        "torch": machine.versions()["torch"],
    }


def chosen_study(options: argparse.Namespace) -> Study:
    """Return the study with the batch sizes, and the budget if another is asked for."""
    study = load_study(options.study)
    budget = {
        name: value
        for name, value in vars(options).items()
        if name in ("rounds", "seconds", "processes") and value is not None
    }
    return replace(
        study,
        batch_sizes=options.batch_sizes,
        compare=replace(study.compare, **budget),
    )


def planned_launches(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return kind and number of every launch.

    The order mixes both kinds, so that a bad minute does not hit one alone.
    """
    launches = [
        (kind, number)
        for kind, count in zip(KINDS, options.launches, strict=True)
        for number in range(count)
    ]
    return sorted(launches, key=lambda it: (it[1] + 0.5) / counts_of(options)[it[0]])


def counts_of(options: argparse.Namespace) -> dict[str, int]:
    return dict(zip(KINDS, options.launches, strict=True))


def launch_path(options: argparse.Namespace, kind: str, number: int) -> Path:
    return options.out / "launches" / f"{kind}-{number:03d}.json"


def gather_tables(
    folder: Path, study: Study
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, list[str]]:
    """Gather all launches of a folder.

    Returns:
        {kind: a row for each launch and batch size, of the pair that counts}; all
        pairs; the launches that failed, which stand in no table.
    """
    tables, every, failed = {}, [], []
    first, second = name_copies(study)[:2]
    for kind in KINDS:
        rows = []
        for path in sorted(folder.glob(f"{kind}-*.json")):
            done = json.loads(path.read_text())
            if done["failed"]:
                failed.append(f"{kind} {done['number']}: {done['failed']}")
                continue
            rows += [row | done["about"] for row in done["rows"]]
            every += [{"kind": kind} | row for row in done["rows"]]
        table = pd.DataFrame(rows)
        if not table.empty:
            counted = (table.a == second) & (table.b == first)
            table = table[counted].drop(columns=["a", "b"])
            table = table.sort_values(["launch", "batch_size"], ignore_index=True)
            table = table.assign(extra=EXTRA[kind])
        tables[kind] = table
    return tables, pd.DataFrame(every), failed


def write_tables(options: argparse.Namespace) -> None:
    """Write same.csv, slower.csv and pairs.csv from the launches so far."""
    from vitnb.records.files import write_file

    tables, every, _ = gather_tables(options.out / "launches", chosen_study(options))
    for name, table in {**tables, "pairs": every}.items():
        if not table.empty:
            content = table.to_csv(index=False, lineterminator="\n")
            write_file(options.out / f"{name}.csv", content)


def describe_share(what: str, hits: int, count: int) -> str:
    """Return a share with its exact 95% interval (Clopper and Pearson, 1934)."""
    ends = stats.binomtest(hits, count).proportion_ci(0.95, method="exact")
    return f"{what}: {hits} of {count} ({ends.low:.1%} to {ends.high:.1%})"


def describe_rows(kind: str, rows: pd.DataFrame) -> list[str]:
    """Describe the errors of one kind at one batch size, in lines."""
    if kind == "same":
        hits = {
            "p below 0.05": rows.p < 0.05,
            "false calls without margin": rows.excludes_one,
            "false calls": rows.different,
        }
    else:
        hits = {"missed": ~(rows.different & (rows.ratio > 1))}
    lines = [
        describe_share(what, int(hit.sum()), len(rows)) for what, hit in hits.items()
    ]
    half = ((rows.high / rows.low) ** 0.5 - 1).median()
    ends = [f"{count} x {why}" for why, count in rows.ended.value_counts().items()]
    lines.append(
        f"median ratio {rows.ratio.median():.4f}, half of an interval {half:.2%}"
    )
    lines.append(f"{rows.rounds.median():.0f} rounds, ended {', '.join(ends)}")
    return lines


def summarize(options: argparse.Namespace) -> list[str]:
    """Describe the errors of each kind and batch size, and what failed, in lines."""
    tables, _, failed = gather_tables(options.out / "launches", chosen_study(options))
    lines = [
        f"{kind}, batch {size}: {line}"
        for kind, table in tables.items()
        if len(table)
        for size, rows in table.groupby("batch_size")
        for line in describe_rows(kind, rows)
    ]
    return lines + [f"failed: {line}" for line in failed]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "published" / "instrument"
    )
    parser.add_argument("--study", default="embedded", help="whose setting is repeated")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--launches", type=int, nargs=2, default=(120, 100), metavar=("SAME", "SLOWER")
    )
    parser.add_argument(
        "--cores", nargs="+", default=["0,1"], help="sets of cores, such as 0,1 2,3"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e6,
        help="start no launch that would end after that",
    )
    for name, kind in (("rounds", int), ("seconds", float), ("processes", int)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the study's own")
    # Which set of cores this process is for.
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_shares(options: argparse.Namespace) -> None:
    """Run a process for each set of cores, and write tables while they run."""
    words = [sys.executable, *sys.argv, "--share"]
    shares = [subprocess.Popen([*words, str(i)]) for i in range(len(options.cores))]
    end = time.monotonic() + 60 * (options.minutes + GRACE_MINUTES)
    while any(share.poll() is None for share in shares):
        if time.monotonic() > end:
            for share in shares:
                share.terminate()
            print("time is over: launches that still ran are left out", flush=True)
            break
        time.sleep(2)
        write_tables(options)
    if codes := [share.wait() for share in shares if share.wait()]:
        print(f"{len(codes)} of {len(shares)} shares ended early", flush=True)


def main() -> None:
    options = parse_arguments()
    (options.out / "launches").mkdir(parents=True, exist_ok=True)
    if options.share is not None:
        run_share(options)
        return
    run_shares(options)
    write_tables(options)
    print("\n".join(summarize(options)))


if __name__ == "__main__":
    main()
