"""The command line: arguments, messages and pictures, then real nodes, associations, processes."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from typer.testing import CliRunner, Result

from dicomnode.cli.main import app, main
from dicomnode.cli.picture import grey, terminal_lines
from dicomnode.lib.dicom import load
from dicomnode.lib.dimse import Address, echo, send
from dicomnode.lib.grinders import volume_grinder
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import InstanceRow, Ledger, ResultRow, State
from dicomnode.testing import (
    StoringNode,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
    write_series,
)

COMMANDS = ["run", "demo", "send", "echo", "show", "cases", "retry", "doctor", "explain"]

PIPELINE = """
from dicomnode.server.node import AbstractPipeline

class {}(AbstractPipeline):
    pass
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def failure(*arguments: object) -> str:
    """The one line on stderr of a command that fails."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("dicomnode: ")
    return result.stderr


def ledger_of(root: Path) -> Ledger:
    (root / ".dicomnode").mkdir(parents=True)
    return Ledger(root / ".dicomnode" / "ledger.sqlite")


def failed_case(ledger: Ledger, error: str, identifier: str = "P1") -> int:
    case = ledger.open_case(identifier, identifier)
    ledger.add_instances(
        case.id, [InstanceRow("ct", f"1.{k}", f"{k}.dcm", 10, b"", k == 0) for k in range(3)]
    )
    ledger.move(case.id, State.RECEIVING, State.READY)
    ledger.move(case.id, State.READY, State.PROCESSING, seal=True)
    ledger.fail(case.id, error)
    return case.id


# Help and usage


def test_help_lists_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(re.search(rf"^  {name} ", result.stdout, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: dicomnode {command} " in result.stdout


def test_no_argument_is_answered_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert "Usage: dicomnode" in capsys.readouterr().out


def test_version_is_shown() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"dicomnode \d+\.\d+\.\d+\n", result.stdout)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "dicomnode: No such command 'frobnicate'"),
        (["echo", "localhost"], "dicomnode echo: Missing argument 'port'"),
        (["echo", "localhost", "70000", "X"], "dicomnode echo: Invalid value for 'port'"),
        (["cases"], "dicomnode cases: Missing option '--root'"),
        (["show", "x", "--nope"], "dicomnode show: No such option: --nope"),
        (["retry", "one", "--root", "."], "dicomnode retry: Invalid value for 'case'"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.count("\n") == 1
    assert told.lower().startswith(expected.lower())
    assert "--help" in told


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from dicomnode.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'pydicom', 'pynetdicom', 'PIL', 'sqlite3'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# run


def test_run_tells_that_there_is_no_such_file(tmp_path: Path) -> None:
    assert "no such file: " in failure("run", tmp_path / "nope.py")


def test_run_tells_the_line_of_a_failing_import(tmp_path: Path) -> None:
    file = tmp_path / "broken_import.py"
    file.write_text("import sys\n\nimport no_such_module_at_all\n")
    assert f"{file}:3: ModuleNotFoundError: " in failure("run", file)


def test_run_tells_the_line_of_a_module_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("\n1 / 0\n")
    file = tmp_path / "imports_beside.py"
    file.write_text("import beside_it\n")
    assert f"{tmp_path / 'beside_it.py'}:2: ZeroDivisionError" in failure("run", file)


def test_run_tells_the_line_of_a_syntax_error(tmp_path: Path) -> None:
    file = tmp_path / "broken_syntax.py"
    file.write_text("\nclass :\n")
    assert f"{file}:2: SyntaxError" in failure("run", file)


def test_run_tells_that_a_file_has_no_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "no_pipeline.py"
    file.write_text("from dicomnode.server.node import AbstractPipeline\n")
    assert "defines no subclass of AbstractPipeline" in failure("run", file)


def test_run_lists_the_pipelines_where_it_cannot_choose(tmp_path: Path) -> None:
    file = tmp_path / "two_pipelines.py"
    file.write_text(PIPELINE.format("First") + PIPELINE.format("Second"))
    assert "First, Second" in failure("run", file)
    assert "has no pipeline Third; it has First, Second" in failure("run", f"{file}:Third")


def test_run_does_not_run_the_main_block_and_tells_why_it_cannot_listen(tmp_path: Path) -> None:
    file = tmp_path / "with_main_block.py"
    file.write_text(
        PIPELINE.format("Mine") + "if __name__ == '__main__':\n    raise ValueError('main')\n"
    )
    told = failure("run", file, "--ip", "203.0.113.7", "--port", "0")
    assert "cannot listen on 203.0.113.7:0" in told


def test_run_tells_the_line_where_the_users_own_hook_fails(tmp_path: Path) -> None:
    file = tmp_path / "failing_hook.py"
    file.write_text(
        PIPELINE.format("Mine") + "    def post_init(self):\n        raise ValueError('my own')\n"
    )
    assert f"{file}:7: ValueError: my own" in failure("run", f"{file}:Mine")


# send, echo


def test_send_tells_what_is_no_file_and_what_is_no_dicom(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("no images here")
    assert "No such file" in failure("send", tmp_path / "nope", "localhost", 1, "X")
    assert f"{other}: " in failure("send", other, "localhost", 1, "X")
    assert f"no DICOM object in {tmp_path}" in failure("send", tmp_path, "localhost", 1, "X")


def test_echo_tells_that_nobody_listens(free_port: int) -> None:
    assert "cannot be reached" in failure("echo", "127.0.0.1", free_port, "X")


def test_send_tells_that_nobody_listens(free_port: int, tmp_path: Path) -> None:
    write_series(make_series(2), tmp_path)
    assert "cannot be reached" in failure("send", tmp_path, "127.0.0.1", free_port, "X")


# show


@pytest.fixture
def named_file(tmp_path: Path) -> Path:
    dataset = make_series(1)[0]
    dataset.PatientName = "Secret^Person"
    dataset.PatientBirthDate = "19610203"
    dataset.OperatorsName = "Nosy^Nurse"
    dataset.SeriesDescription = "steers\x1b[31m"
    return write_series([dataset], tmp_path / "named")[0]


def test_show_hides_names_and_birth_dates(named_file: Path) -> None:
    result = invoke("show", named_file)
    assert result.exit_code == 0, result.output
    assert not re.search("Secret|Person|19610203|Nosy|Nurse", result.output)
    assert re.search(r"PatientName +\*\*\*$", result.stdout, re.MULTILINE)
    assert re.search(r"Modality +CT$", result.stdout, re.MULTILINE)
    assert "\x1b" not in result.stdout


def test_show_identifiable_shows_them(named_file: Path) -> None:
    result = invoke("show", named_file, "--identifiable")
    assert all(text in result.stdout for text in ("Secret^Person", "19610203", "Nosy^Nurse"))


def test_show_draws_the_slice_in_text(named_file: Path) -> None:
    picture = invoke("show", named_file).stdout.splitlines()[-13:]
    assert max(len(line) for line in picture) <= 40
    assert any("@" in line for line in picture)
    assert any(line.startswith(" " * 3) for line in picture)


def test_show_writes_a_png(named_file: Path, tmp_path: Path) -> None:
    png = tmp_path / "slice.png"
    assert invoke("show", named_file, "--png", png).exit_code == 0
    with Image.open(png) as image:
        assert image.mode == "L"
        assert image.size == (480, round(384 * 0.8 / 0.75))
        values = numpy.asarray(image)
    assert values.min() == 0
    assert values.max() == 255


def test_show_inverts_monochrome1_for_display(tmp_path: Path) -> None:
    dataset = make_series(1)[0]
    pictures = []
    for kind in ("MONOCHROME2", "MONOCHROME1"):
        dataset.PhotometricInterpretation = kind
        file = write_series([dataset], tmp_path / kind)[0]
        invoke("show", file, "--png", tmp_path / f"{kind}.png")
        with Image.open(tmp_path / f"{kind}.png") as image:
            pictures.append(numpy.asarray(image).astype(int))
    assert abs(pictures[0] + pictures[1] - 255).max() <= 1


def test_show_writes_colour_images_in_colour(tmp_path: Path) -> None:
    file = get_testdata_file("examples_palette.dcm", download=False)
    png = tmp_path / "palette.png"
    assert invoke("show", str(file), "--png", png).exit_code == 0
    with Image.open(png) as image:
        assert image.mode == "RGB"


def test_show_lists_the_series_of_a_folder(tmp_path: Path) -> None:
    first, second = make_series(8), make_series(3, modality="MR")
    del second[1].ImagePositionPatient
    write_series(first, tmp_path / "a")
    write_series(second, tmp_path / "b")
    result = invoke("show", tmp_path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "CT Phantom: 8 images of 40 x 32, 2.5 x 0.8 x 0.75 mm (slice x row x column)"
    )
    assert lines[1].startswith("MR Phantom: 3 images of 40 x 32, no volume: image ")
    assert second[1].SOPInstanceUID in lines[1]
    assert any("@" in line for line in lines[2:])


def test_show_tells_what_it_cannot_read(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("no images here")
    assert f"{other}: " in failure("show", other)
    assert "No such file" in failure("show", tmp_path / "nope")
    assert "no DICOM object" in failure("show", tmp_path)


def test_show_without_pixels_shows_the_header_but_writes_no_png(tmp_path: Path) -> None:
    dataset: Dataset = make_series(1)[0]
    del dataset.PixelData
    file = write_series([dataset], tmp_path)[0]
    assert invoke("show", file).exit_code == 0
    assert "has no Pixel Data" in failure("show", file, "--png", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_grey_maps_the_window_to_black_and_white() -> None:
    values = numpy.array([[-2000.0, -100.0, 0.0, 100.0, 2000.0]])
    assert grey(values, (-100, 100)).tolist() == [[0, 0, 128, 255, 255]]
    assert grey(values, (-100, 100), inverted=True).tolist() == [[255, 255, 127, 0, 0]]
    assert grey(numpy.full((2, 2), 7)).tolist() == [[0, 0], [0, 0]]


def test_terminal_picture_in_colour_uses_half_blocks() -> None:
    picture = numpy.array([[0, 255], [255, 0]], numpy.uint8)
    assert terminal_lines(picture, 80, colour=True) == [
        "\x1b[38;2;0;0;0;48;2;255;255;255m▀\x1b[38;2;255;255;255;48;2;0;0;0m▀\x1b[0m"
    ]


# cases, retry


def test_cases_of_a_folder_without_a_ledger_is_an_error_and_makes_nothing(tmp_path: Path) -> None:
    assert "holds no ledger" in failure("cases", "--root", tmp_path)
    assert "holds no ledger" in failure("retry", 1, "--root", tmp_path / "nope")
    assert list(tmp_path.iterdir()) == []


def test_cases_of_a_damaged_ledger_is_an_error(tmp_path: Path) -> None:
    ledger_of(tmp_path).close()
    (tmp_path / ".dicomnode" / "ledger.sqlite").write_bytes(b"no database" * 1000)
    assert "cannot be used" in failure("cases", "--root", tmp_path)


def test_cases_lists_state_images_and_the_last_line_of_the_error(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    number = failed_case(ledger, "Traceback ...\n  line 3\nValueError: no\x1b[2J liver\n")
    done = ledger.open_case("P2", "P2")
    ledger.move(done.id, State.RECEIVING, State.DONE, seal=True)
    ledger.close()
    lines = invoke("cases", "--root", tmp_path).stdout.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == [
        str(number), "P1", "FAILED", "ct:", "3", "(1", "damaged)", "1", "0", "s",
        "ValueError:", "no·[2J", "liver",
    ]  # fmt: skip
    assert lines[2] == "1 more is over: --all shows them"
    everything = invoke("cases", "--root", tmp_path, "--all").stdout.splitlines()
    assert everything[2].split()[:4] == [str(done.id), "P2", "DONE", "-"]


def test_cases_of_an_empty_ledger(tmp_path: Path) -> None:
    ledger_of(tmp_path).close()
    assert invoke("cases", "--root", tmp_path).stdout == "no unfinished case\n"


def test_cases_shows_one_case_with_its_whole_traceback(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    number = failed_case(ledger, "Traceback ...\n  line 3\nValueError: no liver\n")
    ledger.close()
    shown = invoke("cases", "--root", tmp_path, "--case", number).stdout
    assert "Traceback ...\n  line 3\nValueError: no liver\n" in shown
    assert re.search(r"^state +FAILED$", shown, re.MULTILINE)
    assert "there is no case 99" in failure("cases", "--root", tmp_path, "--case", 99)


def test_retry_makes_a_failed_case_ready_for_the_next_start(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    number = failed_case(ledger, "ValueError: no liver")
    result = invoke("retry", number, "--root", tmp_path)
    assert result.stdout == f"case {number} is READY: it runs at the next start of the node\n"
    assert ledger.case(number).state is State.READY
    assert "only a FAILED case can be retried" in failure("retry", number, "--root", tmp_path)
    assert "there is no case 99" in failure("retry", 99, "--root", tmp_path)
    ledger.close()


def test_retry_of_a_case_with_results_exports_them_again(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    case = ledger.open_case("P1", "P1")
    ledger.move(case.id, State.RECEIVING, State.PROCESSING, seal=True)
    ledger.export(case.id, [ResultRow(1, "1.2", "1.3", "1.4", "1.dcm", b"digest")])
    ledger.fail(case.id, "no connection")
    ledger.close()
    assert "is EXPORTING: " in invoke("retry", case.id, "--root", tmp_path).stdout


# demo


def test_demo_tells_that_a_folder_holds_no_series(tmp_path: Path) -> None:
    assert "No such file" in failure("demo", tmp_path / "x", "--output", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "no DICOM object" in failure("demo", tmp_path / "empty", "--output", tmp_path / "o")
    assert not (tmp_path / "o").exists()


# With nodes that run

PLUS_ONE = Path(__file__, "../../../examples/plus_one.py").resolve()


@contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own; killed at the end if it still runs."""
    code = "from dicomnode.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


