"""`dicomnode outbox` and `dicomnode resend`: results on their way to the endpoints."""

import time
from pathlib import Path

import typer

from dicomnode.cli.cases import node_runs, open_ledger, table
from dicomnode.storage.ledger import State
from dicomnode.storage.outbox import Delivery, Outbox

_OPEN = (State.EXPORTING, State.FAILED)


def list_outbox(root: Path) -> None:
    """A line for each case and endpoint with results that were not all acknowledged."""
    with open_ledger(root) as ledger:
        outbox = Outbox(ledger)
        outages = outbox.outages()
        rows = []
        for case in ledger.cases(*_OPEN):
            results = ledger.results(case.id)
            known = {export.endpoint: export for export in outbox.exports(case.id)}
            if results and not known:
                rows.append((str(case.id), "-", "PENDING", f"0 of {len(results)}", "0", "now", ""))
            for endpoint, export in known.items():
                answers = outbox.answers(case.id, endpoint).values()
                stored = sum(answer.stored for answer in answers)
                outage = outages.get(endpoint)
                moment = max(export.next, 0.0 if outage is None else outage.next)
                is_waiting = export.state is Delivery.PENDING and case.state is State.EXPORTING
                rows.append(
                    (
                        str(case.id), endpoint, export.state.value, f"{stored} of {len(results)}",
                        str(export.attempts), _until(moment) if is_waiting else "-", export.problem,
                    )
                )  # fmt: skip
    if rows:
        table(("CASE", "ENDPOINT", "STATE", "STORED", "ATTEMPTS", "NEXT", "PROBLEM"), rows)
    else:
        typer.echo("nothing waits for an endpoint")


def show_results(root: Path, number: int) -> None:
    """A line for each result of one case and endpoint, with the last answer."""
    with open_ledger(root) as ledger:
        ledger.case(number)
        outbox = Outbox(ledger)
        results = ledger.results(number)
        rows = []
        for export in outbox.exports(number):
            answers = outbox.answers(number, export.endpoint)
            for result in results:
                answer = answers.get(result.uid)
                if answer is None:
                    state, said, attempts = export.state.value, "-", "0"
                else:
                    state = "SENT" if answer.stored else export.state.value
                    said = f"0x{answer.status:04X} {answer.comment}".rstrip()
                    attempts = str(answer.attempts)
                rows.append((export.endpoint, result.uid, state, attempts, said))
    if rows:
        table(("ENDPOINT", "SOPINSTANCEUID", "STATE", "ATTEMPTS", "LAST ANSWER"), rows)
    else:
        typer.echo(f"no endpoint was asked to keep a result of case {number} yet")


def resend_results(root: Path, number: int | None) -> None:
    """FAILED -> EXPORTING where results are kept, and no pause for what waits."""
    with open_ledger(root) as ledger:
        cases = Outbox(ledger).resend(number)
    if not cases:
        typer.echo("no case has results that wait")
        return
    when = "now" if node_runs(root) else "at the next start of the node"
    named = ", ".join(map(str, cases))
    typer.echo(f"what is left of case {named} is sent {when}")


def _until(moment: float) -> str:
    left = moment - time.time()
    return "now" if left <= 0 else f"in {left:.0f} s"
