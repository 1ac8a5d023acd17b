"""`w2s-fast`: info, check, calibrate, bench, effect, demo, teacher, train. Imports happen inside the commands."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

out, err = Console(emoji=False), Console(stderr=True, emoji=False)  # a name such as pkg:a: is no picture


class _Commands(typer.core.TyperGroup):
    """The commands; what stops one from outside is a sentence on stderr and an exit status, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without a character loses that one, not the run
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail(f"{_named(ctx)}stopped", code=130)
        except ImportError as error:
            _fail(f"{_named(ctx)}{error}")
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of the output went away
            _fail(f"{_named(ctx)}{error}")
        except Exception as error:
            if "(os error " not in str(error):  # how libraries written in Rust report a full or read-only disk
                raise
            _fail(f"{_named(ctx)}{error}")


def _named(ctx: Any) -> str:
    """``"train: "``, as far as a command was reached."""
    return f"{ctx.invoked_subcommand}: " if ctx.invoked_subcommand else ""


app = typer.Typer(
    no_args_is_help=True, add_completion=False, cls=_Commands,
    help="Fused kernels for weak-to-strong training: what they do here.",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        out.print(f"w2s_fast {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _fail(message: str, code: int = 1) -> NoReturn:
    err.print(f"[red]w2s-fast:[/red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True)


def _pairs(title: str, pairs: list[tuple[str, str]]) -> None:
    out.print(f"[bold]{title}[/bold]")
    for name, value in pairs:
        out.print(f"  {escape(name)}: {escape(value)}", soft_wrap=True, highlight=False)


@app.command()
def info() -> None:
    """Print what belongs in a bug report: versions, machine, build, which backend serves which op and why."""
    from . import info as facts

    _pairs("versions", facts.versions())
    _pairs("machine", facts.machine())
    _pairs("build", facts.build())
    _pairs("environment", facts.environment() or [("(none of ours)", "unset")])
    _pairs("calibration", facts.calibrated())
    out.print("[bold]ops[/bold]")
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in facts.served():
        alike.setdefault((row.device, row.backend, row.rejected), []).append(row.op)
    for (device, backend, rejected), ops in alike.items():
        out.print(f"  {device}, {backend} serves {', '.join(ops)}", soft_wrap=True, highlight=False)
        for name, reason in rejected:
            out.print(f"    not {name}: {escape(reason)}", soft_wrap=True, highlight=False)


@app.command()
def check(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
) -> None:
    """Run every op here against its float64 reference; exit status 1 if one breaks the accuracy policy."""
    import faulthandler
    import sys
    import warnings

    from . import check as checks
    from .testing.samples import all_samples

    known = {sample.op for sample in all_samples()}
    unknown = sorted(set(op or ()) - known)
    if unknown:
        _fail(f"no op named {', '.join(unknown)}; there are {', '.join(sorted(known))}", code=2)
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # a kernel that crashes the process is then at least named
    work = checks.plan(op or ())
    with _progress() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        task = progress.add_task("checking", total=len(work))
        results = checks.run(op or (), lambda: progress.advance(task))
    for result in results:
        where = f"{result.op} {result.backend} {result.device}"
        if result.skipped:
            out.print(f"[dim]skip[/dim]  {where}: {escape(result.skipped)}", soft_wrap=True, highlight=False)
        elif result.ok:
            share = f"worst error {result.worst:.2f} of the allowed"
            out.print(f"[green]ok[/green]    {where}: {result.ran} runs, {share}", soft_wrap=True, highlight=False)
        else:
            out.print(f"[red]FAIL[/red]  {where}: {len(result.failures)} of {result.ran} runs", highlight=False)
            for failure in result.failures:
                err.print(f"      {escape(failure)}", soft_wrap=True, highlight=False)
    note = checks.gpu_is_idle_note()
    if note:
        out.print(note)
    failed = sum(not result.ok for result in results)
    if failed:
        _fail(f"{failed} of {len(results)} op and backend pairs break the policy; the runs are listed above")
    out.print(f"all {sum(bool(result.ran) for result in results)} op and backend pairs hold")


@app.command()
def calibrate(
    to: Annotated[
        Path | None, typer.Option("--out", help="Also write the table here, for W2S_FAST_CALIBRATION elsewhere.")
    ] = None,
) -> None:
    """Time everyday calls against plain PyTorch on this machine, ahead of the first of yours; `auto` goes by it."""
    from . import calibration

    if to is not None:
        from . import files

        files.writable_folder(to.parent)
    try:
        with err.status("calibrating") as status:
            table = calibration.calibrate(step=lambda family: status.update(f"calibrating {family}"))
    except ValueError as error:
        _fail(str(error), code=2)
    for line in calibration.lines(table):
        out.print(escape(line), soft_wrap=True, highlight=False)
    if to is not None:
        table.save(to)
    out.print(f"kept in {to or calibration.path()}", soft_wrap=True, highlight=False)


@app.command()
def bench(
    op: Annotated[list[str] | None, typer.Option(help="Only this op, or cases whose id contains this.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Every case, not only the hot paths.")] = False,
    providers: Annotated[
        str, typer.Option(help="Comma-separated names, kinds (eager, compile, formulation, peer) or backends to run.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there is one.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes the smaller of 2 and the cores.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds a case.")] = 15,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Result file, or a folder for it; default bench/results/local, of a wheel the user's cache."
        ),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Also draw the charts beside the results.")] = False,
    overhead: Annotated[bool, typer.Option(help="Also measure import and call overhead.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Only the cases that the result file lacks.")] = False,
    readme: Annotated[
        bool, typer.Option("--readme", help="Measure nothing; rewrite the tables of README and docs.")
    ] = False,
    guarantee: Annotated[
        bool, typer.Option("--guarantee", help="Random everyday calls against eager and torch.compile: who is faster?")
    ] = False,
    cases: Annotated[int, typer.Option(min=1, help="With --guarantee: how many calls.")] = 1000,
    compiled: Annotated[
        int, typer.Option(min=0, help="With --guarantee: in how many of them torch.compile is asked, seconds each.")
    ] = 40,
    seed: Annotated[int, typer.Option(help="With --guarantee: the calls' seed.")] = 0,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing; list what changed from one result file to another, losses first."),
    ] = None,
) -> None:
    """Time our ops against eager PyTorch, torch.compile, the papers' forms and installed libraries."""
    from .bench import command

    if compare is not None:
        _compare(*compare)
        return
    if readme:
        try:
            out.print(command.write_readme())
        except ValueError as error:
            _fail(str(error), code=2)
        return
    options = command.Options(tuple(op or ()), full, providers, device, threads, rounds, to, overhead, resume)
    if guarantee:
        _guarantee(options, cases, seed, compiled)
        return
    try:
        settings = options.settings()
        chosen = options.cases(settings)
    except ValueError as error:
        _fail(str(error), code=2)
    if plots:
        from .bench.plots import needs

        needs()
    try:
        command.try_out(options)
    except ValueError as error:
        _fail(f"--out {to}: {error}", code=2)
    out.print(command.intention(chosen, settings))
    if command.busy():
        err.print(f"[yellow]note:[/yellow] {command.busy()}", soft_wrap=True)
    with _progress() as progress:
        task = progress.add_task("measuring ceilings", total=len(chosen) + 1)

        def step(what: str) -> None:
            progress.update(task, description=what)

        report = command.measure(chosen, settings, options, step, lambda: progress.advance(task))
    _print_report(report)
    path = command.path_for(report.slug, options.out)
    out.print(f"results: {path}", soft_wrap=True, highlight=False)
    if plots:
        _draw(report, path.parent)
    wrong = [f"{row.op}/{row.case} {row.provider}: {row.reason}" for row in report.rows if row.status == "wrong"]
    for line in wrong:
        err.print(f"[red]wrong[/red] {escape(line)}", soft_wrap=True, highlight=False)
    if any(row.kind == "ours" and row.status != "ok" and row.provider == "ours" for row in report.rows):
        _fail("a case of ours failed, see above")


def _guarantee(options: Any, count: int, seed: int, compiled: int) -> None:
    """Measures the calls that the file has no result of, then prints what all of them say."""
    from .bench import command, guarantee
    from .bench.report import Report, slug

    try:
        settings = options.settings()
        path = command.guarantee_path(options.out, slug(settings.device, settings.threads))
        todo = guarantee.planned(count, seed, options.ops, path, compiled)
    except ValueError as error:
        _fail(str(error), code=2)
    command.writable_folder(path.parent)
    load = command.load_average()
    if command.busy():
        err.print(f"[yellow]note:[/yellow] {command.busy()}", soft_wrap=True)
    with _progress() as progress:
        task = progress.add_task("random calls", total=len(todo))
        guarantee.measure(
            todo, settings, path, load, compiled, lambda what: progress.update(task, description=what),
            lambda: progress.advance(task),
        )  # fmt: skip
    for line in guarantee.summary(Report.load(path), options.ops):
        out.print(escape(line), soft_wrap=True, highlight=False)
    out.print(f"results: {path}", soft_wrap=True, highlight=False)


def _compare(before: Path, after: Path) -> None:
    """Exit status 1 where ours lost more than 5 % beyond the noise of the two runs."""
    from .bench.compare import changes, common
    from .bench.report import Report

    try:
        reports = Report.load(before), Report.load(after)
    except (ValueError, KeyError) as error:
        _fail(f"bench --compare: {error}", code=2)
    found = list(changes(*reports))
    for change in found:
        out.print(escape(f"{'LOSS ' if change.loss else ''}{change}"), soft_wrap=True, highlight=False)
    losses = sum(change.loss for change in found)
    out.print(f"{len(found)} of {common(*reports)} ratios changed beyond their noise, {losses} of them losses")
    if losses:
        raise typer.Exit(1)


def _print_report(report: Any) -> None:
    from .bench import tables

    out.print(tables.machine(report), highlight=False)
    out.print("(ratio: their time / our time, median and quartiles of the rounds; last column: peak memory)")
    for rows in tables.grouped(report.rows):
        out.print(f"[bold]{rows[0].op}[/bold] {escape(rows[0].case)}", highlight=False)
        for name, took, ratio, demand, memory in tables.lines(rows):
            text = f"  {name:<30} {took:>9}  {ratio:<20} {memory:>8}  {demand}".rstrip()
            out.print(escape(text), soft_wrap=True, highlight=False)
    for what, value in tables.overhead(report):
        out.print(f"{what}: {value}", highlight=False)
    missing = tables.unavailable(report.rows)
    if missing:
        out.print("not run here: " + escape("; ".join(missing)), highlight=False)


def _draw(report: Any, folder: Path) -> None:
    from .bench.plots import draw

    for path in draw(report, folder):
        out.print(f"chart: {path}", soft_wrap=True, highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Logit fusion on real text: small models trained here, decoding with them against the fine-tuned large one."""
    try:
        from .bench.demo import main
    except ImportError as error:
        _cannot_import("the demo", error)
    code = main(context.args)
    if code:
        raise typer.Exit(int(code))


def _cannot_import(what: str, error: ImportError) -> NoReturn:
    """One line that names what to install."""
    hint = "" if "pip install" in str(error) else '; its examples need pip install "w2s_fast[demo]"'
    _fail(f"{what} cannot be imported ({error}){hint}")


def _list_methods(console: Console) -> None:
    from .methods import available

    console.print("w2s-fast train METHOD \\[options]; --help after a method prints its options.", highlight=False)
    family = ""
    for method in sorted(available().values(), key=lambda m: (m.family, m.name)):
        if method.family != family:
            family = method.family
            console.print(f"[bold]{escape(family)}[/bold]")
        console.print(f"  {method.name}: {escape(method.summary)}", soft_wrap=True, highlight=False)


# no help option here, so that --help reaches the method
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="[METHOD] [OPTIONS]",
)
def train(context: typer.Context) -> None:
    """Train the user's model on the user's data with a paper's method; alone, it lists the methods."""
    from .methods import available

    name, *arguments = context.args or ["--help"]
    if name in ("--help", "-h"):
        _list_methods(out)
        return
    method = available().get(name.replace("-", "_"))
    if method is None:
        err.print(f"[red]w2s-fast train:[/red] no method named {escape(name)}", soft_wrap=True)
        _list_methods(err)
        raise typer.Exit(2)
    try:
        code = method.run(arguments)
    except ImportError as error:
        _cannot_import(name, error)
    if code:
        raise typer.Exit(int(code))


teacher_app = typer.Typer(no_args_is_help=True, help="A teacher's outputs, kept for students.")
app.add_typer(teacher_app, name="teacher")


@teacher_app.command("dump")
def teacher_dump(
    model: Annotated[str, typer.Option(help="The teacher: a folder, a hub name, or package.module:function.")],
    data: Annotated[str, typer.Option(help="A .jsonl or .parquet file: text, or prompt and completion.")],
    to: Annotated[Path, typer.Option("--out", help="The parquet file to write.")],
    top: Annotated[int, typer.Option(min=1, max=64, help="Log-probabilities of each token.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of a row.")] = 1024,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto: cuda if there is one.")] = "auto",
) -> None:
    """Write a teacher's top-k log-probabilities to a parquet file; `methods.distillation.teacher.distil` reads it."""
    from . import files
    from .methods._common import command
    from .methods._common.place import place
    from .methods.distillation import teacher

    files.writable_folder(to.parent)  # before the work
    try:
        where, rows = place(device), command.rows_of(data)
        made, tokenizer = command.model_of(model, tokenizer=True)
        with err.status("dumping"):
            made = made.to(where.device)
            count = teacher.dump(made, tokenizer, rows, to, top=top, batch=batch, max_length=length)
    except ValueError as error:
        _fail(f"teacher dump: {error}")
    out.print(f"{count} rows: {to}", soft_wrap=True, highlight=False)


@app.command()
def effect(
    name: Annotated[str, typer.Argument(help="An experiment; none lists them.")] = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated, at least five for a verdict; default: its own.")] = "",
    listed: Annotated[bool, typer.Option("--list", help="All experiments with their recorded verdicts.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The long form: ten seeds, longer grids, more steps.")] = False,
    to: Annotated[Path | None, typer.Option("--out", help="A JSON file that gets the result.")] = None,
) -> None:
    """Run the experiment that shows a paper's effect, or that it does not show; alone, list them with verdicts."""
    from . import files
    from .bench.effects import protocol

    if listed or not name:
        for line in protocol.listing():
            out.print(escape(line), soft_wrap=True, highlight=False)
        return
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds else None
    except ValueError:
        _fail(f"--seeds must be numbers and commas, got {seeds!r}", code=2)
    if to is not None:
        files.writable_folder(to.parent)  # before the work
    try:
        with err.status(name) as status:
            result = protocol.run(name.replace("-", "_"), numbers, lambda what: status.update(f"{name}: {what}"), full)
    except KeyError:
        _fail(f"no experiment named {name}; w2s-fast effect --list names them", code=2)
    for line in protocol.lines(result):
        out.print(escape(line), soft_wrap=True, highlight=False)
    if to is not None:
        protocol.save(name.replace("-", "_"), result, to)
        out.print(f"results: {to}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
