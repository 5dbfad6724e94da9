"""main.py on two hosts that share nothing but a link, started in the ways of docs/cluster.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks._link import Host
from tests.support.hosts import DISK, hosts_with_disks, lacks_ssh, launch, seen, serve_ssh, write
from tests.support.patience import PATIENCE
from tests.support.program import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long]

DEEPSPEED = [str(ROOT / ".venv/bin/deepspeed"), "--hostfile", str(DISK / "hostfile")]
SHORT = ["main.py", "--epochs", "1", "--steps-per-epoch", "6", "--total-batch-size", "32"]
INTERFACE = {"GLOO_SOCKET_IFNAME": "eth0"}


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    try:
        with hosts_with_disks() as hosts:
            yield hosts
    except SystemExit as reason:
        pytest.skip(f"no network namespaces here: {reason}")


def test_a_launcher_started_on_each_host_needs_no_ssh(hosts, tmp_path: Path) -> None:
    for host in hosts:
        write(host, DISK / "host.yml", own_folders(host))
    commands = {
        host: [*DEEPSPEED, "--no_ssh", "--node_rank", str(number), "--master_addr",
               hosts[0].address, *SHORT, "--config-pth", str(DISK / "host.yml")]
        for number, host in enumerate(hosts)
    }  # fmt: skip
    ended = launch(commands, INTERFACE, tmp_path)
    assert [status for status, _ in ended.values()] == [0, 0], ended
    assert check_that_they_trained_together(hosts) == 6


def test_the_slurm_job_starts_torchrun_on_each_host(hosts, tmp_path: Path) -> None:
    """Slurm is not here: the job runs on both hosts, and its srun starts the part of each."""
    for host in hosts:
        write(host, ROOT / f".config_{host.name}.yml", own_folders(host))
        write(host, DISK / "bin/scontrol", "#!/bin/sh\nprintf 'hosta\\nhostb\\n'\n", 0o755)
        write(host, DISK / "bin/srun", '#!/bin/sh\nshift\nexec "$@"\n', 0o755)
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "host[a-b]", "SLURM_NNODES": "2"}
    commands = {
        host: ["env", f"SLURM_NODEID={number}", f"PATH={DISK}/bin:{os.environ['PATH']}",
               "bash", "run-scripts/slurm.sbatch", *SHORT[1:]]
        for number, host in enumerate(hosts)
    }  # fmt: skip
    ended = launch(commands, INTERFACE | job, tmp_path)
    assert [status for status, _ in ended.values()] == [0, 0], ended
    assert check_that_they_trained_together(hosts) == 6


@pytest.mark.skipif(bool(lacks_ssh()), reason=f"apt-get install {' '.join(lacks_ssh())}")
@pytest.mark.parametrize("event", ["a rank is killed", "the launcher is told to stop"])
def test_pdsh_and_ssh_start_it_on_all_hosts_and_end_it_there(
    hosts, tmp_path: Path, event: str
) -> None:
    serve_ssh(hosts)
    for host in hosts:
        write(host, ROOT / f".config_{host.name}.yml", own_folders(host))
    write(hosts[0], ROOT / ".deepspeed_env", "".join(f"{k}={v}\n" for k, v in INTERFACE.items()))
    endless = ["--epochs", "1000", "--save-steps", "5", "--dead-after", "4"]
    endless += ["--period", "constant", "--h-base", "1"]  # so that replicas are equal when saved
    log = tmp_path / "log"
    with log.open("w") as file:
        runner = hosts[0].start(
            [*DEEPSPEED, *SHORT, *endless], ROOT, env=os.environ | {"HOME": str(DISK)},
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    runs = [seen(host, DISK / host.name / "runs") for host in hosts]
    deadline = time.monotonic() + PATIENCE
    while not all(list(folder.glob("*/checkpoints/step-*")) for folder in runs):
        assert runner.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    ranks = {process.environ()["RANK"]: process for process in programs(hosts)}
    assert set(ranks) == {"0", "1"}
    if event == "a rank is killed":
        ranks["1"].kill()
    else:
        psutil.Process(runner.pid).children()[0].terminate()  # of nsenter's: the launcher itself
    status = runner.wait(PATIENCE)
    assert not psutil.wait_procs(ranks.values(), timeout=PATIENCE)[1], "a rank is left"
    check_that_they_trained_together(hosts)
    if event == "a rank is killed":
        assert status != 0
        named = r"rank 1 on hostb has died .*last at step \d+.*--resume auto"
        assert re.search(named, log.read_text())
    else:
        markers = [len(list(folder.glob("*/preempted"))) for folder in runs]
        assert markers == [1, 0], log.read_text()


def programs(hosts: list[Host]) -> list[psutil.Process]:
    """The processes that train on these hosts; others of this machine are another test's."""
    networks = {network(host.keeper) for host in hosts}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if network(process.pid) not in networks:
                continue
            command = process.cmdline()
            if "main.py" in command and "RANK" in process.environ() and "--dead-after" in command:
                found += [process] if "launch" not in " ".join(command[:4]) else []
    return found


def network(pid: int) -> str:
    """The name of the network namespace that a process is in."""
    return os.readlink(f"/proc/{pid}/ns/net")


@pytest.mark.skipif("openssh-client" in lacks_ssh(), reason="apt-get install openssh-client")
def test_a_first_host_that_ssh_cannot_reach_is_named_at_once(hosts, tmp_path: Path) -> None:
    """The launcher looks at no other host: docs/cluster.md says what happens then."""
    ended = launch({hosts[0]: [*DEEPSPEED, *SHORT]}, {}, tmp_path)
    status, told = ended["hosta"]
    assert status == 1
    assert "host=hosta was not reachable via ssh" in told


def own_folders(host: Host) -> str:
    """The host's file: folders that the other host does not have."""
    return f"data_pth: {DISK}/{host.name}/data\nlog_pth: {DISK}/{host.name}/runs\n"


def check_that_they_trained_together(hosts: list[Host]) -> int:
    """Each host has its rank's whole checkpoint, and no other; the models are equal; their step."""
    runs = [seen(host, DISK / host.name / "runs") for host in hosts]
    saved = [{path.name for path in folder.glob("*/checkpoints/step-*")} for folder in runs]
    newest, models = max(set.intersection(*saved)), []
    for rank, host in enumerate(hosts):
        assert seen(host, DISK / host.name / "data/digits/train.beton").exists()
        (checkpoint,) = runs[rank].glob(f"*/checkpoints/{newest}")
        name = f"rank-{rank:04d}.pt"
        assert {file.name for file in checkpoint.iterdir()} == {"manifest.json", name}
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert sorted(manifest["files"]) == ["rank-0000.pt", "rank-0001.pt"]
        models.append(torch.load(checkpoint / name, weights_only=True)["model"])
    first, second = models
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    return int(newest.removeprefix("step-"))
