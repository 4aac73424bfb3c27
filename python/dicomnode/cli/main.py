"""The command `dicomnode` and its parts: names, arguments and help.

What a command does is in a module of its own, which is imported when the command runs: the help has
to come at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli.edge import one_line_errors, quiet_pydicom

# The base of all usage errors, of typer's own copy of click or, with an older typer, of click.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="dicomnode",
    help="Turn a Python function on images into a DICOM node, and look after it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _path(text: str) -> Path:
    """A path that a user gave; an empty one is a variable that was not set, not this folder."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


Host = Annotated[str, typer.Argument(help="IP address or host name of the peer.")]
Port = Annotated[int, typer.Argument(help="Port on which the peer listens.", min=1, max=65535)]
Title = Annotated[str, typer.Argument(metavar="AET", help="AE title of the peer.")]
Calling = Annotated[str, typer.Option(metavar="AET", help="Our own AE title.")]
Root = Annotated[
    Path,
    typer.Option(
        parser=_path,
        metavar="DIR",
        help="The root_data_directory of the node.",
        show_default=False,
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run a command, and end the process with its exit code."""
    try:
        code = app(arguments, prog_name="dicomnode", standalone_mode=False)
    except typer.Abort:
        code = 130
    except _UsageError as error:
        code = _explain(error)
    sys.exit(code)


def _explain(error: Exception) -> int:
    """A wrong argument in one line; no argument at all is answered with the help."""
    message: str = getattr(error, "format_message", error.__str__)()
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message)
        return 0
    context = getattr(error, "ctx", None)
    command = "dicomnode" if context is None else context.command_path
    told = " ".join(message.split()).rstrip(".")
    typer.echo(f"{command}: {told}; see {command} --help", err=True)
    return 2


def _version(wanted: bool) -> None:
    if wanted:
        from dicomnode import __version__

        typer.echo(f"dicomnode {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: dicomnode run plus_one.py:PlusOne --port 11112 --root /var/lib/node")
def run(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py[:Class]", help="A file that defines a pipeline, and which of several."
        ),
    ],
    ip: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 finds a free one.", min=0, max=65535)
    ] = None,
    ae_title: Annotated[str | None, typer.Option(help="AE title of the node.")] = None,
    root: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="DIR", help="Where images rest: root_data_directory."),
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Port of /healthz and /metrics.", min=0, max=65535)
    ] = None,
    health_ip: Annotated[str | None, typer.Option(help="Address of these pages.")] = None,
) -> None:
    """Open the pipeline of a file, and stay until Ctrl-C or SIGTERM.

    Options replace the attributes of the class.
    """
    # What pydicom warns of quotes values, and would be in the log.
    with one_line_errors(), quiet_pydicom():
        from dicomnode.cli.run import run_pipeline

        settings = {
            "ip": ip,
            "port": port,
            "ae_title": ae_title,
            "root_data_directory": root,
            "health_port": health_port,
            "health_ip": health_ip,
        }
        run_pipeline(file, settings)


@app.command(epilog="Example: dicomnode doctor --pipeline plus_one.py")
def doctor(
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py[:Class]",
            help="Check whether this pipeline could run here.",
        ),
    ] = None,
) -> None:
    """Check whether a pipeline could run here, or show what this installation is made of.

    With --pipeline one line for each thing that is looked at: its settings, ports, folder, disk,
    decoders, endpoints (by C-ECHO). The exit code is 1 where one of them is an error. Without it:
    versions, and what decodes each transfer syntax.
    """
    with one_line_errors():
        if pipeline is None:
            from dicomnode.cli.doctor import show_installation

            show_installation()
            return
        from dicomnode.cli.checkup import check_pipeline

        raise typer.Exit(check_pipeline(pipeline))


@app.command(epilog="Example: dicomnode demo ~/scans/ct-thorax --output demo-output")
def demo(
    data: Annotated[
        Path | None,
        typer.Argument(
            parser=_path,
            metavar="[DATA_FOLDER]",
            help="Your own DICOM files.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(parser=_path, metavar="DIR", help="Where results go.")
    ] = Path("demo-output"),
    slices: Annotated[int, typer.Option(hidden=True, min=1)] = 120,
) -> None:
    """Send series to an example node, and show what comes back.

    Two nodes run on this machine: one computes the edges in each slice, the other stores the
    results. Without a folder they get images that come with pydicom, and a generated CT series of
    120 slices.
    """
    with one_line_errors(), quiet_pydicom():
        from dicomnode.cli.demo import show_demo

        show_demo(data, output, slices)


@app.command(epilog="Example: dicomnode send scans/ localhost 11112 PLUSONE")
def send(
    paths: Annotated[
        list[Path],
        typer.Argument(parser=_path, metavar="PATH...", help="DICOM files, or folders of them."),
    ],
    host: Host,
    port: Port,
    aet: Title,
    calling: Calling = "DICOMNODE",
) -> None:
    """Send files to a node, and tell what it answered (C-STORE).

    The exit code is 1 where any object was not stored.
    """
    with one_line_errors(), quiet_pydicom():
        from dicomnode.cli.peer import send_files

        send_files(paths, host, port, aet, calling)


@app.command(epilog="Example: dicomnode echo localhost 11112 PLUSONE")
def echo(host: Host, port: Port, aet: Title, calling: Calling = "DICOMNODE") -> None:
    """Ask whether a node answers (C-ECHO)."""
    with one_line_errors():
        from dicomnode.cli.peer import echo_peer

        echo_peer(host, port, aet, calling)


@app.command(epilog="Example: dicomnode show scans/0001.dcm --png slice.png")
def show(
    path: Annotated[
        Path,
        typer.Argument(parser=_path, metavar="PATH", help="A DICOM file, or a folder of them."),
    ],
    png: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="FILE", help="Write the picture there instead."),
    ] = None,
    identifiable: Annotated[
        bool, typer.Option("--identifiable", help="Show names and birth dates as well.")
    ] = False,
) -> None:
    """Show the header and a picture of a file, or the series in a folder.

    Of a folder, the picture is the middle slice of its largest series.
    """
    with one_line_errors(), quiet_pydicom():
        from dicomnode.cli.show import show_path

        show_path(path, png, identifiable)


@app.command(
    epilog="Example: dicomnode explain scans/ --pipeline plus_one.py\n\n"
    "Example: dicomnode explain --root /var/lib/node --case 7 --pipeline plus_one.py"
)
def explain(
    pipeline: Annotated[
        str,
        typer.Option(
            metavar="FILE.py[:Class]",
            help="A file that defines a pipeline, and which of several.",
            show_default=False,
        ),
    ],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=_path,
            metavar="[FILE...]",
            help="DICOM files, or folders of them.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            parser=_path, metavar="DIR", help="Explain the cases in a root_data_directory instead."
        ),
    ] = None,
    case: Annotated[
        int | None, typer.Option(metavar="CASE", help="With --root, only this case.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="A line for each file; else equal ones are together.")
    ] = False,
) -> None:
    """Tell which inputs of a pipeline take an image and why others do not, and what cases wait for.

    No node has to run, and nothing is written. The files are taken as if one association brought
    them. The exit code is 0 where every image is taken and every case is complete, 3 where an image
    is taken by no input, 4 where a case waits.
    """
    if bool(paths) == (root is not None) or (case is not None and root is None):
        raise typer.BadParameter("give either files, or --root with or without --case")
    with one_line_errors(), quiet_pydicom():
        from dicomnode.cli.explain import explain_cases, explain_files

        if root is not None:
            code = explain_cases(root, case, pipeline)
        else:
            code = explain_files(paths or [], pipeline, each)
        raise typer.Exit(code)


@app.command(epilog="Example: dicomnode cases --root /var/lib/node --case 7")
def cases(
    root: Root,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show DONE and EXPIRED cases as well.")
    ] = False,
    case: Annotated[
        int | None, typer.Option(metavar="CASE", help="Show one case with its whole error.")
    ] = None,
    complete: Annotated[
        int | None,
        typer.Option(metavar="CASE", help="Process a case as it is, though it is not complete."),
    ] = None,
) -> None:
    """List the cases of a node, also while it runs."""
    with one_line_errors():
        from dicomnode.cli.cases import complete_case, list_cases, show_case

        if complete is not None:
            complete_case(root, complete)
        elif case is None:
            list_cases(root, show_all)
        else:
            show_case(root, case)


@app.command(epilog="Example: dicomnode retry 7 --root /var/lib/node")
def retry(
    case: Annotated[int, typer.Argument(help="The number of a FAILED case: see dicomnode cases.")],
    root: Root,
) -> None:
    """Run a FAILED case again, also while the node runs."""
    with one_line_errors():
        from dicomnode.cli.cases import retry_case

        retry_case(root, case)


@app.command(epilog="Example: dicomnode outbox --root /var/lib/node --case 7")
def outbox(
    root: Root,
    case: Annotated[
        int | None, typer.Option(metavar="CASE", help="Show each result of one case.")
    ] = None,
) -> None:
    """List what has yet to go to the endpoints, and what they said."""
    with one_line_errors():
        from dicomnode.cli.outbox import list_outbox, show_results

        if case is None:
            list_outbox(root)
        else:
            show_results(root, case)


@app.command(epilog="Example: dicomnode resend 7 --root /var/lib/node")
def resend(
    root: Root,
    case: Annotated[
        int | None, typer.Argument(help="The number of a case; without it all.")
    ] = None,
) -> None:
    """Send now what waits for an endpoint or was given up, also while the node runs.

    What an endpoint acknowledged before is not sent again.
    """
    with one_line_errors():
        from dicomnode.cli.outbox import resend_results

        resend_results(root, case)
