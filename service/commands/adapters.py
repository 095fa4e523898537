"""`python -m service adapters ...`: list, show, upload, download, roll back, delete, and divide an
adapter's texts between two revisions."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from cli.flags import add_card
from cli.shell import Command, CommandFailed, one_line, plain_lines
from cli.tables import print_facts, print_table
from service.client import (
    AdapterDetail,
    AdapterSummary,
    ClientError,
    InvalidCall,
    NotFound,
    Published,
    Refused,
    Rule,
    TrafficDetail,
    UploadReport,
)
from service.client.cards import chosen_card, send_card
from service.client.errors import describe
from service.client.types import AdapterState
from service.commands.flags import add_service, add_wait, client_of

if TYPE_CHECKING:
    from service.client import Client

SUFFIX = ".safetensors"
_SHORT = 12


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(
        name: str, help: str, work: "Callable[[Client, Namespace], None]", *, json: bool = True
    ) -> ArgumentParser:
        action: ArgumentParser = actions.add_parser(name, help=help)
        add_service(action)
        action.set_defaults(work=work)
        if json:
            action.add_argument("--json", action="store_true", help="print the service's answer")
        return action

    listed = add("list", "all adapters", _list)
    listed.add_argument(
        "--search", metavar="WORDS", default="", help="only names that contain each of these words"
    )
    listed.add_argument(
        "--state", choices=get_args(AdapterState), help="only adapters in this state"
    )
    show = add("show", "one adapter, with its revisions", _show)
    show.add_argument("name")
    show.add_argument("--card", action="store_true", help="print its model card instead")
    show.add_argument(
        "--revision", metavar="R", help="with --card: of this one, by its first characters"
    )
    upload = add("upload", "publish a file", _upload)
    upload.add_argument("file", type=Path, metavar="FILE")
    upload.add_argument("--name", help=f"default: FILE's name, without {SUFFIX}")
    conditions = upload.add_mutually_exclusive_group()
    conditions.add_argument(
        "--if-match", metavar="REVISION", help="only if REVISION is served; *: any"
    )
    conditions.add_argument("--new", action="store_true", help="only if the name is new")
    upload.add_argument(
        "--force", action="store_true", help="also if the labels or the task change"
    )
    upload.add_argument(
        "--stage", action="store_true", help="the served revision stays; see `traffic`"
    )
    add_wait(upload)
    add_card(upload, file="FILE")
    upload.add_argument(
        "--dry-run", action="store_true", help="check it, say what it would change, store nothing"
    )
    diff = add("diff", "what differs between two: files, or names, also name@revision", _diff)
    diff.add_argument("before", metavar="A")
    diff.add_argument("after", metavar="B")
    download = add("download", "save a file", _download, json=False)
    download.add_argument("name")
    download.add_argument("--revision", metavar="R", help="its first characters")
    download.add_argument("--output", type=Path, metavar="F", help=f"default: NAME{SUFFIX}")
    rollback = add("rollback", "serve an earlier revision again", _rollback)
    rollback.add_argument("name")
    rollback.add_argument("--revision", metavar="R", help="its first characters; default: previous")
    rollback.add_argument("--if-match", metavar="REVISION", help="only if this one is served")
    add_wait(rollback)
    _add_traffic(add("traffic", "try a second revision on some of the texts", _traffic))
    delete = add("delete", "delete an adapter, or one revision of it", _delete, json=False)
    delete.add_argument("name")
    delete.add_argument(
        "--revision", metavar="R", help="only this one, by its first characters; not the served one"
    )
    delete.add_argument("--if-match", metavar="REVISION", help="only if this one is served")
    add_wait(delete)


def _add_traffic(action: ArgumentParser) -> None:
    action.description = "Without options: how the texts are divided, and what was seen."
    action.add_argument("name")
    work = action.add_mutually_exclusive_group()
    work.add_argument(
        "--revision", metavar="R", help="the second revision, by its first characters"
    )
    work.add_argument("--end", action="store_true", help="the served revision reads all texts")
    work.add_argument("--promote", action="store_true", help="serve the second revision instead")
    action.add_argument("--percent", type=float, metavar="P", help="of the texts, 0 to 100")
    action.add_argument("--shadow", action="store_true", help="only compare, answer none of them")
    action.add_argument("--if-match", metavar="REVISION", help="only if this one is served")
    add_wait(action)
    limits = action.add_argument_group("end it by itself")
    for name, kind, help in (
        ("max-error-rate", _limit, "share of its texts that may fail"),
        ("max-disagreement", _limit, "share of texts with another answer"),
        ("max-latency-ratio", _limit, "times the served revision's latency"),
        ("min-texts", int, "nothing is decided on fewer"),
        ("window-seconds", float, "what was seen earlier does not count"),
    ):
        default = getattr(Rule(), name.replace("-", "_"))
        off = ", or off" if kind is _limit else ""
        limits.add_argument(
            f"--{name}", type=kind, metavar="X", default=default, help=f"{help}{off}; {default:g}"
        )


def _limit(text: str) -> float | None:
    return None if text == "off" else float(text)


def run(arguments: Namespace) -> int:
    with client_of(arguments) as client:
        arguments.work(client, arguments)
    return 0


COMMAND = Command(
    "list, show, compare, upload, download, roll back, try, delete adapters", run, add_arguments
)


def _list(client: "Client", arguments: Namespace) -> None:
    adapters = client.adapters(search=arguments.search, state=arguments.state)
    if arguments.json:
        _print_json(adapters)
    else:
        _print_table(adapters)


def _show(client: "Client", arguments: Namespace) -> None:
    if arguments.card:
        card = client.card(arguments.name, arguments.revision)
        if arguments.json:
            _print_json(card)
        else:
            # A file or a pipe gets it as it is; a terminal would obey what is in it.
            text = plain_lines(card.text) if sys.stdout.isatty() else card.text
            _print(text.removesuffix("\n"))
        return
    if arguments.revision is not None:
        raise CommandFailed("--revision belongs to --card")
    adapter = client.adapter(arguments.name)
    if arguments.json:
        _print_json(adapter)
    else:
        print_facts(_described(adapter, _card_of(client, adapter)))


def _card_of(client: "Client", adapter: AdapterDetail) -> str | None:
    """What is said of an adapter's model card; None: nothing is known of it."""
    if adapter.revision is None:
        return None
    try:
        card = client.card(adapter.name, adapter.revision)
    except NotFound as error:
        # A service that keeps no cards says not_found.
        return "none with this revision" if error.type == "card_not_found" else None
    except Refused as error:
        return f"cannot be read: {error.message}"
    return f"{len(card.text):,} characters; --card prints it"


