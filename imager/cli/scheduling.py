"""imager schedule add, list, show, run, remove; imager status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from imager.cli.options import JsonOption, ProgressOption, RepoOption
from imager.cli.output import print_json, print_table

if TYPE_CHECKING:
    from datetime import datetime

    from imager.imaging import Imaged
    from imager.jobrecord import JobRun
    from imager.jobs import Job
    from imager.jobstatus import Status
    from imager.progress import Progress
    from imager.repository import Repository
    from imager.schedule import Capturing

app = typer.Typer(help="Take images by the calendar, with timers of systemd.", no_args_is_help=True)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]


def _keep(what: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        metavar="N", min=0, help=f"After each run keep the newest image of the last N {what}."
    )
    return option


@app.command()
def add(
    job: JobArgument,
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE]...", help="Disks, or image files.")
    ] = None,
    all_disks: Annotated[
        bool, typer.Option("--all-disks", help="Every disk of this machine, as one image.")
    ] = False,
    calendar: Annotated[
        str, typer.Option(metavar="WHEN", help="As systemd.time(7): daily, Mon..Fri 02:30.")
    ] = "daily",
    random_delay: Annotated[
        str,
        typer.Option(metavar="SPAN", help="Begin up to so much later, so that not all do at once."),
    ] = "0",
    image: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Of the images. Default: host or file.")
    ] = "",
    note: Annotated[str, typer.Option(help="A text to find the images by.")] = "",
    keep_last: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="After each run keep the newest N images."),
    ] = None,
    keep_hourly: Annotated[int | None, _keep("hours that have one")] = None,
    keep_daily: Annotated[int | None, _keep("days that have one")] = None,
    keep_weekly: Annotated[int | None, _keep("weeks that have one")] = None,
    keep_monthly: Annotated[int | None, _keep("months that have one")] = None,
    keep_yearly: Annotated[int | None, _keep("years that have one")] = None,
    gc: Annotated[
        str, typer.Option(metavar="weekly|always|never", help="How often a run ends with a gc.")
    ] = "weekly",
    consistency: Annotated[str, typer.Option(help="As of imager capture.")] = "auto",
    exclude_partitions: Annotated[
        list[str] | None,
        typer.Option("--exclude-partition", help="As of imager capture; may be given again."),
    ] = None,
    nice: Annotated[int, typer.Option(min=0, max=19, help="CPU priority, 19 is the least.")] = 10,
    io: Annotated[
        str, typer.Option(metavar="idle|best-effort", help="I/O priority: only when idle, or low.")
    ] = "idle",
    cpu_weight: Annotated[
        int, typer.Option(metavar="1-10000", help="CPU share beside others, who have 100.")
    ] = 20,
    timeout: Annotated[
        str, typer.Option(metavar="SPAN", help="A run that takes longer is stopped.")
    ] = "1d",
    environment_file: Annotated[
        str, typer.Option(metavar="FILE", help="Lines NAME=VALUE for the run: secrets, proxies.")
    ] = "",
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Write a job and its timer, or write them anew, and start the timer."""
    from dataclasses import replace

    from imager.config import repository_url
    from imager.jobrecord import load_record, save_record
    from imager.jobs import Job, Keep, save_job
    from imager.repository import utc_now
    from imager.systemdunits import install_units, service_text, timer_text, unit_folder, unit_name

    new = Job(
        name=job,
        calendar=calendar,
        sources=tuple(sources or ()),
        all_disks=all_disks,
        image=image,
        note=note,
        repo=repository_url(repo),
        random_delay=random_delay,
        keep=Keep(keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly),
        gc=gc,
        consistency=consistency,
        exclude_partitions=tuple(exclude_partitions or ()),
        nice=nice,
        io=io,
        cpu_weight=cpu_weight,
        timeout=timeout,
        environment_file=environment_file,
    )
    new.check()
    _check_capture(new)
    timer_text(new), service_text(new)  # an error comes before anything is written
    file = save_job(new)
    record = load_record(job)
    if not record.added:
        save_record(job, replace(record, added=utc_now()))
    runs = install_units(new)
    units = [str(unit_folder() / unit_name(job, kind)) for kind in ("timer", "service")]
    if json:
        print_json({"job": job, "file": str(file), "units": units, "enabled": runs})
        return
    print(f"job {job}: {file}")
    for unit in units:
        print(f"  {unit}")
    if runs:
        print(f"next run: {_show_time(_next_run(new))}")
    else:
        print("no systemd runs here that sees these units: the timer is not started")