class OnlyCT(AbstractInput):
    required_values = {"Modality": "CT"}

    def validate(self) -> bool:
        return False


class CTNode(AbstractPipeline):
    ae_title = "CTNODE"
    input = {"ct": OnlyCT}


class AnyImage(AbstractInput):
    def validate(self) -> bool:
        return self.images == 3


class Fragile(AbstractPipeline):
    """Fails until it is told that it is repaired."""

    ae_title = "FRAGILE"
    input = {"images": AnyImage}
    repaired = threading.Event()

    def process(self, input_data: dict[str, Any]) -> list[Dataset]:
        if not self.repaired.is_set():
            raise ValueError("no liver found")
        return []


@pytest.fixture(autouse=True)
def fragile() -> None:
    Fragile.repaired = threading.Event()


# echo, send


def test_echo_tells_that_a_node_answers() -> None:
    with running_node(StoringNode) as node:
        result = invoke("echo", "127.0.0.1", node.port, "STORE", "--calling", "ME")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(rf"STORE@127.0.0.1:{node.port} answered in [\d.]+ s\n", result.stdout)


def test_echo_with_another_called_title_is_rejected() -> None:
    with running_node(StoringNode) as node:
        assert "rejected" in failure("echo", "127.0.0.1", node.port, "OTHER")


