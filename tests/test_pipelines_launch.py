"""Launch recipes: read and dry-run by Accelerate's own code, and the SLURM script by stand-ins."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from pairs_corpus import tiny_pretrain
from torch.distributed import run as torchrun

from pipelines import run_folder
from pipelines.cli import parse
from pipelines.schemas import PretrainConfig

FOLDER = Path(str(resources.files("pipelines") / "launch"))
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SLURM = FOLDER / "slurm.sh"


# --- Accelerate ---


def commands(name: str) -> tuple[dict[str, str], list[str]]:
    """The command that stands in the head of a recipe: variables, and arguments of the launcher."""
    head = [
        line[1:].strip() for line in (FOLDER / name).read_text().splitlines() if line[:1] == "#"
    ]
    text = "\n".join(head).replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if "accelerate launch" in line]
    before, _, after = line.partition("accelerate launch")
    variables = dict(one.split("=", 1) for one in shlex.split(before))
    return variables, shlex.split(after.replace("HOST", "10.0.0.1"))


def dry_run(name: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[Any, dict[str, str]]:
    """What Accelerate would start, and the variables that it would be told."""
    found: list[tuple[Any, dict[str, str]]] = []
    _, arguments = commands(name)
    monkeypatch.chdir(FOLDER)
    for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(torchrun, "run", lambda args: found.append((args, dict(os.environ))))

    class Process:
        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            found.append((command, env))

        def wait(self) -> None:
            pass

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    at = arguments.index("-m")
    given = [*arguments[:at], *more, *arguments[at:]]
    launch.launch_command(launch.launch_command_parser().parse_args(given))
    ((started, environment),) = found
    return started, environment


def test_there_is_a_recipe_for_every_size():
    names = {"cpu-2", "gpu-1", "gpu-8", "gpu-8-sharded", "nodes-2x8"}
    assert {Path(name).stem for name in RECIPES} == names


@pytest.mark.parametrize("name", RECIPES)
def test_accelerate_reads_every_recipe(name):
    config = load_config_from_file(str(FOLDER / name))
    assert config.mixed_precision == "no", "the precision is the run's to set"
    assert isinstance(config, ClusterConfig)
    assert config.fsdp_config == {}, "sharding is the run's to do"


def test_every_recipe_is_in_the_package():
    told = tomllib.loads((FOLDER.parent.parent / "pyproject.toml").read_text())
    assert "launch/*" in told["tool"]["setuptools"]["package-data"]["pipelines"]


@pytest.mark.parametrize(
    ("name", "nodes", "each"),
    [
        ("cpu-2.yaml", 1, 2),
        ("gpu-8.yaml", 1, 8),
        ("gpu-8-sharded.yaml", 1, 8),
        ("nodes-2x8.yaml", 2, 8),
    ],
)
def test_a_recipe_starts_as_many_processes_as_it_says(name, nodes, each, monkeypatch):
    started, _ = dry_run(name, monkeypatch)
    config, command, arguments = torchrun.config_from_args(started)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (nodes, nodes, each)
    assert command == sys.executable
    assert arguments[:3] == ["-u", "-m", "pipelines.pretrain"]
    parsed = parse("pretrain", ["data", "out", *arguments[4:]])
    assert isinstance(parsed, PretrainConfig)
    assert parsed.shard_weights == (name == "gpu-8-sharded.yaml")


def test_machines_meet_at_the_first_one(monkeypatch):
    for rank in (0, 1):
        started, _ = dry_run("nodes-2x8.yaml", monkeypatch, f"--machine_rank={rank}")
        config, _, _ = torchrun.config_from_args(started)
        assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "10.0.0.1:29500")
        assert config.rdzv_configs["rank"] == rank


def test_more_machines_are_told_on_the_command_line(monkeypatch):
    more, _ = dry_run("nodes-2x8.yaml", monkeypatch, "--num_machines=4", "--num_processes=32")
    assert (more.nnodes, more.nproc_per_node) == ("4", "8")


def test_one_gpu_needs_no_launcher(monkeypatch):
    command, environment = dry_run("gpu-1.yaml", monkeypatch)
    assert command[1:] == ["-m", "pipelines.pretrain", "CONFIG.yaml"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_processes_on_cores_see_no_gpu(monkeypatch):
    _, environment = dry_run("cpu-2.yaml", monkeypatch)
    assert environment["CUDA_VISIBLE_DEVICES"] == "-1,-1"


@pytest.mark.parametrize("name", [name for name in RECIPES if re.search("gpu-8|nodes", name)])
def test_processes_may_save_before_the_launcher_kills_them(name, monkeypatch):
    variables, _ = commands(name)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    started, _ = dry_run(name, monkeypatch)
    config, _, _ = torchrun.config_from_args(started)
    assert config.shutdown_timeout == 600


def tiny(data: Path, out: Path, **changes: Any) -> Path:
    """A configuration file of a tiny run."""
    values = tiny_pretrain(data, out, **changes) | {"data": str(data), "out": str(out)}
    path = out.parent / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_two_processes_are_launched_and_train_together(data, tmp_path):
    given = tiny(data, tmp_path / "run", samples=48)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(FOLDER / "cpu-2.yaml"), "-m", "pipelines.pretrain", str(given)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run/environment.json").read_text())
    assert facts["processes"] == 2
    assert facts["device"].startswith("cpu")
    lines = run_folder.read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["samples"] for line in lines if "loss" in line] == [16, 32, 48]
    assert (tmp_path / "run/bundle/config.json").exists()


# --- SLURM ---

STAND_INS = {
    "srun": """#!/bin/bash
