"""`run`, and the words an operator has for a running daemon. Light at import."""

import json
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from chatvla_edge.runtime.daemon.deploy import Switched
    from chatvla_edge.runtime.daemon.places import Run
    from chatvla_edge.runtime.daemon.replay import Comparison

app = typer.Typer()
bundles = typer.Typer(no_args_is_help=True, help="Which bundle a robot runs: switch the link that leads to it.")
app.add_typer(bundles, name="bundle")
console = Console()

RigOption = Annotated[str | None, typer.Option("--rig", help="Which rig's daemon, where several run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

COLOURS = {
    "DISARMED": "yellow",
    "READY": "cyan",
    "ACTIVE": "green",
    "HOLD": "yellow",
    "SOFT_STOP": "magenta",
    "FAULT": "red",
}


# ------------------------------------------------------------------------------------------------------------------ run


@app.command("run")
def run(
    rig: Annotated[str, typer.Argument(help="A rig of this package (`rig list`), or a YAML file.")],
    bundle: Annotated[Path, typer.Option(help="Bundle directory.", exists=True, file_okay=False)],
    instruction: Annotated[str, typer.Option(help="What the robot should do; `instruct` changes it.")] = "",
    duration: Annotated[float | None, typer.Option(help="Seconds until it ends by itself.", min=0.1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Everything but commands to the arms.")] = False,
    shadow: Annotated[bool, typer.Option("--shadow", help="Your own controller drives; the policy looks on.")] = False,
    record: Annotated[bool, typer.Option(help="Keep a log of the session.")] = True,
    folder: Annotated[
        Path | None, typer.Option(help="Session folder. Default: sessions/RIG-TIME below the present one.")
    ] = None,
    frame_rate: Annotated[float, typer.Option(help="Pictures per second and camera in the log; 0: none.", min=0)] = 30,
    rotate: Annotated[int, typer.Option(help="MiB after which the log goes on in its next file.", min=1)] = 1024,
    threads: Annotated[int, typer.Option(help="Compute threads of the policy.", min=1)] = 1,
    realtime: Annotated[bool, typer.Option(help="Ask the kernel for real-time rights.")] = True,
    arm: Annotated[bool, typer.Option("--arm", help="Arm as soon as ready. Simulated rigs only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a policy on a rig until Ctrl-C, SIGTERM, or the end of `--duration`. Nothing moves before `arm`."""
    import logging

    from chatvla_edge.drivers import rig as rigs
    from chatvla_edge.runtime.bundle import open_bundle
    from chatvla_edge.runtime.daemon import mapping
    from chatvla_edge.runtime.daemon.settings import Settings
    from chatvla_edge.runtime.daemon.supervisor import StartError, Supervisor, ending_on_signals, write_summary

    if dry_run and shadow:
        raise typer.BadParameter("--dry-run and --shadow exclude each other")
    given, bundle = bundle, bundle.resolve()
    chosen = rigs.load(rig)
    if arm and not chosen.simulated:
        raise typer.BadParameter(f"--arm is for simulated rigs; {chosen.name} is real: use `chatvla-edge arm`")
    stderr = Console(stderr=True, highlight=False)
    with stderr.status("checking the bundle"), open_bundle(bundle) as opened:
        # Sizes and rates first, with the bundle's own words; then what each number means.
        from chatvla_edge.runtime.bundle.fit import check_rig

        check_rig(opened.manifest, mapping.needs(chosen, opened.manifest), str(given))
        place = folder or Path("sessions") / f"{chosen.name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
        place.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s supervisor %(message)s", filename=place / "supervisor.log"
        )
        settings = Settings(
            rig=chosen,
            bundle=bundle,
            folder=place,
            instruction=instruction,
            kind="dry" if dry_run else "shadow" if shadow else "live",
            duration=duration,
            record=record,
            frame_rate=frame_rate,
            rotate_bytes=rotate * 2**20,
            threads=threads,
            realtime=realtime,
            arm_at_once=arm,
            given=given,
        )
        supervisor = Supervisor(settings, opened, progress=lambda text: stderr.print(f"  {text}"))
    what = "SIMULATED" if chosen.simulated else "REAL"
    stderr.print(f"{what} rig {chosen.name}, {settings.kind} run; session in {place}. Ctrl-C ends it.")
    try:
        with ending_on_signals(supervisor):
            summary = supervisor.run()
    except StartError as error:
        raise ValueError(f"the rig did not come up: {error}") from error
    write_summary(place, summary)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        show_summary(summary)


def show_summary(summary: dict[str, Any]) -> None:
    """The table at the end of a run."""
    table = Table("stream", "declared", "measured", "share", title=f"{summary['rig_name']}: {summary['seconds']:.1f} s")
    for stream in summary["streams"]:
        share = stream["rate"] / stream["declared"] if stream["declared"] else 0.0
        colour = "green" if share >= 0.99 else "yellow" if share >= 0.9 else "red"
        table.add_row(
            stream["name"], f"{stream['declared']:g} Hz", f"{stream['rate']:.2f} Hz", Text(f"{share:.3f}", colour)
        )
    console.print(table)
    facts = Table("what", "value", show_header=False)
    for name, value in summary["facts"].items():
        facts.add_row(name, str(value))
    console.print(facts)


# ------------------------------------------------------------------------------------------------------------- operator


def _ask(rig: str | None, request: dict[str, Any]) -> None:
    """Put a request to the daemon and print its answer. Exit code 1 for a refusal."""
    from chatvla_edge.runtime.daemon import control, places

    answer = control.ask(places.find(rig).socket, request)
    console.print(Text(answer["text"], "" if answer["ok"] else "red"))
    for reason in answer.get("reasons", ()):
        console.print(Text(f"  {reason}", "yellow"))
    if not answer["ok"]:
        raise typer.Exit(1)


# Requests that are a word and nothing else, in the order in which `--help` shows them.
WORDS = {
    "arm": "Let the policy move the arms. The first motion is a slow approach.",
    "disarm": "Stop along the path, then let go.",
    "stop": "Stop along the path. `arm` goes on.",
    "hold": "Stand where the arms are. `resume` goes on.",
    "resume": "Go on after `hold`, or from `home` back to the policy.",
    "home": "Send the arms slowly to the rig's home pose.",
    "park": "Send the arms slowly to where they may lose power, and disarm there.",
    "quit": "End the daemon: it stops along the path first.",
}


def _word(act: str) -> Callable[[str | None], None]:
    def ask(rig: RigOption = None) -> None:
        _ask(rig, {"act": act})

    return ask


for _act, _help in WORDS.items():
    app.command(_act, help=_help)(_word(_act))


@app.command("speed")
def speed(factor: Annotated[float, typer.Argument(help="0 < factor <= 1.")], rig: RigOption = None) -> None:
    """Slow the trajectory down to a share of its speed."""
    _ask(rig, {"act": "speed", "speed": factor})


@app.command("instruct")
def instruct(text: Annotated[str, typer.Argument(help="What the robot should do.")], rig: RigOption = None) -> None:
    """Give the policy a new instruction; it takes effect with its next query."""
    _ask(rig, {"act": "instruct", "text": text})


@app.command("estop")
def estop(rig: RigOption = None) -> None:
    """Emergency stop, latched in the page that servo and devices read, whether or not the supervisor answers."""
    from chatvla_edge.runtime.daemon import control, places

    run = places.find(rig)
    _raise(run)
    console.print(Text("e-stop raised", "red"))
    try:
        control.ask(run.socket, {"act": "estop"}, timeout=1.0)
    except control.ControlError as error:
        console.print(
            Text(f"the supervisor does not answer, servo and devices have stopped without it: {error}", "red")
        )
        raise typer.Exit(1) from None


def _raise(run: "Run") -> None:
    from chatvla_edge.runtime.pages import EmergencyStop

    descriptor = os.open(run.estop, os.O_RDWR)
    try:
        EmergencyStop.attach(descriptor).raise_stop()
    finally:
        os.close(descriptor)


@app.command("clear")
def clear(rig: RigOption = None) -> None:
    """End a latched e-stop or a fault, once its cause is gone. Nothing moves before the next `arm`."""
    from chatvla_edge.runtime.daemon import control, places

    status = control.ask(places.find(rig).socket, {"act": "status"})
    for cause in status["causes"]:
        console.print(Text(f"  {cause}", "yellow"))
    _ask(rig, {"act": "clear", "seen": status["estop_count"]})


@app.command("log")
def log(
    count: Annotated[int, typer.Option("-n", help="How many lines.", min=1)] = 50,
    rig: RigOption = None,
    as_json: AsJson = False,
) -> None:
    """The newest events of the run: modes, reasons, requests, starts."""
    from chatvla_edge.runtime.daemon import control, places

    answer = control.ask(places.find(rig).socket, {"act": "log", "count": count})
    if as_json:
        typer.echo(json.dumps(answer["lines"]))
        return
    now_ns = time.monotonic_ns()
    for line in answer["lines"]:
        age = 1e-9 * (line["at_ns"] - now_ns)
        console.print(Text(f"{age:9.2f} s  {line['kind']:8} {line['text']}"))


@app.command("status")
def status(
    rig: RigOption = None,
    watch: Annotated[bool, typer.Option("--watch/--once", help="Go on until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Modes, reasons, rates, ages and times of a running daemon."""
    from chatvla_edge.runtime.daemon import control, places

    with control.Client(places.find(rig).socket) as client:
        if as_json:
            typer.echo(json.dumps(client.ask({"act": "status"})))
            return
        if not watch:
            console.print(picture(client.ask({"act": "status"})))
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(picture(client.ask({"act": "status"})), refresh=True)
                time.sleep(0.25)


def picture(status: dict[str, Any]) -> Group:
    """The status as tables."""
    mode = status["mode"]
    head = Text.assemble(
        ("SIMULATED " if status["simulated"] else "", "bold cyan"),
        (f"{status['rig']} ", "bold"),
        (f" {mode} ", f"bold reverse {COLOURS[mode]}"),
        f" for {status['since_s']:.0f} s, speed {status['speed']:g}",
        "" if status["kind"] == "live" else f", {status['kind']} run",
    )
    lines = [head]
    for reason in dict.fromkeys((*status["reasons"], *(status["causes"] if mode != "ACTIVE" else ()))):
        lines.append(Text(f"  {reason}", "yellow"))
    streams = Table("stream", "rate", "declared", "age ms", "note")
    for stream in status["streams"]:
        ok = stream["rate"] >= 0.99 * stream["declared"]
        age = "" if stream["age_ms"] is None else f"{stream['age_ms']:.1f}"
        rate = Text(f"{stream['rate']:.1f} Hz", "green" if ok else "yellow")
        streams.add_row(stream["name"], rate, f"{stream['declared']:g} Hz", age, stream["note"])
    servo, policy = status["servo"], status["policy"]
    facts = Table("servo and policy", "", show_header=False)
    facts.add_row("servo", f"{servo['doing']}; {', '.join(servo['reasons']) or 'free'}")
    facts.add_row("trajectory time", f"{servo['tau']:.2f} s at rate {servo['tau_rate']:.2f}")
    facts.add_row("wake-up late p50 / p99", f"{servo['lateness_us'][0]:.0f} / {servo['lateness_us'][1]:.0f} us")
    facts.add_row("cost of a tick p50 / p99", f"{servo['cost_us'][0]:.1f} / {servo['cost_us'][1]:.1f} us")
    facts.add_row("chunk age", f"{servo['chunk_age_ms']:.0f} ms")
    facts.add_row("query", f"{policy['query_ms']:.0f} ms, {policy['passes']} passes, {policy['tokens']} tokens")
    facts.add_row("answered / failed / put off", f"{policy['queries']} / {policy['errors']} / {policy['waits']}")
    facts.add_row("instruction", Text(status["instruction"] or "none: give one with `instruct`"))
    facts.add_row("reasoning", Text(policy["text"]))
    return Group(*lines, streams, facts)


# -------------------------------------------------------------------------------------------------- which bundle it is

Link = Annotated[Path, typer.Option("--link", help="The symbolic link that `run --bundle` is given.")]
CheckSeconds = Annotated[float, typer.Option(help="How long the check of the bundle may take.", min=1)]
CheckThreads = Annotated[int, typer.Option("--threads", help="Compute threads of the check.", min=1)]
WhileRunning = Annotated[
    bool, typer.Option("--while-running", help="Although a daemon runs from the link; its next start takes the other.")
]


@bundles.command("use")
def use(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.", exists=True, file_okay=False)],
    link: Link,
    check_seconds: CheckSeconds = 1800,
    threads: CheckThreads = 1,
    while_running: WhileRunning = False,
    as_json: AsJson = False,
) -> None:
    """Check a bundle on this computer (digests, probes), then let the link lead to it. The one before is kept."""
    from chatvla_edge.runtime.daemon import deploy

    with Console(stderr=True).status(f"checking {bundle}"):
        check = deploy.verify(check_seconds, threads)
        switched = deploy.use(bundle, link, check=check, while_running=while_running)
    _show_switched(switched, as_json)


@bundles.command("rollback")
def rollback(
    link: Link,
    check_seconds: CheckSeconds = 1800,
    threads: CheckThreads = 1,
    while_running: WhileRunning = False,
    as_json: AsJson = False,
) -> None:
    """Check the bundle before on this computer, then let the link lead to it again."""
    from chatvla_edge.runtime.daemon import deploy

    with Console(stderr=True).status("checking the bundle before"):
        check = deploy.verify(check_seconds, threads)
        switched = deploy.rollback(link, check=check, while_running=while_running)
    _show_switched(switched, as_json)


def _show_switched(switched: "Switched", as_json: bool) -> None:
    values = {name: value if isinstance(value, dict) else str(value or "") for name, value in vars(switched).items()}
    if as_json:
        typer.echo(json.dumps(values))
        return
    gates = ", ".join(f"{count} {verdict}" for verdict, count in switched.gates.items())
    console.print(
        f"{switched.link} leads to {switched.bundle} (gates: {gates}); before: {switched.previous or 'none'}. The next "
        "start of the daemon takes it.",
        highlight=False,
        soft_wrap=True,
    )


# --------------------------------------------------------------------------------------------------------- afterwards


@app.command("report")
def report(
    session: Annotated[Path, typer.Argument(help="A session's folder, or one .mcap file.", exists=True)],
    output: Annotated[Path | None, typer.Option("-o", help="Where to. Default: report.html beside the log.")] = None,
) -> None:
    """Write one self-contained HTML page of a session."""
    from chatvla_edge.runtime.daemon import report as pages

    folder = session if session.is_dir() else session.parent
    place = output or folder / "report.html"
    pages.write(session, place)
    console.print(f"{place}: {place.stat().st_size / 1e6:.1f} MB", highlight=False)


@app.command("replay")
def replay(
    session: Annotated[Path, typer.Argument(help="A session's folder, or one .mcap file.", exists=True)],
    bundle: Annotated[
        Path | None, typer.Option(help="Ask this bundle the session's queries instead.", exists=True, file_okay=False)
    ] = None,
    queries: Annotated[int | None, typer.Option(help="With --bundle: only the first so many.", min=1)] = None,
    threads: Annotated[int, typer.Option(help="With --bundle: compute threads of the policy.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Compute a session's commands again from its recorded inputs. Exit code 1 where one differs.

    With `--bundle`: its queries again, by another bundle, beside what was answered then.
    """
    if bundle is not None:
        from chatvla_edge.runtime.daemon import replay_policy

        answers = replay_policy.replay(session, bundle, threads, queries)
        if as_json:
            typer.echo(json.dumps(answers))
        else:
            show_answers(answers)
        return
    from chatvla_edge.runtime.daemon import replay as plane

    found = plane.replay(session)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        show_replay(found)
    if not found.equal:
        raise typer.Exit(1)


def show_replay(found: "Comparison") -> None:
    """What the replay of a servo found."""
    table = Table("stage", "numbers that differ", "largest difference", "first: tick, axis", "recorded", "replayed")
    for stage, count in found.different.items():
        first = found.first[stage]
        values = (f"{first[name]:.17g}" for name in ("recorded", "replayed"))
        place = f"{first['tick']}, {first['axis']}"
        table.add_row(stage, str(count), f"{found.largest[stage]:.3g}", place, *values)
    if found.different:
        console.print(table)
    how = "bit by bit" if found.same_build else "within 1e-9, as this is not the recording's build or machine"
    console.print(f"{found.replayed} of {found.ticks} ticks replayed, {found.moving} of them commanded", soft_wrap=True)
    for stop in found.stops:
        line = f"not compared from tick {stop['tick']} on: {stop['why']}"
        console.print(Text(line, "yellow"), soft_wrap=True)
    wrong = found.different.get("limited", 0)
    verdict = f"{wrong} of {found.compared} commands differ" if wrong else f"all {found.compared} commands are equal"
    console.print(Text(f"{verdict}, compared {how}", "red" if wrong else "green"), soft_wrap=True)


def show_answers(answers: dict[str, Any]) -> None:
    """What another bundle answered, beside what was answered then."""
    lines = answers["queries"]
    table = Table("query", "reasoning", "chunk rms", "chunk max", "then ms", "now ms", "picture apart ms")
    for line in lines:
        table.add_row(
            str(line["query"]),
            Text("equal", "green")
            if line["text_equal"]
            else Text(f"{line['recorded_text']} | {line['text']}", "yellow"),
            *(f"{line[name]:.4g}" for name in ("rms", "max")),
            *(f"{line[name]:.1f}" for name in ("recorded_ms", "ms", "picture_apart_ms")),
        )
    console.print(table)
    table = Table("component", "unit", "rms", "max", title="difference of the chunks")
    for part in answers["components"]:
        table.add_row(part["name"], part["unit"], f"{part['rms']:.4g}", f"{part['max']:.4g}")
    console.print(table)
    console.print(
        f"{answers['texts_equal']} of {len(lines)} reasoning texts equal; median query "
        f"{answers['recorded_ms_p50']:.1f} ms then, {answers['ms_p50']:.1f} ms now; "
        f"{answers['same_picture']} queries with the very frames they saw"
    )
    for note in answers["notes"]:
        console.print(Text(note, "yellow"), soft_wrap=True)