def test_send_sends_files_and_folders(tmp_path: Path) -> None:
    first, second = make_series(3), make_series(2)
    files = write_series(first, tmp_path / "a")
    write_series(second, tmp_path / "b" / "c")
    with running_node(StoringNode) as node:
        result = invoke("send", *files, tmp_path / "b", "127.0.0.1", node.port, "STORE")
        arrived = node.wait_for_images(5)
    assert result.exit_code == 0, result.output
    assert [one.SOPInstanceUID for one in arrived] == [
        one.SOPInstanceUID for one in (*first, *second)
    ]
    assert "5 x 0x0000  stored" in result.stdout
    assert re.search(r"^5 objects in ", result.stdout, re.MULTILINE)


def test_send_fails_where_the_node_does_not_store_an_object(tmp_path: Path) -> None:
    datasets = [*make_series(2), *make_series(2, modality="MR")]
    write_series(datasets, tmp_path)
    with running_node(CTNode) as node:
        result = invoke("send", tmp_path, "127.0.0.1", node.port, "CTNODE")
    assert result.exit_code == 1
    assert "2 x 0x0000" in result.stdout
    assert "2 x 0xB006" in result.stdout
    assert result.stderr == (
        f"dicomnode: 2 of 4 objects were not stored, the first {datasets[2].SOPInstanceUID} with "
        "status 0xB006 no input takes it\n"
    )