echo "srun $*" >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" >"$CALLS.tasks"
worst=0
for task in "${tasks[@]}"; do wait "$task" || worst=$?; done
exit $worst
""",
    "scancel": """#!/bin/bash
echo "scancel $*" >>"$CALLS"
kill -TERM $(cat "$CALLS.tasks")
""",
    "scontrol": """#!/bin/bash
if [ "$1" = show ]; then printf '127.0.0.1\\nnode-2\\n'; else echo "scontrol $*" >>"$CALLS"; fi
""",
    "squeue": """#!/bin/bash
echo "${STATE:-RUNNING}"
""",
    # The script asks it where the run lies; a training is played.
    "python": f"""#!/bin/bash
if [ "$1" != -m ] || [ -z "${{PLAYED:-}}" ]; then exec {shlex.quote(sys.executable)} "$@"; fi
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $OMP_NUM_THREADS $*" >>"$CALLS"
mkdir -p "$OUT/checkpoints"
case $PLAYED in
    finishes)
        sleep 0.1
        mkdir -p "$OUT/bundle"
        echo >"$OUT/bundle/config.json"
        exit 0
        ;;
    fails) exit 2 ;;
    is-told) exit 0 ;;
    breaks) trap 'exit 1' TERM ;;
    stops) trap 'sleep 0.3; exit 0' TERM ;;
esac
touch "$CALLS.ready"
while :; do sleep 0.05; done
""",
}


class Cluster:
    """Stand-ins of SLURM's commands, and the script run by them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script: subprocess.Popen | None = None
        self.calls_file = folder / "calls"
        commands_folder = folder / "bin"
        commands_folder.mkdir()
        for name, text in STAND_INS.items():
            path = commands_folder / name
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (folder / "config.yaml").write_text(
            f"data: {folder}\nout: {folder / 'a run'}\nbatch_size: 64\n"
        )
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
            "PATH": f"{commands_folder}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "OUT": str(folder / "a run"),
            # Two numbers of processes that run at the same time have two ports.
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_NNODES": "1",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        self.script = subprocess.Popen(
            ["bash", str(SLURM), *arguments],
            start_new_session=True,
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.script

    def finish(self, script: subprocess.Popen) -> tuple[int, str]:
        out, err = script.communicate(timeout=240)
        return script.returncode, out + err

    def run(self, played: str, *arguments: str, **environment: str) -> tuple[int, str]:
        given = arguments or ("config.yaml",)
        return self.finish(self.start(*given, PLAYED=played, **environment))

    def asked(self, played: str, *signals: int, **environment: str) -> tuple[int, str]:
        """Run it and send it signals while the tasks are at work."""
        script = self.start("config.yaml", PLAYED=played, **environment)
        wait_for(self.calls_file.with_name("calls.ready"))
        for number in signals:
            script.send_signal(number)
            time.sleep(0.1)
        return self.finish(script)

    def calls(self, name: str) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if line.startswith(name)]

    @property
    def requeued(self) -> bool:
        return self.calls("scontrol") == [f"scontrol requeue {os.getpid()}"]


