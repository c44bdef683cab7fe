"""Every caching policy over its knobs on the shipped digits model: compute, time and bytes against quality.

    python -m benchmarks.quality.pareto --workers 2

Every configuration samples the same noise as the exact network, in batches; each batch also has fresh exact runs in
between, and wall-clock ratios are taken against the nearest of them in the same process. An interrupted run goes on
where it stopped. Writes OUT/data.json, table.md and plot.png.
"""

import argparse
import json
import multiprocessing
import os
import queue
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the workers: each process is one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tqdm import tqdm

from benchmarks.common.hardware import commit, conditions
from benchmarks.common.results import OUT_HELP, default_folder
from benchmarks.quality.pareto_bytes import bytes_sent
from benchmarks.quality.pareto_calibration import check_seeds, with_calibrations
from benchmarks.quality.pareto_cases import CASES, EXACT, QUICK, STORAGE, checked
from benchmarks.quality.pareto_report import summarise, write_results
from benchmarks.quality.pareto_run import EXACT_EVERY, Job, Record, Settings, Unit, records, seconds_per_run, sha256
from moeca_dist.config import CacheConfig
from moeca_dist.demo.model_card import SHIPPED_CHECKPOINT
from moeca_dist.errors import UserError

TRIAL_IMAGES = 4