def test_send_fails_where_the_node_holds_other_content_under_that_uid(tmp_path: Path) -> None:
    series = make_series(2)
    with running_node(CTNode) as node:
        send(address_of(node), series[:1])
        series[0].SeriesDescription = "changed"
        write_series(series, tmp_path)
        told = failure("send", tmp_path, "127.0.0.1", node.port, "CTNODE")
    assert f"1 of 2 objects were not stored, the first {series[0].SOPInstanceUID}" in told
    assert "0x0111" in told


# run


def test_run_opens_the_node_and_sigterm_closes_it(tmp_path: Path) -> None:
    with process("run", PLUS_ONE, "--port", 0, "--ae-title", "MINE", "--root", tmp_path) as child:
        assert child.stdout is not None
        opened = child.stdout.readline()
        found = re.search(r"MINE listens on 127\.0\.0\.1:(\d+)", opened)
        assert found, opened
        echo(Address("127.0.0.1", int(found[1]), "MINE"))
        child.send_signal(signal.SIGTERM)
        rest, errors = child.communicate(timeout=30)
    assert child.returncode == 0, errors
    assert "MINE closed" in rest
    assert errors == ""
    assert (tmp_path / ".dicomnode" / "ledger.sqlite").exists()


def test_sigterm_right_after_the_start_closes_the_node_too(tmp_path: Path) -> None:
    file = tmp_path / "slow_start.py"
    file.write_text(
        "import sys, threading\n"
        "from dicomnode.server.node import AbstractPipeline\n"
        "class Slow(AbstractPipeline):\n"
        "    def post_init(self):\n"
        "        print('opening', flush=True)\n"
        "        threading.Event().wait(60)\n"
    )
    with process("run", file, "--port", 0, "--root", tmp_path / "root") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "opening\n"
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 0, errors
    assert errors == ""