def _upload(client: "Client", arguments: Namespace) -> None:
    name = arguments.name or arguments.file.name.removesuffix(SUFFIX)
    try:
        data = arguments.file.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise CommandFailed(f"{arguments.file}: cannot be read: {reason}") from None
    new = "*" if arguments.new else None
    try:
        card = chosen_card(
            arguments.file, named=arguments.card, leave_out=arguments.no_card, note=_note
        )
    except InvalidCall as error:
        raise CommandFailed(f"--card {error}") from None
    if arguments.dry_run:
        report = client.check(
            name,
            data,
            if_match=arguments.if_match,
            if_none_match=new,
            force=arguments.force,
            stage=arguments.stage,
        )
        _print_report(report, arguments)
        if card is not None:
            _note(f"its {card.shown} would be kept with it")
        return
    published = client.upload(
        name,
        data,
        if_match=arguments.if_match,
        if_none_match=new,
        force=arguments.force,
        stage=arguments.stage,
        wait=arguments.wait,
    )
    _print_published(published, arguments)
    if card is None:
        return
    try:
        send_card(card, lambda text: client.set_card(name, text, published.revision), _note)
    except ClientError as error:
        raise CommandFailed(
            f"{name} {published.revision[:_SHORT]} is published, but without its {card.shown}: "
            f"{describe(error)}"
        ) from None


def _diff(client: "Client", arguments: Namespace) -> None:
    from service.commands.comparing import Comparison, side_of

    sides = [side_of(text, client) for text in (arguments.before, arguments.after)]
    comparison = Comparison.of(*sides)
    if arguments.json:
        _print_json(comparison.content())
    else:
        for line in comparison.lines():
            _print(one_line(line))


def _download(client: "Client", arguments: Namespace) -> None:
    from adapters.format.durable import write_atomically

    path = arguments.output or Path(arguments.name + SUFFIX)
    if arguments.output is None and path.exists():
        raise CommandFailed(f"{path} exists; --output {path} replaces it")
    file = client.download(arguments.name, arguments.revision)
    try:
        write_atomically(path, file.data)
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be written: {error.strerror or error}") from None
    _print(f"{path} {file.revision} {len(file.data)} bytes")


def _rollback(client: "Client", arguments: Namespace) -> None:
    published = client.rollback(
        arguments.name, arguments.revision, if_match=arguments.if_match, wait=arguments.wait
    )
    _print_published(published, arguments)


def _traffic(client: "Client", arguments: Namespace) -> None:
    name, condition, wait = arguments.name, arguments.if_match, arguments.wait
    if (arguments.revision is None) != (arguments.percent is None):
        raise CommandFailed("--revision and --percent belong together")
    if arguments.promote:
        _print_published(client.promote(name, if_match=condition, wait=wait), arguments)
        return
    if arguments.end:
        client.end_traffic(name, if_match=condition, wait=wait)
    elif arguments.revision is not None:
        rule = Rule(
            max_error_rate=arguments.max_error_rate,
            max_disagreement=arguments.max_disagreement,
            max_latency_ratio=arguments.max_latency_ratio,
            min_texts=arguments.min_texts,
            window_seconds=arguments.window_seconds,
        )
        client.set_traffic(
            name,
            arguments.revision,
            arguments.percent,
            shadow=arguments.shadow,
            rule=rule,
            if_match=condition,
            wait=wait,
        )
    traffic = client.traffic(name)
    if arguments.json:
        _print_json(traffic)
    else:
        print_facts(_divided(traffic))