@app.command("list")
def list_jobs(json: JsonOption = False) -> None:
    """List the jobs of this machine."""
    from imager.jobrecord import load_record
    from imager.jobs import job_names, load_job

    jobs = [load_job(name) for name in job_names()]
    if json:
        print_json([job.to_json() for job in jobs])
        return
    rows = []
    for job in jobs:
        last = load_record(job.name).last
        rows.append(
            (
                job.name,
                job.calendar,
                _show_time(_next_run(job)),
                last.started if last else "never",
                last.result if last else "",
                "all disks" if job.all_disks else " ".join(job.sources),
            )
        )
    print_table(["JOB", "CALENDAR", "NEXT", "LAST", "RESULT", "SOURCES"], rows)


@app.command()
def show(job: JobArgument, json: JsonOption = False) -> None:
    """Show a job's settings and its last runs."""
    from imager.jobrecord import load_record
    from imager.jobs import job_file, load_job
    from imager.units import show_bytes

    found, record = load_job(job), load_record(job)
    if json:
        print_json({"job": found.to_json(), "record": record.to_json()})
        return
    print(f"# {job_file(job)}")
    print(job_file(job).read_text().rstrip())
    print(f"\nnext run: {_show_time(_next_run(found))}")
    rows = [
        (
            run.started,
            run.result,
            run.image,
            f"{run.seconds:.1f} s",
            show_bytes(run.read_bytes),
            show_bytes(run.stored_bytes),
            run.error.splitlines()[0] if run.error else "",
        )
        for run in record.runs
    ]
    print_table(
        ["STARTED", "RESULT", "IMAGE", "TOOK", "READ", "ADDED", "ERROR"],
        rows,
        right="TOOK READ ADDED",
    )


@app.command()
def run(job: JobArgument, json: JsonOption = False, progress: ProgressOption = "auto") -> int:
    """Run a job now: what its timer does."""
    from functools import partial

    from imager.cli.bars import open_progress
    from imager.jobs import load_job
    from imager.schedule import run_job

    found = load_job(job)
    with open_progress(progress) as shown:
        done = run_job(found, _capturing(), shown, partial(_tell, shown))
        if done.error:
            shown.note(f"job {job}: {done.result}: {done.error}")
    if json:
        print_json({"job": job, **done.to_json()})
    else:
        _print_run(job, done)
    return done.exit_code or 0


@app.command()
def remove(job: JobArgument, json: JsonOption = False) -> None:
    """Remove a job, its timer and its record. Its images stay."""
    from contextlib import suppress

    from imager.errors import FormatError
    from imager.jobrecord import remove_record
    from imager.jobs import load_job, remove_job
    from imager.systemdunits import remove_units

    with suppress(FormatError):  # a damaged one goes all the same
        load_job(job)
    remove_units(job)
    remove_job(job)
    remove_record(job)
    if json:
        print_json({"removed": job})
    else:
        print(f"job {job} is removed; its images stay")


def _capturing() -> Capturing:
    from imager.schedule import Capturing

    return Capturing(_paths, _repository, _take)


def _check_capture(job: Job) -> None:
    """What a capture would refuse is refused when the job is made."""
    from imager.imaging import ImagingJob

    ImagingJob(job.sources, job.image or None, consistency=job.consistency).check()


