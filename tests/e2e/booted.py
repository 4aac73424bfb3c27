"""A machine that systemd has started, with our unit on it: in namespaces of its own. For tests.

It sees the files of this machine through an overlay, so that nothing it writes reaches them, and has
a network of its own with nothing but its loopback. Needs root, and Linux with overlayfs and cgroup v2.
"""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import dicomnode

UNIT = Path(__file__).parents[2] / "deploy" / "dicomnode@.service"
SERVICE = "dicomnode@plus_one.service"
#: As docs/operations.md has it, but for the virtual environment: the one of the tests is shown below
#: /opt, since the unit may neither look into /root nor see the real /tmp.
_BOOT = r"""
set -e
mount -t tmpfs tmpfs "$PLACE"
cd "$PLACE"
mkdir upper work root
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
cd root
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
for place in run tmp dev; do mount -t tmpfs tmpfs $place; done
for device in null zero full random urandom tty; do
  touch dev/$device
  mount --bind /dev/$device dev/$device
done
mkdir dev/pts dev/shm
mount -t tmpfs tmpfs dev/shm
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
cat > dev/console < /dev/null

# Nothing of this machine is started there.
rm -rf etc/systemd/system etc/machine-id lib/systemd/system/*.target.wants
mkdir -p etc/systemd/system/sockets.target.wants
ln -s /lib/systemd/system/systemd-journald.socket etc/systemd/system/sockets.target.wants/
touch etc/machine-id

for name in python packages source; do mkdir -p opt/dicomnode/$name; done
mount --bind "$PYTHON" opt/dicomnode/python
mount --bind "$PACKAGES" opt/dicomnode/packages
mount --bind "$SOURCE" opt/dicomnode/source
mkdir -p opt/dicomnode/bin
cat > opt/dicomnode/bin/dicomnode <<'END'
#!/bin/sh
export LD_LIBRARY_PATH=/opt/dicomnode/python/lib
export PYTHONPATH=/opt/dicomnode/source:/opt/dicomnode/packages PYTHONDONTWRITEBYTECODE=1
exec /opt/dicomnode/python/bin/python3 -c 'from dicomnode.cli.main import main; main()' "$@"
END
chmod 755 opt/dicomnode/bin/dicomnode
chroot . useradd --system dicomnode
install -D -m 644 "$PIPELINE" etc/dicomnode/plus_one.py
install -m 644 "$UNIT" etc/systemd/system/
mkdir etc/systemd/system/dicomnode@.service.d
printf "$CHANGES" > etc/systemd/system/dicomnode@.service.d/test.conf

mkdir -p mnt
pivot_root . mnt
umount -l /mnt
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system \
  --unit=basic.target --log-target=journal --show-status=0
"""


class Booted:
    """A machine with `/etc/dicomnode/plus_one.py`.

    `changes` are lines for the unit, as `systemctl edit` adds them.
    """

    def __init__(self, folder: Path, pipeline: str, changes: str = "") -> None:
        self._place = folder / "machine"
        self._place.mkdir()
        file = folder / "plus_one.py"
        file.write_text(pipeline)
        self._said = folder / "machine.log"
        self._cgroup = _cgroups() / f"dicomnode-test-{os.getpid()}"
        self._environment = {
            **os.environ,
            "PLACE": str(self._place),
            "PYTHON": sys.base_prefix,
            "PACKAGES": sysconfig.get_paths()["purelib"],
            "SOURCE": str(Path(dicomnode.__file__).parents[1]),
            "PIPELINE": str(file),
            "UNIT": str(UNIT),
            "CHANGES": changes,
        }

    def open(self) -> None:
        """Start it; returns when all is started. Raises OSError where that cannot be had here."""
        self._cgroup.mkdir()
        # The cgroup namespace begins where the process is when it is made.
        join = f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"'
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", join, "sh", "setpriv", "--pdeathsig", "KILL",
             "unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private",
             "--uts", "--ipc", "--cgroup", "--net", "/bin/sh", "-c", _BOOT],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._said.open("w"),
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all that runs there."""
        # With the first process of a PID namespace all others of it end.
        with suppress(ProcessLookupError, FileNotFoundError, IndexError):
            os.kill(self._first(), signal.SIGKILL)
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            for folder, _, _ in os.walk(self._cgroup, topdown=False):
                Path(folder).rmdir()

    def _first(self) -> int:
        """The process of this machine that is number 1 there."""
        number = self._process.pid
        return int(Path(f"/proc/{number}/task/{number}/children").read_text().split()[0])

    def _wait_until_up(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(FileNotFoundError, IndexError):
                name = Path(f"/proc/{self._first()}/comm").read_text().strip()
                if name == "systemd" and self.run("systemctl", "is-system-running") == "running\n":
                    return
            time.sleep(0.1)
        raise OSError(f"systemd does not start: {self._said.read_text()[-2000:]}")

    def run(self, *command: str, network_only: bool = False) -> str:
        """What a command says that is run there, or here with the network there."""
        return subprocess.run(
            [*self.prefix(network_only), *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        ).stdout

    def prefix(self, network_only: bool = False) -> Sequence[str]:
        """What runs a command there."""
        where = ["--net"] if network_only else ["--all"]
        return ["nsenter", "--target", str(self._first()), *where, "--"]

    def show(self, name: str) -> str:
        """A property of the service."""
        return self.run("systemctl", "show", "--value", "--property", name, SERVICE).strip()

    def said(self, pattern: str) -> int:
        """How often the service said something."""
        return len(re.findall(pattern, self.journal()))

    def until(self, pattern: str, times: int = 1, seconds: float = 60.0) -> None:
        """Wait until the service has said something so often."""
        end = time.monotonic() + seconds
        while self.said(pattern) < times:
            assert time.monotonic() < end, f"not said: {pattern}, but: {self.journal()[-3000:]}"
            time.sleep(0.1)

    def journal(self) -> str:
        """What the service said."""
        return self.run("journalctl", "--no-pager", "--unit", SERVICE)


def _cgroups() -> Path:
    """Our own folder in the hierarchy of cgroup v2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            own = Path("/proc/self/cgroup").read_text().split("0::/", 1)[1].split("\n", 1)[0]
            return Path(place, own)
    raise OSError("there are no cgroups v2")
