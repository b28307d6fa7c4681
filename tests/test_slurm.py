"""The scripts for Slurm under a real Slurm: a job that meets its time limit queues itself again and loses nothing."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from optimum_otprune.commands.demo_texts import documentation_texts
from optimum_otprune.storage.state_folder import default_state_folder, has_state

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES, DEMO_MODEL = ROOT / "examples", ROOT / "optimum_otprune" / "commands" / "demo_model"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
# A node of the size that the scripts ask for, whatever this machine has; its GPUs are files.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
GresTypes=gpu
KillWait=60
MpiDefault=none
NodeName=localhost CPUs=64 Gres=gpu:4 RealMemory=500000
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE
"""


def until(is_there: Callable[[], object], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def running(folder: Path, *command: object) -> Iterator[None]:
    """A daemon in the foreground, ended by its own id."""
    with (folder / f"{command[0]}.out").open("w") as out:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


class Slurm:
    """A cluster of one node on this machine."""

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: object) -> str:
        return self.ask("sbatch", "--parsable", *map(str, arguments)).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def finish(self, number: str, log: Path) -> None:
        """Wait for the end of a job, without the minutes that a job waits before it is started again."""

        def is_done() -> bool:
            job = self.job(number)
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
            assert job["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), log.read_text()
            return job["JobState"] == "COMPLETED"

        until(is_done, f"job {number}", 900)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons start jobs as root only")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for index in range(4):
        (folder / f"gpu{index}").touch()
    text = CONFIGURATION.format(folder=folder, controller=free_port(), node=free_port())
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"NodeName=localhost Name=gpu File={folder}/gpu[0-3]\n")
    program = folder / "bin" / "otprune"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom optimum_otprune.commands.main import main\nmain()\n")
    program.chmod(0o755)
    own = {f"--{name}-file": folder / f"munge.{name}" for name in ("key", "pid", "log", "seed")}
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        arguments = [f"{option}={path}" for option, path in own.items()]
        munge = ("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *arguments)
        stack.enter_context(running(folder, *munge))
        until((folder / "munge.socket").exists, "munge")
        stack.enter_context(running(folder, "slurmctld", "-D"))
        stack.enter_context(running(folder, "slurmd", "-D", "-N", "localhost"))
        state = ["sinfo", "--noheader", "--format=%T"]
        until(lambda: subprocess.run(state, capture_output=True, text=True).stdout.strip() == "idle", "the node")
        yield Slurm()


@pytest.fixture
def asked(tmp_path):
    """What a job is asked for, by its script and output, with so many steps of training a layer."""
    seen, unseen = documentation_texts("train"), documentation_texts("validation")
    (tmp_path / "seen.txt").write_text("\n\n".join(seen)[:60_000], encoding="utf-8")
    (tmp_path / "unseen.txt").write_text("\n\n".join(unseen)[:20_000], encoding="utf-8")
    data = ["--calibration-data", tmp_path / "seen.txt", "--eval", "--eval-data", tmp_path / "unseen.txt"]
    size = ["--num-samples", "8", "--seqlen", "128", "--dtype", "float32"]

    def arguments(script: str, output: Path, steps: int) -> list[object]:
        name, *how = script.split()
        job = ["--gpus-per-node=2", f"--output={tmp_path}/%j.log", f"--chdir={tmp_path}", EXAMPLES / name, *how]
        return [*job, DEMO_MODEL, output, *size, *data, "--reconstruction-steps", steps]

    return arguments


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def meets_its_time_limit(slurm: Slurm, number: str) -> None:
    slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=1")  # minutes
    until(lambda: slurm.job(number)["Restarts"] == "1", "the end of the time", 120)
    slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=60")


def is_told_before(slurm: Slurm, number: str) -> None:
    """What Slurm does two minutes before the limit, now."""
    slurm.ask("scancel", "--batch", "--signal=TERM", number)
    until(lambda: slurm.job(number)["Restarts"] == "1", "the end of the run", 60)


@pytest.mark.parametrize(
    ("script", "steps", "end"),
    [("slurm.sh", 2500, meets_its_time_limit), ("slurm_multi_gpu.sh copies", 500, is_told_before)],
)
def test_a_job_whose_time_is_up_queues_itself_again_and_ends_with_the_same_bits(
    slurm, asked, tmp_path, script, steps, end
):
    outputs = [tmp_path / name / "half" for name in ("straight", "stopped")]
    straight, stopped = (asked(script, output, steps) for output in outputs)
    number = slurm.submit(*straight)
    slurm.finish(number, tmp_path / f"{number}.log")
    number = slurm.submit(*stopped)
    log, state = tmp_path / f"{number}.log", default_state_folder(outputs[1])
    until((state / "layer-00000.json").exists, "the first layer", 300)
    end(slurm, number)
    assert "otprune prune: error: " in log.read_text()
    assert has_state(state)
    assert not outputs[1].exists()
    slurm.finish(number, log)
    assert slurm.job(number)["Restarts"] == "1"
    assert saved(outputs[0]) == saved(outputs[1])
    assert not state.exists()


def test_a_model_that_is_spread_over_devices_is_planned_and_pruned(slurm, asked, tmp_path):
    number = slurm.submit(*asked("slurm_multi_gpu.sh split", tmp_path / "half", 0))
    log = tmp_path / f"{number}.log"
    slurm.finish(number, log)
    assert "Memory" in log.read_text()
    assert (tmp_path / "half" / "model.safetensors").is_file()


def test_a_job_that_fails_is_not_queued_again(slurm, tmp_path):
    number = slurm.submit(f"--output={tmp_path}/log", EXAMPLES / "slurm.sh", tmp_path / "nothing", tmp_path / "out")
    until(lambda: slurm.job(number)["JobState"] == "FAILED", "the failure", 120)
    job = slurm.job(number)
    assert (job["Restarts"], job["ExitCode"]) == ("0", "1:0")
    assert "error: " in (tmp_path / "log").read_text()