def test_run_tells_that_a_port_is_taken_and_that_a_root_is_taken(tmp_path: Path) -> None:
    with running_node(CTNode, root_data_directory=tmp_path / "root") as node:
        told = failure("run", PLUS_ONE, "--port", node.port, "--root", tmp_path / "other")
        assert f"cannot listen on 127.0.0.1:{node.port}" in told
        told = failure("run", PLUS_ONE, "--port", 0, "--root", tmp_path / "root")
        assert "is in use by another running node" in told


def test_the_example_adds_one_and_keeps_the_geometry(tmp_path: Path) -> None:
    sys.path.insert(0, str(PLUS_ONE.parent))
    try:
        import plus_one
    finally:
        sys.path.remove(str(PLUS_ONE.parent))

    class Four(plus_one.CTSeries):
        expected_images = 4

    class SmallPlusOne(plus_one.PlusOne):
        input = {"ct": Four}

    series = make_series(4)
    with (
        running_node(StoringNode) as store,
        running_node(
            SmallPlusOne, endpoints=[address_of(store)], root_data_directory=tmp_path
        ) as node,
    ):
        send(address_of(node), series)
        arrived = store.wait_for_images(4)
        wait_for_cases(node, State.DONE)
    before, after = volume_grinder(series), volume_grinder(arrived)
    assert (after.array == before.array + 1).all()
    assert (after.affine == before.affine).all()
    assert not set(after.sop_instance_uids) & set(before.sop_instance_uids)
    assert {one.SeriesDescription for one in arrived} == {"plus one"}


# cases, retry


def test_a_failed_case_is_listed_and_retried_while_the_node_runs(tmp_path: Path) -> None:
    with running_node(Fragile, root_data_directory=tmp_path) as node:
        send(address_of(node), make_series(3))
        wait_for_cases(node, State.FAILED)
        number = node.cases()[0].id
        listed = invoke("cases", "--root", tmp_path).stdout
        whole = invoke("cases", "--root", tmp_path, "--case", number).stdout
        Fragile.repaired.set()
        retried = invoke("retry", number, "--root", tmp_path)
        wait_for_cases(node, State.DONE)
        afterwards = invoke("cases", "--root", tmp_path, "--all").stdout
    assert re.search(
        rf"^{number} +PHANTOM-1 +FAILED +images: 3 +1 +\d+ s +ValueError: no liver found$",
        listed,
        re.MULTILINE,
    )
    assert "Traceback (most recent call last)" in whole
    assert 'raise ValueError("no liver found")' in whole
    assert retried.stdout == f"case {number} is READY: the running node takes it up now\n"
    assert re.search(rf"^{number} +PHANTOM-1 +DONE", afterwards, re.MULTILINE)


