"""Fuzz every target, one after the other, and stop at the first finding: `make fuzz`.

The Rust targets run with libFuzzer on the stable toolchain, with coverage of Rust and of the C and
C++ codecs, and AddressSanitizer in the latter. The Python one runs with atheris, which sees what of
dicomnode's and pydicom's Python code an input reaches. `port` attacks a node that listens.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.fuzz import corpus

_TOP = Path(__file__).parents[2]
_BUILD = _TOP / "target" / "fuzz"
_TRIPLE = "x86_64-unknown-linux-gnu"
_RUST = ("scan", "groups", "fragments", "rle", "codestream", "decode", "receive")
_PYTHON = "python"
_PORT = "port"
_SANCOV = (
    "level=4",
    "inline-8bit-counters",
    "pc-table",
    "trace-compares",
)
# Only the codecs are instrumented: not libFuzzer, and not what cmake tries out. Their own programs,
# which nobody runs, lack what the fuzzer brings.
_COMPILER = """#!/bin/sh
case "$PWD $*" in
  *CMakeScratch*|*CMakeTmp*|*CompilerId*) ;;
  *openjpeg-sys*|*turbojpeg-sys*|*charls-sys*)
    set -- "$@" -fsanitize=address -fsanitize-coverage=trace-pc,trace-cmp
    case " $* " in *" -c "*) ;; *) set -- "$@" -Wl,--unresolved-symbols=ignore-all ;; esac ;;
esac
exec /usr/bin/{name} "$@"
"""


def build() -> Path:
    """Build the fuzzer of the Rust targets; its path."""
    (_BUILD / "bin").mkdir(parents=True, exist_ok=True)
    compilers = {"CC": "gcc", "CXX": "g++"}
    for variable, name in compilers.items():
        wrapper = _BUILD / "bin" / name
        wrapper.write_text(_COMPILER.replace("{name}", name))
        wrapper.chmod(0o755)
        compilers[variable] = str(wrapper)
    flags = ["-Cpasses=sancov-module", "-Ccodegen-units=4"]
    flags += [f"-Cllvm-args=-sanitizer-coverage-{flag}" for flag in _SANCOV]
    command = ["cargo", "build", "--release", "--quiet", "--locked", "--target", _TRIPLE]
    command += ["--manifest-path", "rust/fuzz/Cargo.toml", "--target-dir", str(_BUILD)]
    environment = {**os.environ, **compilers, "RUSTFLAGS": " ".join(flags)}
    subprocess.run(command, cwd=_TOP, env=environment, check=True)
    return _BUILD / _TRIPLE / "release" / "fuzz"


def fuzz(target: str, binary: Path | None, seconds: int) -> None:
    """One target; its seeds and what it found to be new stay in target/fuzz/corpus."""
    seeds, grown = _BUILD / "seeds" / target, _BUILD / "corpus" / target
    findings = _BUILD / "findings"
    for folder in (grown, findings):
        folder.mkdir(parents=True, exist_ok=True)
    count = corpus.write(target, seeds)
    start = [str(binary)] if binary else [sys.executable, "-m", "tests.fuzz.decode"]
    print(f"== {target}: {count} seeds, {seconds} s", flush=True)
    outcome = subprocess.run(
        [
            *start,
            f"-max_total_time={seconds}",
            f"-artifact_prefix={findings}/{target}-",
            "-timeout=20",
            "-rss_limit_mb=3000",
            "-malloc_limit_mb=1500",
            "-max_len=65536",
            "-print_final_stats=1",
            # Atheris does not see what makes most seeds differ.
            f"-keep_seed={int(binary is None)}",
            str(grown),
            str(seeds),
        ],
        cwd=_TOP,
        env={**os.environ, "FUZZ_TARGET": target, "ASAN_OPTIONS": "detect_leaks=1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    log = _BUILD / f"{target}.log"
    log.write_text(outcome.stderr)
    if outcome.returncode != 0:
        found = re.findall(r"Test unit written to (\S+)", outcome.stderr)
        print("\n".join(outcome.stderr.splitlines()[-60:]))
        raise SystemExit(f"a finding in {target}: {', '.join(found) or log}; the log is {log}")
    told = [line for line in outcome.stderr.splitlines() if "cov:" in line or "stat::" in line]
    print("\n".join(told[-7:]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--target", choices=(*_RUST, _PYTHON, _PORT), action="append")
    options = parser.parse_args()
    chosen = options.target or [*_RUST, _PYTHON, _PORT]
    binary = build() if set(chosen) & set(_RUST) else None
    for target in chosen:
        if target == _PORT:
            command = [sys.executable, "-m", "tests.fuzz.port", "--seconds", str(options.seconds)]
            subprocess.run(command, cwd=_TOP, check=True)
            continue
        fuzz(target, None if target == _PYTHON else binary, options.seconds)