def wait_for(path: Path, *, lines: int = 0) -> None:
    until = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    if made.script is not None and made.script.poll() is None:  # a test that failed
        os.killpg(made.script.pid, signal.SIGKILL)
        made.script.communicate()


def test_the_script_is_one():
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0
    options = re.findall(r"(?m)^#SBATCH (\S+)", SLURM.read_text())
    assert "--requeue" in options
    assert "--signal=B:USR1@300" in options
    assert "--open-mode=append" in options


def test_a_run_that_reaches_its_end_is_left_there(cluster):
    code, said = cluster.run("finishes", "config.yaml", "optimizer.learning_rate=0.1")
    assert code == 0
    assert "reached its end" in said
    assert not cluster.requeued


def test_every_task_knows_its_place(cluster):
    cluster.run("finishes", "config.yaml", "model.text.name=hf:a b")
    arguments = "-m pipelines.pretrain config.yaml model.text.name=hf:a b --resume"
    assert sorted(cluster.calls("0/") + cluster.calls("1/")) == [
        f"{rank}/2 {rank}/2 127.0.0.1 1 {arguments}" for rank in (0, 1)
    ]


def test_asked_to_stop_the_tasks_save_and_the_job_is_put_back(cluster):
    code, said = cluster.asked("stops", signal.SIGUSR1)
    assert code == 0, said
    assert cluster.calls("scancel") == [f"scancel --signal=TERM {os.getpid()}"]
    assert cluster.requeued


def test_tasks_that_save_are_not_asked_again(cluster):
    code, _ = cluster.asked("stops", signal.SIGUSR1, signal.SIGUSR1)
    assert code == 0
    assert len(cluster.calls("scancel")) == 1
    assert cluster.requeued


def test_tasks_that_slurm_told_itself_are_put_back_too(cluster):
    code, _ = cluster.run("is-told")
    assert code == 0
    assert not cluster.calls("scancel")
    assert cluster.requeued


def test_a_cancelled_job_is_not_put_back(cluster):
    code, said = cluster.run("is-told", STATE="COMPLETING")
    assert code == 0
    assert "COMPLETING" in said
    assert not cluster.requeued


def test_tasks_that_break_while_they_stop_are_put_back(cluster):
    code, _ = cluster.asked("breaks", signal.SIGUSR1)
    assert code == 0
    assert cluster.requeued


def test_a_run_that_fails_is_not_tried_again(cluster):
    code, said = cluster.run("fails")
    assert code == 2
    assert "failed with status 2" in said
    assert not cluster.requeued


def test_a_bundle_that_was_there_before_is_no_end(cluster):
    bundle = cluster.folder / "a run" / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text("{}")
    os.utime(bundle / "config.json", (1, 1))
    cluster.run("is-told")
    assert cluster.requeued


def test_a_job_comes_back_only_so_often(cluster):
    code, said = cluster.run("is-told", SLURM_RESTART_COUNT="3", ALIGN_MOST_RESTARTS="3")
    assert code == 1
    assert "ALIGN_MOST_RESTARTS" in said
    assert not cluster.requeued


def test_a_mistake_is_told_before_anything_starts(cluster):
    code, said = cluster.run("finishes", "config.yaml", "batch_sise=3")
    assert code == 2
    assert "batch_sise" in said
    assert "Traceback" not in said
    assert not cluster.calls("srun")
    code, said = cluster.finish(cluster.start())
    assert code == 2
    assert "usage" in said


@pytest.mark.slow
def test_a_real_run_stops_comes_back_and_ends(data, cluster):
    out = cluster.folder / "real"
    given = str(tiny(data, out, samples=16 * 60, save_every="1000 steps"))
    script = cluster.start(given)
    wait_for(out / "metrics.jsonl", lines=4)
    script.send_signal(signal.SIGUSR1)
    code, said = cluster.finish(script)
    assert code == 0, said
    assert cluster.requeued, said
    assert not (out / "bundle").exists()
    code, said = cluster.finish(cluster.start(given, SLURM_RESTART_COUNT="1"))
    assert code == 0, said
    assert "reached its end" in said
    assert "samples done before" in said
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    assert len(cluster.calls("scontrol")) == 1
