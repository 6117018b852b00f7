"""The scripts in launch/: what they would run, and how they end, with stand-ins for every program of the outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
OUTSIDE = ("gcloud", "kubectl", "srun", "scontrol", "nvidia-smi", "git")
CONFIG = "configs/recall_tiny.yaml"
PARTS = ("numbers", "attention", "training", "turns", "throughput")


@pytest.fixture
def outside(tmp_path):
    """A PATH on which programs of the outside only write down that they were called."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    log.touch()
    for name in OUTSIDE:
        program(folder / name, f'echo "{name} $*" >>{log}')
    return f"{folder}:{os.environ['PATH']}", log


def program(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def shell(script, *arguments, path=None, code=0, timeout=120, **environment):
    """Runs a script; what it printed."""
    env = {**os.environ, **environment} | ({"PATH": path} if path else {})
    done = subprocess.run(
        ["bash", LAUNCH / script, *arguments], capture_output=True, text=True, env=env, timeout=timeout
    )
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script(script):
    """It parses, and shellcheck has nothing to say."""
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", "-s", "bash", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["supervise", "local", "slurm", "tpu_vm", "gke", "device_check"])
def test_usage(script):
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT)}
    wrong = ["numbas"] * (script == "device_check")  # which takes no argument for all of it
    done = subprocess.run(["bash", LAUNCH / f"{script}.sh", *wrong], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert f"launch/{script}.sh" in done.stderr and "--dry-run" in done.stderr and "SBATCH" not in done.stderr


@pytest.mark.parametrize("fails", [None, "first", "second"])
def test_ci_runs_all_tests_on_one_python_and_fails_with_either(tmp_path, fails):
    """All that is not slow on the first, and on the other one the fast suite."""
    for folder in ("bin", ".ci", "launch"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    program(tmp_path / "bin" / "python3.12", "exit 0")
    program(
        tmp_path / "launch" / "test.sh",
        'leg=$([ -z "${VENV:-}" ] && echo first || echo second); echo "$leg $*" >>calls; [ "$leg" != "${FAILS:-}" ]',
    )
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAILS": fails or ""}
    env.pop("VENV", None)
    done = subprocess.run(["bash", tmp_path / ".ci" / "run"], capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode == 0) == (fails is None), done.stderr
    legs = (tmp_path / "calls").read_text().splitlines()
    assert legs == ["first -m not slow", "second "][: 1 if fails == "first" else 2]


def test_supervise_dry_run():
    out = shell("supervise.sh", "--dry-run", CONFIG, "runs/a b", "--train.steps", "3", PYTHON="python")
    assert out == f"+ python -m jax_ccm.train {CONFIG} --workdir 'runs/a b' --train.steps 3\n"


def test_local_dry_run(outside):
    path, calls = outside
    run = f"bash launch/supervise.sh {CONFIG} runs/x --train.steps 3"
    arguments = ("--dry-run", CONFIG, "runs/x", "--train.steps", "3")
    assert shell("local.sh", *arguments, path=path, GPUS="0,1") == f"+ env CUDA_VISIBLE_DEVICES=0,1 {run}\n"
    two = shell("local.sh", *arguments, path=path, GPUS="0,1,2,3", PROCESSES="2", PORT="9000")
    same = "JAX_COORDINATOR_ADDRESS=127.0.0.1:9000 JAX_NUM_PROCESSES=2"
    assert two.splitlines() == [
        f"+ env CUDA_VISIBLE_DEVICES=0,1 {same} JAX_PROCESS_ID=0 {run}",
        f"+ env CUDA_VISIBLE_DEVICES=2,3 {same} JAX_PROCESS_ID=1 {run}",
    ]
    assert calls.read_text() == ""
    shell("local.sh", *arguments, path=path, code=2, GPUS="0,1,2", PROCESSES="2")


def test_slurm_dry_run(outside):
    path, calls = outside
    out = shell("slurm.sh", "--dry-run", CONFIG, "runs/x", "--mesh.fsdp", "8", path=path, GRACE="100")
    assert out.splitlines() == [
        "+ srun --kill-on-bad-exit=1 --wait=60 bash launch/supervise.sh "
        f"{CONFIG} runs/x --train.grace 100 --mesh.fsdp 8",
        "+ scontrol requeue JOB",
    ]
    assert calls.read_text() == ""


def test_slurm_asks_for_one_process_a_gpu_and_leaves_time_to_save():
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    (notice,) = re.findall(r"^TERM@(\d+)$", options["signal"])
    (grace,) = re.findall(r"grace=\$\{GRACE:-(\d+)\}", text)
    assert int(grace) < int(notice)
    # sbatch reads options only up to the first command.
    assert text.index("#SBATCH --signal") < text.index("\nset -e")


@pytest.mark.parametrize(("code", "ends", "called"), [(0, 0, 1), (75, 0, 2), (1, 1, 1), (2, 2, 1)])
def test_slurm_requeues_what_was_interrupted(outside, code, ends, called):
    path, calls = outside
    program(Path(path.split(":")[0]) / "srun", f'echo "srun $*" >>{calls}; exit {code}')
    shell("slurm.sh", CONFIG, "runs/x", path=path, code=ends, SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(ROOT))
    lines = calls.read_text().splitlines()
    assert len(lines) == called and (called == 1 or lines[1] == "scontrol requeue 17")


def test_tpu_vm_dry_run(outside):
    path, calls = outside
    where = {"path": path, "NAME": "t", "ZONE": "z", "SHARED": "10.0.0.2:/s"}
    ssh = "+ gcloud compute tpus tpu-vm ssh t"
    assert shell("tpu_vm.sh", "--dry-run", "create", **where) == (
        "+ gcloud compute tpus tpu-vm create t --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot "
        "--zone=z\n"
    )
    assert "--spot" not in shell("tpu_vm.sh", "--dry-run", "create", SPOT="0", **where)
    sync = shell("tpu_vm.sh", "--dry-run", "sync", **where).splitlines()
    assert sync[0].startswith("+ git archive") and sync[1].startswith("+ gcloud compute tpus tpu-vm scp /")
    assert all(line.startswith(f"{ssh} --worker=all ") and line.endswith(" --zone=z") for line in sync[2:])
    assert "jax[tpu]" in sync[3] and "mount -t nfs 10.0.0.2:/s /runs" in sync[4]
    (run,) = shell("tpu_vm.sh", "--dry-run", "run", CONFIG, "w", "--mesh.fsdp", "-1", **where).splitlines()
    assert run.startswith(f"{ssh} --worker=all ") and f"supervise.sh '\\''{CONFIG}'\\'' '\\''/runs/w'\\''" in run
    assert shell("tpu_vm.sh", "--dry-run", "logs", **where).startswith(f"{ssh} --worker=0 ")
    assert "kill -TERM" in shell("tpu_vm.sh", "--dry-run", "stop", **where)
    assert (
        shell("tpu_vm.sh", "--dry-run", "delete", **where) == "+ gcloud compute tpus tpu-vm delete t --quiet --zone=z\n"
    )
    assert calls.read_text() == ""
    shell("tpu_vm.sh", "--dry-run", "sync", code=2, **{**where, "SHARED": ""})


def test_without_dry_run_the_commands_are_run(outside):
    path, calls = outside
    shell("tpu_vm.sh", "create", path=path, NAME="t", ZONE="z")
    shell("gke.sh", "tpu", "apply", CONFIG, "w", path=path)
    lines = calls.read_text().splitlines()
    assert lines[0].startswith("gcloud compute tpus tpu-vm create t ") and lines[1] == "kubectl apply -f -"


# What a JobSet (jobset.x-k8s.io/v1alpha2) may hold, as far as the manifests go; "!" must be there.
POD = {
    "restartPolicy!": str, "terminationGracePeriodSeconds": int, "nodeSelector": {"*": str},
    "tolerations": [{"key": str, "operator": str, "effect": str}],
    "containers!": [{
        "name!": str, "image!": str, "args": [str],
        "env": [{"name!": str, "value": str, "valueFrom": {"fieldRef!": {"fieldPath!": str}}}],
        "resources": {"requests": {"*": int}, "limits": {"*": int}},
        "volumeMounts": [{"name!": str, "mountPath!": str}],
    }],
    "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str}, "emptyDir": {"medium": str}}],
}  # fmt: skip
JOB = {
    "parallelism!": int, "completions!": int, "completionMode": str, "backoffLimit": int,
    "template!": {"metadata": dict, "spec!": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion!": str, "kind!": str, "metadata!": {"name!": str, "annotations": {"*": str}},
    "spec!": {
        "failurePolicy": {"maxRestarts!": int},
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
    },
}  # fmt: skip


def check(value, schema, path="jobset"):
    """Holds a value against a schema: keys, those with "!" must be there, "*" is any; types."""
    if isinstance(schema, type):
        assert isinstance(value, schema) and not isinstance(value, bool), f"{path}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for number, item in enumerate(value):
            check(item, schema[0], f"{path}[{number}]")
    else:
        known = {key.rstrip("!"): kind for key, kind in schema.items()}
        for key, item in value.items():
            assert key in known or "*" in known, f"{path}.{key} is no field"
            check(item, known.get(key, known.get("*")), f"{path}.{key}")
        for key in schema:
            assert not key.endswith("!") or key[:-1] in value, f"{path}.{key} is missing"


def jobset(kind, *arguments, **environment):
    text = shell("gke.sh", "--dry-run", kind, "apply", CONFIG, "w", *arguments, **environment)
    first, *body, last = text.splitlines()
    assert (first, last) == ("+ kubectl apply -f - <<'EOF'", "EOF") and "${" not in text
    return yaml.safe_load("\n".join(body))


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset(outside, kind):
    path, calls = outside
    found = jobset(kind, "--mesh.fsdp", "-1", path=path, NAME="me", IMAGE="i", HOSTS="3", GRACE="40")
    check(found, JOBSET)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 3 and spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 40
    assert container["args"] == [CONFIG, "/runs/w", "--train.grace", "35", "--mesh.fsdp", "-1"]
    device = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[kind]
    assert list(container["resources"]["limits"]) == [device]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    if kind == "gpu":
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        # SET-JOB-INDEX-POD.SET is how JobSet names its pods in DNS.
        assert env["JAX_COORDINATOR_ADDRESS"] == f"me-{job['name']}-0-0.me:8476" and env["JAX_NUM_PROCESSES"] == "3"
        assert "JAX_PROCESS_ID" in env
    assert calls.read_text() == ""


def test_the_schema_catches_mistakes(outside):
    found = jobset("tpu", path=outside[0])
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    with pytest.raises(AssertionError, match="paralelism is no field"):
        check(found, JOBSET)


def test_gke_logs_and_delete(outside):
    out = shell("gke.sh", "--dry-run", "gpu", "logs", path=outside[0], NAME="me")
    assert out.startswith("+ kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=me,")
    assert shell("gke.sh", "--dry-run", "gpu", "delete", path=outside[0], NAME="me") == "+ kubectl delete jobset me\n"
    shell("gke.sh", "--dry-run", "abacus", "logs", code=2)


def test_dockerfile():
    text = (LAUNCH / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    (entry,) = re.findall(r'^ENTRYPOINT \["bash", "(.*)"\]$', text, re.MULTILINE)
    assert (ROOT / entry).exists()
    (pin,) = set(re.findall(r'jax(?:\[[^]]*\])?(>=[^"]*)"', text))
    assert f'"jax{pin}"' in (ROOT / "pyproject.toml").read_text()


TRAINING = """
workdir=$5
end() {
    mkdir -p "$workdir" && echo "{\\"status\\": \\"$1\\"}" >"$workdir/$$" && mv "$workdir/$$" "$workdir/summary.json"
    exit "$2"
}
trap 'end interrupted 0' TERM
"""


@pytest.mark.parametrize(
    ("does", "code"), [("end finished 0", 0), ("end interrupted 0", 75), ("end finished 1", 1), ("exit 2", 2)]
)
def test_supervise_tells_how_a_run_ended(tmp_path, does, code):
    python = program(tmp_path / "python", TRAINING + does)
    shell("supervise.sh", CONFIG, str(tmp_path / "run"), code=code, PYTHON=str(python))


def test_supervise_passes_sigterm_on_and_waits(tmp_path):
    slow = TRAINING.replace("exit", "sleep 0.3; exit") + f"touch {tmp_path}/ready; while :; do sleep 0.05; done"
    python = program(tmp_path / "python", slow)
    command = ["bash", LAUNCH / "supervise.sh", CONFIG, tmp_path / "run"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHON": str(python)}, stdout=subprocess.PIPE)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_local_stops_the_others_and_tries_again(tmp_path):
    """Process 1 fails the first time, while process 0 would run for ever; the second time both finish."""
    python = program(
        tmp_path / "python",
        TRAINING
        + f'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES" >>{tmp_path}/log\n'
        + f"if [ -e {tmp_path}/again ]; then end finished 0; fi\n"
        + "if [ $JAX_PROCESS_ID = 1 ]; then\n"
        + f"    until grep -q '0 of 2' {tmp_path}/log; do sleep 0.05; done\n"
        + f"    touch {tmp_path}/again; exit 1\n"
        + "fi\n"
        + "while :; do sleep 0.05; done",
    )
    shell("local.sh", CONFIG, str(tmp_path / "run"), PYTHON=str(python), PROCESSES="2", GPUS="0,1")
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == ["0 of 2", "0 of 2", "1 of 2", "1 of 2"]


def test_local_gives_up(tmp_path):
    python = program(tmp_path / "python", f"echo x >>{tmp_path}/log; exit 1")
    shell("local.sh", CONFIG, str(tmp_path / "run"), code=1, PYTHON=str(python), RETRIES="2", GPUS="0")
    assert (tmp_path / "log").read_text() == "x\nx\nx\n"
    python = program(tmp_path / "python", f"echo x >>{tmp_path}/mistake; exit 2")
    shell("local.sh", CONFIG, str(tmp_path / "run"), code=2, PYTHON=str(python), RETRIES="2", GPUS="0")
    assert (tmp_path / "mistake").read_text() == "x\n"


def test_device_check_dry_run(outside):
    path, calls = outside
    out = shell("device_check.sh", "--dry-run", path=path, PYTHON="python", OUT="some where", SIZE="tiny", TURNS="40")
    lines = out.splitlines()
    ours, limited = "python -m jax_ccm.devices.check", "+ timeout --foreground --kill-after=5"
    assert lines[0] == f"{limited} 65 {ours} numbers --out 'some where' --size tiny --limit 52"
    assert lines[3] == f"{limited} 40 {ours} turns --out 'some where' --size tiny --limit 32"
    assert lines[-1] == f"{limited} 20 {ours} report --out 'some where'"
    limits = [int(line.split()[4]) for line in shell("device_check.sh", "--dry-run", path=path).splitlines()]
    assert len(limits) == 6 and sum(limits) <= 8 * 60
    (first, *rest) = shell("gpu_check.sh", "--dry-run", "training", path=path, PYTHON="python", GPU="2").splitlines()
    assert first == ("+ env CUDA_VISIBLE_DEVICES=2 JAX_PLATFORMS=cuda,cpu bash launch/device_check.sh training")
    assert rest[0].endswith(f"{ours} training --size auto --limit 84") and len(rest) == 2
    assert calls.read_text() == ""
    shell("device_check.sh", "--dry-run", "numbas", path=path, code=2)


def test_gpu_check_needs_a_gpu(outside):
    path, _ = outside
    program(Path(path.split(":")[0]) / "nvidia-smi", "exit 9")
    done = subprocess.run(
        ["bash", LAUNCH / "gpu_check.sh"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no NVIDIA GPU 0" in done.stderr


def test_ctrl_c_ends_the_check(tmp_path):
    python = program(tmp_path / "python", f"echo $3 >>{tmp_path}/log; exit 130")
    shell("device_check.sh", PYTHON=str(python), code=130)
    assert (tmp_path / "log").read_text() == "numbers\n"


def test_a_part_that_fails_ends_no_other(tmp_path):
    """Each is called with its environment, what failed or was stopped is told at the end, and the code is 1."""
    python = program(
        tmp_path / "python",
        f'echo "$3 $XLA_PYTHON_CLIENT_MEM_FRACTION" >>{tmp_path}/log\n'
        + "case $3 in attention) exit 1 ;; turns) exec sleep 60 ;; esac",
    )
    env = {**os.environ, "PYTHON": str(python), "TURNS": "1"}
    done = subprocess.run(["bash", LAUNCH / "device_check.sh"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "device check: not finished: attention (exit 1), turns (stopped after 1 s); what they found is in their files"
    )
    called = (tmp_path / "log").read_text().splitlines()
    assert called == [f"{part} 0.9" for part in (*PARTS, "report")]
    python = program(tmp_path / "python", "exit 0")
    assert shell("device_check.sh", "numbers", "turns", PYTHON=str(python)).splitlines()[-1] == (
        "device check: all of numbers turns finished"
    )


@pytest.mark.parametrize("parts", [("training",), pytest.param(PARTS, marks=pytest.mark.slow)], ids=["one", "all"])
def test_device_check_runs_on_a_cpu(tmp_path, parts):
    """As it is run on a machine with an accelerator, with tiny sizes; and the tables of what was found."""
    env = {"PYTHON": sys.executable, "OUT": str(tmp_path), "JAX_PLATFORMS": "cpu", "COMMIT": "abc"}
    out = shell("device_check.sh", *parts, **env, JAX_DISABLE_MOST_OPTIMIZATIONS="1", timeout=480)
    assert out.splitlines()[-1] == f"device check: all of {' '.join(parts)} finished"
    assert {path.stem for path in tmp_path.glob("*.json")} == set(parts)
    found = json.loads((tmp_path / "training.json").read_text())
    assert (found["commit"], found["settings"]["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("abc", "0.9")
    assert f"{found['rows'][0]['tokens_per_second']:,.0f}" in (tmp_path / "report.md").read_text()
