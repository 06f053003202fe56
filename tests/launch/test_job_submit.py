"""A job submitted to a Ray head of its own, with token authentication, as docs/cluster.md tells it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlpipe.paths import ROOT

RAY = Path(sys.executable).parent / "ray"
START_S = 120
JOB_S = 240


@dataclass(frozen=True)
class Head:
    url: str
    env: dict[str, str]
    log: Path

    def ray(self, *arguments: str, timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        """`ray VERB OBJECT --address ... arguments`"""
        command = [RAY, *arguments[:2], "--address", self.url, *arguments[2:]]
        return subprocess.run(command, env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
    gcs, dashboard, agent, runtime_env, metrics, client = free_ports(6)
    # Ray's sockets lie below the temporary folder and allow no long path.
    temporary = Path("/tmp") / f"ray_{secrets.token_hex(4)}"
    command = [
        RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
        "--object-store-memory=200000000", f"--temp-dir={temporary}", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
    ]  # fmt: skip
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    head = Head(f"http://127.0.0.1:{dashboard}", env, log)
    try:
        deadline = time.monotonic() + START_S
        while head.ray("job", "list").returncode != 0:
            assert process.poll() is None, f"the head ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"no head after {START_S} s: {log.read_text()[-2000:]}"
            time.sleep(1)
        yield head
    finally:
        end(process)
        shutil.rmtree(temporary, ignore_errors=True)


def end(process: subprocess.Popen) -> None:
    """End the head's process group; `ray stop` would end every Ray of the machine."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@pytest.mark.ray
def test_a_client_without_the_token_is_refused(head):
    refused = head.ray("job", "list", RAY_AUTH_MODE="disabled")
    assert refused.returncode != 0
    assert "token" in refused.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_job_trains_on_the_running_cluster(head, tmp_path, tiny_policy_path):
    (tmp_path / "prompts.txt").write_text("a photo of a red circle\na photo of two blue squares\n")
    run_dir = tmp_path / "run"
    done = head.ray(
        "job", "submit", "--working-dir", ".", "--", sys.executable, "launch/grpo.py",
        "--config", "configs/tiny_grpo.yaml", f"run.dir={run_dir}", f"policy.path={tiny_policy_path}",
        f"data.prompts={tmp_path / 'prompts.txt'}", f"evaluate.prompts={tmp_path / 'prompts.txt'}",
        "train.steps=2", "train.prompts_per_step=2", "train.group_size=2", "learner.micro_batch=4",
        "reward.0.scorer=brightness", "reward.0.path=null", "loss.kl_beta=0",
        timeout_s=JOB_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    assert "succeeded" in done.stdout
    steps = [json.loads(line)["train/step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and steps[0] < steps[1]
    # The roles were actors of this cluster: the job started none of its own.
    actors = json.loads(head.ray("list", "actors", "--format=json").stdout)
    assert {"RolloutWorker", "RewardActor"} <= {actor["class_name"].split(".")[-1] for actor in actors}