def main(argv: Sequence[str] | None = None) -> int:
    try:
        benchmark(parse_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT, help="a digits model (default: shipped)")
    parser.add_argument("--num-images", type=int, default=200, help="per seed; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103], help="default: 101 102 103")
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread that share the configurations")
    parser.add_argument(
        "--bytes-images", type=int, default=8, help="images sampled on 2 EP ranks to count bytes; 0: no"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="run the configurations whose name contains one of these"
    )
    parser.add_argument("--quick", action="store_true", help="4 images, 1 seed, 3 configurations: does it run?")
    parser.add_argument("--note", default="", help="a remark on the conditions, kept with the results")
    parser.add_argument("--out", type=Path, default=default_folder("pareto"), help=OUT_HELP)
    args = parser.parse_args(argv)
    if args.quick:
        args.num_images, args.seeds, args.bytes_images = 4, args.seeds[:1], 0
    return args


def benchmark(args: argparse.Namespace) -> None:
    known = CASES if args.only == [""] else (*CASES, *STORAGE)
    wanted = [case for case in known if any(part in case.name for part in args.only)]
    cases = [case for case in wanted if not args.quick or case.name in QUICK]
    if not cases:
        raise UserError(f"no configuration's name contains {' or '.join(map(repr, args.only))}")
    if min(args.num_images, args.batch_size, args.workers) < 1 or args.num_images < 2:
        raise UserError("--num-images must be at least 2, --batch-size and --workers at least 1")
    configs = checked(cases, args.num_steps, guided=args.cfg_scale != 1)
    check_seeds(args.seeds)
    settings = settings_of(args)
    calibrations = args.out.parent / "pareto.calibrations.partial"
    calibrated = [case.name for case in cases if case.calibrated]
    configs = with_calibrations(configs, calibrated, settings.checkpoint, args.num_steps, args.cfg_scale, calibrations)
    exact_job = Job(EXACT.name, CacheConfig(policy="none"), args.num_steps)
    jobs = [Job(case.name, configs[case.name], case.num_steps or args.num_steps) for case in cases]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.parent / "pareto.jsonl.partial"
    found = read_partial(partial, settings, [exact_job, *jobs])
    shares = plan(settings, exact_job, jobs, found, args)
    collect(partial, found, settings, exact_job, shares)
    sent = bytes_sent(settings, [exact_job, *jobs], args.bytes_images) if args.bytes_images else {}
    rows = summarise(found, [EXACT, *cases], sent)
    setting = conditions("cpu") | asdict(settings) | {"workers": args.workers, "note": args.note}
    setting |= {"bytes_measured_on_images": args.bytes_images, "threads_per_worker": 1}
    write_results(rows, setting, args.out)
    partial.unlink()
    shutil.rmtree(calibrations, ignore_errors=True)


def settings_of(args: argparse.Namespace) -> Settings:
    if not args.checkpoint.is_file():
        raise UserError(f"{args.checkpoint} does not exist: give the digits model with --checkpoint")
    checkpoint = args.checkpoint.resolve()
    return Settings(
        checkpoint=os.path.relpath(checkpoint),
        checkpoint_sha256=sha256(checkpoint),
        commit=commit(),
        num_images=args.num_images,
        seeds=tuple(args.seeds),
        num_steps=args.num_steps,
        cfg_scale=args.cfg_scale,
        batch_size=args.batch_size,
    )


# ---- dividing the work -----------------------------------------------------------------------------------------------


def plan(
    settings: Settings, exact_job: Job, jobs: Sequence[Job], found: Sequence[Record], args: argparse.Namespace
) -> list[list[Job]]:
    """The configurations of each worker, balanced by a short trial of all of them; prints what is to come."""
    trial = seconds_per_run(settings, [exact_job, *jobs], min(TRIAL_IMAGES, settings.num_images))
    shares: list[list[Job]] = [[] for _ in range(args.workers)]
    load = [0.0] * args.workers
    for job in sorted(jobs, key=lambda job: -trial[job.name]):
        lightest = load.index(min(load))
        shares[lightest].append(job)
        load[lightest] += trial[job.name]
    exacts = max(-(-len(share) // EXACT_EVERY) for share in shares)
    images = settings.num_images * len(settings.seeds)
    whole = (max(load) + exacts * trial[exact_job.name]) * images / min(TRIAL_IMAGES, settings.num_images)
    left = 1 - len(found) / ((len(jobs) + 1) * len(settings.units))
    print(
        f"{len(jobs)} configurations x {images} images in {args.workers} process(es): at most {whole * left / 60:.0f} "
        f"min (by a trial with few images), {left:.0%} of it still to do",
        flush=True,
    )
    return shares


def collect(
    partial: Path, found: list[Record], settings: Settings, exact_job: Job, shares: Sequence[Sequence[Job]]
) -> None:
    """Run what is missing; every record goes to the partial file at once and to ``found``."""
    done: dict[str, set[Unit]] = {}
    for record in found:
        done.setdefault(record["name"], set()).add((record["seed"], record["batch"]))
    total = (1 + sum(map(len, shares))) * len(settings.units)
    with partial.open("a") as lines, tqdm(total=total, initial=len(found), unit="batch", smoothing=0) as bar:
        for record in from_workers(settings, exact_job, shares, done):
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            found.append(record)
            bar.update()


def from_workers(
    settings: Settings, exact_job: Job, shares: Sequence[Sequence[Job]], done: Mapping[str, set[Unit]]
) -> Iterator[Record]:
    if len(shares) == 1:
        yield from records(settings, exact_job, shares[0], done, keep_exact=True)
        return
    context = multiprocessing.get_context("spawn")
    inbox: Any = context.Queue()
    processes = [
        context.Process(target=serve, args=(inbox, settings, exact_job, share, done, first == 0), daemon=True)
        for first, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    try:
        running = len(processes)
        while running:
            try:
                message = inbox.get(timeout=5)
            except queue.Empty:
                if any(process.exitcode for process in processes):
                    raise RuntimeError("a worker died; run the same command again to go on") from None
                continue
            if message is None:
                running -= 1
            elif isinstance(message, str):
                raise RuntimeError(f"a worker failed:\n{message}")
            else:
                yield message
    finally:
        for process in processes:
            process.kill()


def serve(inbox: Any, *job: Any) -> None:
    """A worker: its records, then None; or the traceback of what went wrong."""
    try:
        for record in records(*job):
            inbox.put(record)
        inbox.put(None)
    except Exception:
        inbox.put(traceback.format_exc())


# ---- the partial file ------------------------------------------------------------------------------------------------


def read_partial(path: Path, settings: Settings, jobs: Sequence[Job]) -> list[Record]:
    """What an interrupted run left, without a half-written last line; starts the file where there is none."""
    header = json.loads(json.dumps({"settings": asdict(settings)}))
    found: list[Record] = []
    if path.exists():
        lines = path.read_text().splitlines()
        if not lines or json.loads(lines[0]) != header:
            raise UserError(f"{path} is of a run with other settings or another commit: remove it, or choose --out")
        wanted = {job.name: job.options for job in jobs}
        for line in lines[1:]:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if wanted.get(record["name"]) == record["options"]:
                found.append(record)
    with closing(path.open("w")) as kept:
        kept.writelines(json.dumps(line) + "\n" for line in [header, *found])
    return found


if __name__ == "__main__":
    sys.exit(main())