def _paths(job: Job) -> list[str]:
    from imager.cli.sources import _source_paths

    return _source_paths(list(job.sources), job.all_disks)


def _repository(job: Job) -> Repository:
    from imager.cli.sources import _open_or_make
    from imager.config import repository_url

    return _open_or_make(repository_url(job.repo), False)


def _take(job: Job, paths: list[str], repository: Repository, progress: Progress) -> Imaged:
    from imager.imaging import ImagingJob, run

    taken = ImagingJob(
        paths=tuple(paths),
        name=job.image or None,
        note=job.note,
        consistency=job.consistency,
        exclude_partitions=job.exclude_partitions,
    )
    return run(taken, lambda: repository, progress)


def _tell(progress: Progress, job: Job, run: JobRun, before: JobRun | None) -> None:
    """Notifications and metrics; what goes wrong with them is noted, and never fails a run."""
    from imager.config import table
    from imager.errors import ImagerError
    from imager.jobrecord import load_record
    from imager.jobs import job_names
    from imager.metrics import textfile_of, write_textfile
    from imager.notify import Notify, tell

    try:
        for problem in tell(Notify.from_table(table("notify")), job.name, run, before):
            progress.note(problem)
    except ImagerError as error:
        progress.note(f"no notification is sent: {error.message}")
    try:
        if (file := textfile_of(table("metrics"))) is not None:
            write_textfile(file, {name: load_record(name) for name in job_names()})
    except ImagerError as error:
        progress.note(f"no metrics are written: {error.message}")


def status(json: JsonOption = False) -> int:
    """Show how each job stands. Exit code 1 when one is overdue, failed, or never ran."""
    from datetime import UTC, datetime
    from pathlib import Path

    from imager.config import repository_url
    from imager.jobstatus import read_status

    default = repository_url(None)
    here = [default] if Path(default, "repository.json").exists() else []
    found = read_status(datetime.now(UTC), here)
    if json:
        print_json({"good": found.good, **found.to_json()})
    else:
        _print_status(found)
    return 0 if found.good else 1


def _print_status(found: Status) -> None:
    from imager.units import show_age

    rows = [
        (
            job.job,
            job.word,
            "none" if job.age is None else show_age(job.age),
            job.image,
            ", ".join(f"{item.name} {show_age(item.age)}" for item in job.data),
            job.next,
        )
        for job in found.jobs
    ]
    if rows:
        print_table(["JOB", "STATE", "AGE", "LAST GOOD IMAGE", "DATA", "NEXT"], rows)
    else:
        print("there are no jobs; see: imager schedule add --help")
    for job in found.jobs:
        for text in job.problems:
            print(f"{job.job}: {text}")
    if found.without_job:
        print("\nimages that no job makes:")
        print_table(
            ["NAME", "IMAGES", "NEWEST", "CREATED", "REPOSITORY"],
            [(x.name, x.images, x.newest, x.created, x.repository) for x in found.without_job],
            right="IMAGES",
        )


def _next_run(job: Job) -> datetime | None:
    """By its calendar, without the random delay; None where systemd cannot say it."""
    from datetime import UTC, datetime

    from imager.errors import ImagerError
    from imager.oncalendar import times_after

    try:
        return next(iter(times_after(job.calendar, datetime.now(UTC))), None)
    except ImagerError:
        return None


def _show_time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment else "not known"


def _print_run(name: str, run: JobRun) -> None:
    from imager.units import count_of, show_bytes

    if run.image:
        print(
            f"job {name}: image {run.image} of {run.lineage}, {show_bytes(run.read_bytes)} read, "
            f"{show_bytes(run.stored_bytes)} added, {run.seconds:.1f} s"
        )
    if run.pruned:
        print(f"  {count_of(run.pruned, 'image')} removed by the keep rules")
    if run.freed_bytes:
        print(f"  {show_bytes(run.freed_bytes)} freed by gc")