def test_a_failed_case_is_retried_at_the_next_start(tmp_path: Path) -> None:
    with running_node(Fragile, root_data_directory=tmp_path) as node:
        send(address_of(node), make_series(3))
        wait_for_cases(node, State.FAILED)
        number = node.cases()[0].id
    retried = invoke("retry", number, "--root", tmp_path)
    assert retried.stdout == f"case {number} is READY: it runs at the next start of the node\n"
    Fragile.repaired.set()
    with running_node(Fragile, root_data_directory=tmp_path) as node:
        wait_for_cases(node, State.DONE)


# demo


def test_demo_shows_each_step_and_can_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        result = invoke("demo", "--output", tmp_path, "--slices", 3)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        assert "4. generated CT, 3 slices" in result.stdout
        assert "volume         3 x 512 x 512 float32, " in result.stdout
        assert "delivered      3 of 3 instances, " in result.stdout
        assert result.stdout.count("case ready ") == 4
        assert f"4 of 4 series came back; all of it lies in {tmp_path}" in result.stdout
    pictures = sorted(tmp_path.glob("*/*.png"))
    assert len(pictures) == 12
    with Image.open(tmp_path / "04-generated-CT-3-slices" / "before-after.png") as image:
        picture = numpy.asarray(image)
    width = (picture.shape[1] - 8) // 2
    before, after = picture[:, :width], picture[:, -width:]
    # The body is light on the left; on the right only its outline is.
    assert numpy.mean(before > 100) > 0.3
    assert 0 < numpy.mean(after > 100) < 0.1


def test_demo_with_own_data_computes_the_gradient_and_goes_on_after_a_failure(
    tmp_path: Path,
) -> None:
    good, bad = make_series(5), make_series(5)
    del bad[2]
    write_series(bad, tmp_path / "data" / "a")
    write_series(good, tmp_path / "data" / "b")
    result = invoke("demo", tmp_path / "data", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert re.search(r"not processed  case \d+ is kept: .*InconsistentSeries: ", result.stdout)
    assert "1 of 2 series came back" in result.stdout
    [folder] = (tmp_path / "out" / "store").glob("*/stored")
    values = volume_grinder(good).array
    expected = numpy.hypot(*numpy.gradient(values, axis=(1, 2)))
    found = volume_grinder(load(folder)).array
    assert abs(found - expected).max() <= (expected.max() - expected.min()) / 0xFFFF
    assert "Phantom^Test" not in result.output


def test_demo_fails_where_no_series_came_back(tmp_path: Path) -> None:
    bad = make_series(5)
    del bad[2]
    write_series(bad, tmp_path / "data")
    result = invoke("demo", tmp_path / "data", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == "dicomnode: no series came back\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "FILE", "--root", ""],
        ["cases", "--root", ""],
        ["retry", "1", "--root", ""],
        ["demo", "--output", ""],
        ["demo", ""],
        ["show", ""],
        ["send", "", "127.0.0.1", "104", "X"],
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "the path is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_does_not_replace_what_is_no_picture(tmp_path: Path) -> None:
    (path,) = write_series(make_series(1), tmp_path)
    before = path.read_bytes()
    assert "is no PNG" in failure("show", path, "--png", path)
    assert path.read_bytes() == before


def test_a_case_number_beyond_the_ledger_is_told(tmp_path: Path) -> None:
    ledger_of(tmp_path).close()
    assert "there is no case" in failure("retry", 10**30, "--root", tmp_path)


def test_doctor_tells_what_decodes_each_transfer_syntax() -> None:
    said = invoke("doctor").stdout
    for syntax, decoder in (
        ("1.2.840.10008.1.2.5 ", "dicomnode"),
        ("1.2.840.10008.1.2.4.70 ", "libjpeg-turbo"),
        ("1.2.840.10008.1.2.4.80 ", "CharLS"),
        ("1.2.840.10008.1.2.4.201", "OpenJPEG"),
        ("1.2.840.10008.1.2.4.110", "jxl-rs"),
        ("1.2.840.10008.1.2.4.102 ", "not decoded"),
    ):
        (line,) = (one for one in said.splitlines() if one.startswith(syntax))
        assert decoder in line
        assert decoder == "not decoded" or re.search(r"\d+\.\d+\.\d+", line)
