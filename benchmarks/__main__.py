"""`python -m benchmarks`: all questions, or `--only` one; `--quick` is a smoke test."""

import argparse
import functools
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

from benchmarks import (
    associations,
    cine,
    compressed,
    eager,
    grind_enhanced,
    grind_files,
    grind_memory,
    grind_mr,
    grind_pet,
    header_scan,
    many,
    real_ct,
    receive,
    send,
    series,
    start,
)
from benchmarks.timing import Question, Table
from benchmarks.timing import answer as answer_question


class Sizes:
    """How much is measured."""

    def __init__(self, quick: bool) -> None:
        self.slices, self.matrix = (12, 64) if quick else (300, 512)
        self.pet = (12, 64, 64) if quick else (644, 400, 400)
        self.mr = (12, 32, 32) if quick else (180, 256, 256)
        self.cine = (6, 48, 64) if quick else (120, 480, 640)
        self.instances = (10, 20, 40) if quick else (1250, 5000, 20_000)
        self.kept = (50, 200) if quick else (1000, 10_000, 100_000)
        self.small_images = 100 if quick else 1000
        self.sent = 8 if quick else 140
        self.repeats = 2 if quick else 9
        self.receive_repeats = 1 if quick else 7
        self.target_repeats = 1 if quick else 15
        self.few_images = 20 if quick else 200
        self.associations = (1, 2) if quick else (1, 4, 16)
        self.memory = not quick
        self.quick = quick


