"""`launcher drill` on a real run: it tells what the files say."""

import json
import sys
from datetime import datetime

from tests.harness import losses
from tests.slurm.rounds import Round

CALL = """import sys
from launcher.slurm.drill import main
sys.exit(main(sys.argv[1:]))"""


def moment(path):
    return datetime.fromisoformat(json.loads(path.read_text())["time"]).timestamp()


def test_a_run_goes_on_from_where_it_was_stopped(lab, tmp_path):
    one = Round(lab, tmp_path / "run", "scontrol requeue").start()
    one.until(lambda: (one.path / "attempts/1/stepped").exists(), "no step was completed", timeout=90)
    done = lab.run(sys.executable, "-c", CALL, one.path, "--wait", "60", "--json", cwd=tmp_path, timeout=90)
    assert done.returncode == 0, done.stderr + one.told()
    report = json.loads(done.stdout)
    first, second = one.path / "attempts" / "1", one.path / "attempts" / "2"
    exits = [json.loads((first / f"exit-0000{rank}.json").read_text()) for rank in (0, 1)]
    assert report["agreed_step"] == report["resumed_step"] == exits[0]["step"] == exits[1]["step"]
    assert report["checkpoint"]["step"] == report["agreed_step"]
    assert report["first_step"]["step"] == report["agreed_step"] + 1
    struck = datetime.fromisoformat(report["time"]).timestamp()
    for name, told in (("signal", report["seen"]), ("exit", report["left"])):
        written = {str(rank): moment(first / f"{name}-0000{rank}.json") - struck for rank in (0, 1)}
        assert all(abs(told[rank] - written[rank]) < 0.01 for rank in written)
    assert abs(report["lost"]["seconds"] - (moment(second / "stepped") - struck)) < 0.01
    assert report["lost"]["steps"] == 0
    assert report["requeued_by"] == "job.sh"
    assert report["verdict"]["word"] == "preempted"
    assert report["waited"]
    [start] = report["starts"]
    assert start["nodes"] == (one.path / "slurm" / f"started-{one.job}-1").read_text().split()[1]
    assert "ranks 0-1 have left: preempted" in done.stderr
    assert sorted(losses(one.path))[: report["agreed_step"]] == list(range(1, report["agreed_step"] + 1))
    lab.command("scancel", one.job)
