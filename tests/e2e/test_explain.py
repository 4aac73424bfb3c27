"""`dicomnode explain`: what becomes of each image, what each case waits for, and nobody's name."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dicomnode.cli.main import app
from dicomnode.lib.dicom import scan
from dicomnode.lib.dimse import Address, send
from dicomnode.lib.redaction import patient_words, redacted
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import Ledger
from dicomnode.storage.outbox import Outbox
from dicomnode.storage.waits import Waits
from dicomnode.testing import (
    State,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
    write_series,
)

PIPELINE = """
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline

class Ct(AbstractInput):
    required_values = {"Modality": "CT"}
    def validate(self):
        return self.images >= 3

class Pet(AbstractInput):
    required_values = {"Modality": "PT"}
    def validate(self):
        for dataset in self.data.values():
            raise ValueError(f"what is {dataset.PatientName}, born {dataset.PatientBirthDate}?")
        return False

class Both(AbstractPipeline):
    input = {"ct": Ct, "pet": Pet}

class OnlyCt(AbstractPipeline):
    input = {"ct": Ct}

class First(OnlyCt):
    def filter(self, dataset):
        if dataset.InstanceNumber == 2:
            raise KeyError(dataset.PatientName)
        return dataset.InstanceNumber < 2

class ByName(OnlyCt):
    patient_identifier_tag = "PatientName"
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    file = tmp_path / "pipeline.py"
    file.write_text(PIPELINE)
    return file


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three images of CT and one of MR of one patient."""
    folder = tmp_path / "scans"
    series = make_series(4, 8, 8, patient_id="P1")
    series[3].Modality = "MR"
    for dataset in series:
        dataset.PatientName, dataset.PatientBirthDate = "Doe^Jane", "19700131"
    write_series(series, folder)
    return folder


def explain(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["explain", *(str(one) for one in arguments)])


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_each_image_is_accepted_or_refused_with_the_reason(pipeline: Path, scans: Path) -> None:
    result = explain(scans, "--pipeline", f"{pipeline}:Both")
    first = files_of(scans)[0]
    assert result.exit_code == 4
    assert "case P1: 4 images\n" in result.stdout
    assert (
        f"  {first} and 2 more\n"
        "    ct   accepted\n"
        "    pet  refused: (0008,0060) Modality is 'CT', it has to be 'PT'\n"
    ) in result.stdout
    assert "ct   refused: (0008,0060) Modality is 'MR', it has to be 'CT'" in result.stdout
    assert (
        "  waits: input 'pet' has 0 images and does not validate\n"
        "        it refused 3 images: (0008,0060) Modality is 'CT', it has to be 'PT'\n"
    ) in result.stdout


def test_a_line_for_each_file_where_it_is_wanted(pipeline: Path, scans: Path) -> None:
    result = explain(*files_of(scans), "--each", "--pipeline", f"{pipeline}:OnlyCt")
    lines = [line for line in result.stdout.splitlines() if line.startswith(f"  {scans}")]
    assert len(lines) == 4
    assert sum(line.endswith(": ct  accepted") for line in lines) == 3


def test_the_exit_code_tells_refused_images_and_waiting_cases(pipeline: Path, scans: Path) -> None:
    *ct, mr = files_of(scans)
    only_ct = f"{pipeline}:OnlyCt"
    assert explain(*ct, "--pipeline", only_ct).exit_code == 0
    assert explain(*ct, mr, "--pipeline", only_ct).exit_code == 3
    assert explain(*ct[:2], "--pipeline", only_ct).exit_code == 4
    assert explain(mr, "--pipeline", only_ct).exit_code == 4
    assert explain(scans / "nope", "--pipeline", only_ct).exit_code == 1
    assert explain("--pipeline", only_ct).exit_code == 2


def test_the_filter_is_asked_and_its_errors_name_nobody(pipeline: Path, scans: Path) -> None:
    result = explain(scans, "--pipeline", f"{pipeline}:First")
    assert "refused: 0xB006 by filter()" in result.stdout
    assert "0xC000 the pipeline's own code raised KeyError" in result.stdout
    assert not re.search("Doe|Jane|1970", result.output)


def test_an_error_of_validate_is_told_without_the_patient(pipeline: Path, tmp_path: Path) -> None:
    series = make_series(1, 8, 8, patient_id="P1")
    series[0].Modality = "PT"
    series[0].PatientName, series[0].PatientBirthDate = "Doe^Jane", "19700131"
    write_series(series, tmp_path / "pet")
    result = explain(tmp_path / "pet", "--pipeline", f"{pipeline}:Both")
    assert "its validate() raised ValueError: what is ***, born ***?" in result.stdout


def test_a_name_that_is_the_identifier_is_not_shown(pipeline: Path, scans: Path) -> None:
    result = explain(scans, "--pipeline", f"{pipeline}:ByName")
    assert "case ***: 4 images" in result.stdout
    assert "Doe" not in result.output


def test_files_that_a_node_would_refuse_are_told(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    series = make_series(3, 8, 8, patient_id="P1")
    series[1].PatientID = ""
    write_series(series, folder)
    same = make_series(1, 8, 8, patient_id="P1")[0]
    same.SOPInstanceUID = same.file_meta.MediaStorageSOPInstanceUID = series[0].SOPInstanceUID
    same.save_as(folder / "same.dcm", enforce_file_format=True)
    cut = folder / "cut.dcm"
    cut.write_bytes(files_of(folder)[0].read_bytes()[:-10])
    (folder / "notes.txt").write_text("no image")
    told = explain(folder, "--pipeline", f"{pipeline}:OnlyCt").stdout
    assert "0xB007 no patient identifier" in told
    assert "0x0111" in told and "has the same SOPInstanceUID and other content" in told
    assert "0xC000 dataset cannot be understood" in told
    assert "1 file left out" in told


def test_a_folder_without_images_is_an_error(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = explain(tmp_path / "empty", "--pipeline", f"{pipeline}:OnlyCt")
    assert result.exit_code == 1
    assert "no DICOM object in" in result.stderr


def test_the_answers_are_those_of_the_node(pipeline: Path, scans: Path) -> None:
    class Ct(AbstractInput):
        required_values = {"Modality": "CT"}

        def validate(self) -> bool:
            return False

    class Node(AbstractPipeline):
        input = {"ct": Ct}

    series = make_series(2, 8, 8, patient_id="P1")
    series[1].Modality = "MR"
    with running_node(Node) as node:
        statuses = [answer.status for answer in send(address_of(node), series)]
    assert statuses == [0, 0xB006]
    *_, ct, mr = files_of(scans)
    assert "ct  accepted" in explain(ct, "--pipeline", f"{pipeline}:OnlyCt").stdout
    assert "ct  refused" in explain(mr, "--pipeline", f"{pipeline}:OnlyCt").stdout


def test_the_cases_of_a_node_tell_what_they_wait_for(pipeline: Path, tmp_path: Path) -> None:
    class Ct(AbstractInput):
        def validate(self) -> bool:
            return False

    class Node(AbstractPipeline):
        input = {"ct": Ct}

    root = tmp_path / "root"
    with running_node(Node, root_data_directory=root) as node:
        send(address_of(node), make_series(2, 8, 8, patient_id="P1"))
        # The node runs, and is not disturbed.
        result = explain("--root", root, "--pipeline", f"{pipeline}:Both")
        assert result.exit_code == 4
        assert "case 1 of P1: RECEIVING" in result.stdout
        assert "waits: input 'ct' has 2 images and does not validate" in result.stdout
        send(address_of(node), make_series(1, 8, 8, patient_id="P1"))
    result = explain("--root", root, "--case", 1, "--pipeline", f"{pipeline}:OnlyCt")
    assert result.exit_code == 0
    assert "complete: all inputs validate" in result.stdout
    assert explain("--root", root, "--case", 2, "--pipeline", pipeline).exit_code == 1


def test_a_case_on_its_way_out_tells_which_endpoint_it_waits_for(
    pipeline: Path, tmp_path: Path
) -> None:
    class Ct(AbstractInput):
        def validate(self) -> bool:
            return True

    class Node(AbstractPipeline):
        input = {"ct": Ct}
        endpoints = [Address("127.0.0.1", 9, "NOBODY")]

        def process(self, input_data: dict[str, Any]) -> Any:
            if "DONE" in str(next(iter(input_data["ct"])).PatientID):
                return None
            return input_data["ct"]

    root = tmp_path / "root"
    with running_node(Node, root_data_directory=root) as node:
        send(address_of(node), make_series(1, 8, 8, patient_id="P1"))
        node.wait(lambda: bool(Outbox(ledger_of(node)).exports(1)), 30)
        send(address_of(node), make_series(1, 8, 8, patient_id="DONE"))
        wait_for_cases(node, State.DONE)
    result = explain("--root", root, "--pipeline", f"{pipeline}:OnlyCt")
    assert result.exit_code == 4
    assert "case 1 of P1: EXPORTING" in result.stdout
    assert "waits: NOBODY@127.0.0.1:9 has yet to take its results" in result.stdout
    assert "DONE" not in result.stdout
    result = explain("--root", root, "--case", 2, "--pipeline", f"{pipeline}:OnlyCt")
    assert (result.exit_code, result.stdout) == (0, "case 2 of DONE: DONE\n")


def ledger_of(node: AbstractPipeline) -> Ledger:
    assert node._storage is not None
    return node._storage.ledger


def test_a_case_that_waits_for_silence_says_so(pipeline: Path, tmp_path: Path) -> None:
    class Ct(AbstractInput):
        def validate(self) -> bool:
            return True

    class Node(AbstractPipeline):
        input = {"ct": Ct}
        quiet_seconds = 600

    root = tmp_path / "root"
    with running_node(Node, root_data_directory=root) as node:
        send(address_of(node), make_series(3, 8, 8, patient_id="P1"))
        node.wait(lambda: bool(Waits(ledger_of(node)).of(1).reason), 30)
        result = explain("--root", root, "--pipeline", f"{pipeline}:OnlyCt")
    assert result.exit_code == 4
    assert "waits: the node says: no image for" in result.stdout


def test_the_real_command_writes_nothing_and_explains_many_files(
    pipeline: Path, ct_folder: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    command = "from dicomnode.cli.main import main; main()"
    arguments = ["explain", str(ct_folder), "--pipeline", f"{pipeline}:OnlyCt"]
    done = subprocess.run(
        [sys.executable, "-B", "-c", command, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "and 139 more" in done.stdout
    assert not done.stderr
    assert sorted(tmp_path.rglob("*")) == before


# What a text must not tell


def test_names_dates_and_identifiers_are_taken_out_of_a_text(tmp_path: Path) -> None:
    series = make_series(1, 8, 8, patient_id="0101701234")
    series[0].PatientName, series[0].PatientBirthDate = "Li^Müller-Jane", "19700131"
    series[0].SpecificCharacterSet = "ISO_IR 100"
    write_series(series, tmp_path)
    words = patient_words(scan(str(files_of(tmp_path)[0])))
    for text in (
        "LI MÜLLER-JANE", "Li^Müller-Jane", "li", "(0101701234)", "1970-01-31", "31.01.1970",
        "x_li_y", "datetime.date(1970, 1, 31)", "x19700131y",
    ):  # fmt: skip
        told = redacted(text, words)
        assert "***" in told and not re.search("(?i)li|jane|1970|0101", told), told
    assert redacted("validate: slice 12 of the liver", words) == "validate: slice 12 of the liver"