class Bench:
    """All questions over one temporary folder, where each series is made once."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder = folder
        self._sizes = sizes
        data = os.environ.get("DICOMNODE_TEST_DATA", "")
        phantom = Path(data, "ct-phantom-140")
        self._phantom = phantom if data and phantom.is_dir() else None
        self.questions: dict[str, Callable[[], list[Table]]] = {
            "header_scan": lambda: [self._ask(header_scan, self._ct())],
            "grind_files": lambda: [self._ask(grind_files, self._ct())],
            "grind_memory": lambda: [self._ask(grind_memory, self._ct())],
            "real_ct": self._real,
            "grind_pet": lambda: [self._ask(grind_pet, self._series("PT", *self._sizes.pet))],
            "grind_mr": lambda: [self._ask(grind_mr, self._series("MR", *self._sizes.mr))],
            "grind_enhanced": self._enhanced,
            "many": self._many,
            "compressed": self._compressed,
            "cine": self._cine,
            "receive": self._receive,
            "receive_small": self._receive_small,
            "receive_targets": self._receive_targets,
            "associations": self._associations,
            "eager": self._eager,
            "send": self._sending,
            "start": lambda: [start.answer(self._sizes.kept, self._sizes.receive_repeats)],
        }

    def _made(self, name: str, write: Callable[..., Path], *size: int) -> Path:
        folder = self._folder / "-".join(map(str, (name, *size)))
        return folder if folder.exists() else write(folder, *size)

    def _series(self, kind: str, slices: int, rows: int, columns: int) -> Path:
        write = functools.partial(series.write, kind=kind)
        return self._made(kind, write, slices, rows, columns)

    def _ct(self) -> Path:
        return self._series("CT", self._sizes.slices, self._sizes.matrix, self._sizes.matrix)

    def _ask(self, question: Question, folder: Path, tiny: Path | None = None) -> Table:
        """A table; with its column of memory, for which `tiny` is a small folder of the kind."""
        tiny = (tiny or self._series("CT", 3, 16, 16)) if self._sizes.memory else None
        return answer_question(question, folder, self._sizes.repeats, tiny)

    def _enhanced(self) -> list[Table]:
        sizes, write = self._sizes, series.write_enhanced
        folder = self._made("enhanced", write, sizes.slices, sizes.matrix, sizes.matrix)
        return [self._ask(grind_enhanced, folder, self._made("enhanced", write, 3, 16, 16))]

    def _many(self) -> list[Table]:
        folders = {count: self._series("CT", count, 32, 32) for count in self._sizes.instances}
        return [many.together({n: self._ask(many, folder) for n, folder in folders.items()})]

    def _cine(self) -> list[Table]:
        folder = self._made("cine", cine.write, *self._sizes.cine)
        return [self._ask(cine, folder, self._made("cine", cine.write, 2, 16, 16))]

    def _real_folder(self) -> Path | None:
        folder = self._folder / "real"
        if folder.exists() or self._phantom is None:
            return folder if folder.exists() else None
        return real_ct.copy_images(self._phantom, folder)

    def _real(self) -> list[Table]:
        folder = self._real_folder()
        return [] if folder is None or self._sizes.quick else [self._ask(real_ct, folder)]

    def _compressed(self) -> list[Table]:
        sizes = self._sizes
        native = (None if sizes.quick else self._real_folder()) or self._ct()
        tables = []
        for name, syntax in compressed.SYNTAXES.items():
            folder = compressed.write(native, self._folder / f"compressed-{name}", syntax)
            question = compressed.Compressed(name, native)
            tables.append(answer_question(question, folder, sizes.repeats, None))
        return tables

    def _sent(self) -> tuple[Path, str]:
        """CT slices to be sent, and what they are."""
        sizes = self._sizes
        folder = None if sizes.quick else self._real_folder()
        if folder is not None:
            return folder, "real CT slices"
        return self._series("CT", sizes.sent, sizes.matrix, sizes.matrix), "CT slices"

    def _receive_targets(self) -> list[Table]:
        """Only those that are to be as fast as storescp, with so many runs that a median stands still."""
        sizes = self._sizes
        small = self._series("CT", sizes.small_images, 64, 64), "images of 64 x 64"
        tables = []
        for folder, kind in (self._sent(), small):
            for sender in ("dcmsend", "storescu"):
                for count in sizes.associations:
                    images = len(series.paths_of(folder))
                    title = f"Receiving {images} {kind} over {count} from {sender}"
                    everyone, repeats = receive.targets(), sizes.target_repeats
                    tables.append(receive.answer(title, folder, repeats, everyone, count, sender))
        return [table for table in tables if table is not None]

    def _receive(self) -> list[Table]:
        sizes = self._sizes
        folder, kind = self._sent()
        tables: list[Table | None] = [*self._send(folder, kind)]
        # Of few images the start of sixteen senders is a large part.
        longer = eager.lengthen(folder, self._folder / "longer", 4 * sizes.sent)
        for count in sizes.associations[1:]:
            title = f"Receiving {4 * sizes.sent} {kind} over {count} associations at once"
            closest, repeats = receive.closest(), sizes.receive_repeats
            tables.append(receive.answer(title, longer, repeats, closest, associations=count))
            title = f"Receiving {sizes.sent} {kind} from {count} storescu at once"
            tables.append(receive.answer(title, folder, repeats, closest, count, sender="storescu"))
        return [table for table in tables if table is not None]

    def _receive_small(self) -> list[Table]:
        images = self._series("CT", self._sizes.small_images, 64, 64)
        return self._send(images, "images of 64 x 64")

    def _associations(self) -> list[Table]:
        count, repeats = self._sizes.small_images, self._sizes.receive_repeats
        # Those that keep images in another way negotiate in the same one.
        apart = ('"process"', "in memory", "our socket settings", "+B", "made to flush")
        found = [one for one in receive.receivers() if not any(word in one.name for word in apart)]
        return [associations.answer(found, contexts, count, repeats) for contexts in (1, 120)]

    def _sending(self) -> list[Table]:
        sizes = self._sizes
        folder, kind = self._sent()
        small = self._series("CT", sizes.small_images, 64, 64)
        tables = []
        for images, name in ((folder, kind), (small, "images of 64 x 64")):
            for options in (("+B",), ("+B", "-pdu", "131072")):
                title = (
                    f"Sending {len(series.paths_of(images))} {name} to storescp {' '.join(options)}"
                )
                tables.append(send.answer(title, images, sizes.receive_repeats, *options))
        return [table for table in tables if table is not None]

    def _eager(self) -> list[Table]:
        sizes = self._sizes
        native = self._folder / "eager"
        source = (None if sizes.quick else self._real_folder()) or self._ct()
        eager.lengthen(source, native, sizes.slices)
        tables = []
        for name in eager.SYNTAXES:
            folder = self._folder / f"eager-{name}"
            folder = eager.compress(native, folder, name, sizes.slices)
            title = f"{sizes.slices} CT slices, {name or 'uncompressed'}"
            tables += eager.answer(title, folder, sizes.receive_repeats)
        return tables

    def _send(self, folder: Path, kind: str) -> list[Table]:
        tables = []
        for count in self._sizes.associations:
            title = f"Receiving {len(series.paths_of(folder))} {kind} over {count} association"
            title += "s at once" if count > 1 else ""
            repeats = self._sizes.receive_repeats
            tables.append(receive.answer(title, folder, repeats, associations=count))
        if kind.startswith("images"):
            few = self._series("CT", self._sizes.few_images, 64, 64)
            title = f"Receiving {self._sizes.few_images} {kind}, sender and receiver with their defaults"
            everyone = receive.with_defaults()
            repeats = self._sizes.receive_repeats
            tables.append(receive.answer(title, few, repeats, everyone, no_delay=False))
            title = f"Receiving {len(series.paths_of(folder))} {kind} from storescu"
            tables.append(receive.answer(title, folder, repeats, sender="storescu"))
        return [table for table in tables if table is not None]


def machine() -> str:
    """One line on where this was measured."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {gib:.0f} GiB, Python {platform.python_version()}, "
        f"{date.today()}"
    )


def load_average() -> str:
    """How busy the machine is with other things: figures above 1 are noisy."""
    return f"load average {os.getloadavg()[0]:.1f}"


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--only", action="append", metavar="NAME", help="one question")
    parser.add_argument("--markdown", action="store_true", help="tables for the documentation")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), Sizes(options.quick))
        unknown = set(options.only or ()) - set(bench.questions)
        if unknown:
            parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(bench.questions)}")
        print(f"{machine()}, {load_average()} at the start", flush=True)
        for name, ask in bench.questions.items():
            if options.only and name not in options.only:
                continue
            tables = ask()
            if not tables:
                print(f"\n{name}: not measured, what it needs is missing", flush=True)
            for table in tables:
                shown = table.markdown() if options.markdown else table.text()
                print(f"\n{shown}", flush=True)
        print(f"\n{load_average()} at the end")


if __name__ == "__main__":
    main(sys.argv[1:])
