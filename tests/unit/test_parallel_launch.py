"""Worker processes that are started and watched, played by scripts that import no PyTorch."""
import sys
import time

import pytest
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.parallel import launch as launching
from forcing_pack.forcing_core.parallel.launch import launch, member
from forcing_pack.forcing_core.parallel.request import Request

REQUEST = Request(out="out")
SOON = 30.0  # seconds that nothing here needs


@pytest.fixture
def played(monkeypatch):
    """played(script): every worker runs it, with `rank`, and `watched` around it; gives the list of those started."""
    start, workers = launching._start, []

    def play(script):
        head = ("import os, sys, time\nfrom forcing_core.errors import ForcingError\n"
                "from forcing_core.parallel.launch import watched\nrank = int(os.environ['RANK'])\nwith watched():\n")
        text = head + "".join(f"    {line}\n" for line in script.splitlines())
        monkeypatch.setattr(launching, "COMMAND", (sys.executable, "-c", text))
        monkeypatch.setattr(launching, "_start", lambda *args: workers.append(start(*args)) or workers[-1])
        return workers

    return play


def ended(count, together=True):
    """The message that a launch ends with, within the time that this may take."""
    begin = time.monotonic()
    with pytest.raises(ForcingError) as raised:
        launch([[REQUEST]] * count, together=together, advice=lambda: "Go on.")
    assert time.monotonic() - begin < SOON
    return str(raised.value)


def test_workers_that_end_well_say_nothing(played):
    workers = played("assert os.environ['WORLD_SIZE'] == '3' and os.environ['MASTER_PORT'].isdecimal()")
    launch([[REQUEST]] * 3, together=True, advice=lambda: "Go on.")
    assert [worker.process.returncode for worker in workers] == [0, 0, 0]


def test_a_worker_whose_work_is_done_is_not_wound_up(played, capfd):
    """What would happen then, here an abort as gloo's threads may cause it, is no failure; what it said is heard."""
    # in one piece each, even where PYTHONUNBUFFERED is set and both write at once
    workers = played("import atexit\natexit.register(os.abort)\nsys.stdout.write(f'done {rank}\\n')")
    launch([[REQUEST]] * 2, together=True, advice=lambda: "Go on.")
    assert [worker.process.returncode for worker in workers] == [0, 0]
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "done 0", "done 1"]


def test_one_that_fails_ends_those_that_wait_for_it(played):
    workers = played("if rank == 1: raise KeyError('x')\ntime.sleep(600)")
    assert ended(3) == "Process 1 of 3 failed: KeyError: 'x'. Go on."
    assert all(worker.process.poll() is not None for worker in workers)


def test_a_process_that_leaves_without_a_word(played):
    played("if rank == 1: os._exit(3)\ntime.sleep(600)")
    assert ended(2) == "Process 1 of 2 ended with status 3. Go on."


def test_what_a_person_can_fix_is_told_as_it_is(played):
    played("if rank == 1: raise ForcingError('Use less.')\ntime.sleep(600)")
    assert ended(2) == "Use less."


def test_the_cause_is_told_and_not_what_followed_from_it(played):
    """A killed process before one that reports, a ForcingError before another error, the first one before the later ones."""
    played("if rank == 2: os.kill(os.getpid(), 9)\ntime.sleep(0.3)\nraise RuntimeError('peer is gone')")
    assert ended(3) == "Process 2 of 3 was killed (SIGKILL). Go on."
    played("if rank == 2: raise ForcingError('Use less.')\nraise RuntimeError('peer is gone')")
    assert ended(3) == "Use less."
    played("time.sleep(0.0 if rank == 2 else 0.5)\nraise RuntimeError(f'by {rank}')")
    assert ended(3) == "Process 2 of 3 failed: RuntimeError: by 2. Go on."


def test_workers_with_jobs_of_their_own_are_let_finish(played, tmp_path):
    played(f"if rank == 0: raise KeyError('x')\ntime.sleep(2)\nopen({str(tmp_path / 'done')!r}, 'w').close()\n"
           "assert os.environ['WORLD_SIZE'] == '1'")
    assert ended(2, together=False).startswith("Process 0 of 2 failed")
    assert (tmp_path / "done").exists()


def test_a_worker_ends_with_its_parent(played, tmp_path):
    """When the parent is gone, so is the other end of the pipe."""
    workers = played("time.sleep(600)")
    launching._start(0, 1, [REQUEST], {}, tmp_path)
    workers[0].process.stdin.close()
    assert workers[0].process.wait(SOON) == 1


def test_torchrun_is_noticed(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not member()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert member()