def _delete(client: "Client", arguments: Namespace) -> None:
    name, revision = arguments.name, arguments.revision
    if revision is None:
        client.delete(name, if_match=arguments.if_match, wait=arguments.wait)
        _print(f"{name} deleted")
    else:
        client.delete_revision(name, revision, if_match=arguments.if_match, wait=arguments.wait)
        _print(f"{name} {revision} deleted")


def _print_table(adapters: Sequence[AdapterSummary]) -> None:
    rows = [
        (
            adapter.name,
            adapter.state,
            (adapter.revision or "-")[:_SHORT],
            str(len(adapter.labels)),
            adapter.method or "-",
            adapter.backbone or "-",
            (adapter.created or "-")[:10],
            _size(adapter.size),
        )
        for adapter in adapters
    ]
    headings = ("name", "state", "revision", "labels", "method", "backbone", "created", "size")
    print_table(headings, rows, right=("labels", "size"))
    for adapter in adapters:
        if adapter.reason is not None:
            _print(f"{adapter.name}: {one_line(adapter.reason)}")


def _described(adapter: AdapterDetail, card: str | None) -> dict[str, str]:
    labels = ", ".join(adapter.labels[:20]) + (", ..." if len(adapter.labels) > 20 else "")
    earlier = [revision for revision in adapter.revisions if revision != adapter.revision]
    described = {
        "name": adapter.name,
        "state": adapter.state,
        "revision": adapter.revision or "-",
        "reason": adapter.reason,
        "labels": f"{len(adapter.labels)}: {labels}",
        "answers": _answers(adapter.spec),
        "method": adapter.method,
        "backbone": adapter.backbone,
        "prompt length": adapter.prompt_length,
        "created": adapter.created,
        "size": _size(adapter.size),
        "card": card,
        "earlier": ", ".join(revision[:_SHORT] for revision in earlier),
    }
    return {name: str(value) for name, value in described.items() if value not in (None, "")}


def _divided(traffic: TrafficDetail) -> dict[str, str]:
    kind = "shadow, answers none" if traffic.shadow else "canary, answers them"
    ended, figures = traffic.ended, traffic.figures
    lines = {
        "name": traffic.name,
        "current": (traffic.current or "-")[:_SHORT],
        "tried": f"{(traffic.revision or '-')[:_SHORT]} on {traffic.percent:g} % of texts, {kind}",
        "state": traffic.state if ended is None else f"ended at {ended.at}: {ended.reason}",
    }
    if figures is None:
        return lines
    for role in ("current", "canary", "shadow"):
        reading = getattr(figures, role)
        latency = "" if reading.latency_ms is None else f", {reading.latency_ms:.1f} ms"
        lines[f"{role} texts"] = f"{reading.texts}, {reading.errors} failed{latency}"
    if figures.disagreement_rate is not None:
        lines["disagree"] = (
            f"{figures.disagreements} of {figures.compared} texts, "
            f"{figures.disagreement_rate:.1%} ({figures.disagreement_low or 0:.1%} to "
            f"{figures.disagreement_high or 0:.1%})"
        )
    if figures.score_difference is not None:
        lines["scores"] = f"{figures.score_difference:+.3f} for the current one's best label"
    for direction in figures.directions:
        # One line each: the most frequent first.
        lines[f"  {direction.before} -> {direction.after}"] = f"{direction.texts} texts"
    return lines


def _answers(spec: Mapping[str, Any] | None) -> str | None:
    """Whether a text gets one label or a set of them, and what a label needs to be an answer."""
    if spec is None:
        return None
    if spec.get("activation") != "sigmoid":
        below = (spec.get("decision") or {}).get("abstain_below")
        abstains = "" if below is None else f", abstains below a score of {below:g}"
        return f"one label a text{abstains}"
    thresholds = spec.get("thresholds") or [0.5]
    least, most = min(thresholds), max(thresholds)
    span = f"{least:.2f}" if least == most else f"{least:.2f} to {most:.2f}"
    return f"several labels a text, thresholds {span}"


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f} MiB"


def _print_published(published: Published, arguments: Namespace) -> None:
    if arguments.json:
        _print_json(published)
    else:
        outcome = "staged" if getattr(arguments, "stage", False) else published.outcome
        _print(f"{published.name} {published.revision} {outcome}")


def _print_report(report: UploadReport, arguments: Namespace) -> None:
    """
    Raises:
        CommandFailed: the service would refuse the file.
    """
    if arguments.json:
        _print_json(report)
    else:
        for line in report.lines():
            _print(one_line(line))
    if report.error is not None:
        details = [item for item in report.error.details if item not in report.error.message]
        raise CommandFailed("; ".join([f"{report.error.type}: {report.error.message}", *details]))


def _print_json(content: object) -> None:
    _print(msgspec.json.encode(content).decode())


def _note(line: str) -> None:
    sys.stderr.write(f"{one_line(line)}\n")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
