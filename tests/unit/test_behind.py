"""One thread that is one job behind: order, errors that stay, and an end that waits."""
import threading
import time

import pytest
import torch
from forcing_pack.forcing_core.streaming.behind import Behind


def test_jobs_are_done_in_order_by_one_other_thread_and_the_end_waits():
    done, alone = [], threading.Lock()

    def job(number):
        assert alone.acquire(blocking=False)
        time.sleep(0.02)
        done.append((number, threading.current_thread()))
        alone.release()

    with Behind() as behind:
        for number in range(4):
            behind.hand(lambda number=number: job(number))
            assert len(done) >= number  # at most one is behind
        behind.settle()
        assert len(done) == 4
        behind.hand(lambda: job(4))
    assert [number for number, _ in done] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in done}) == 1 and done[0][1] is not threading.current_thread()


def test_an_error_comes_back_until_somebody_heeds_it():
    def broken():
        raise OSError("full")

    done = []
    with pytest.raises(OSError, match="full"), Behind() as behind:
        behind.hand(broken)
        for _ in range(2):
            with pytest.raises(OSError, match="full"):
                behind.hand(lambda: done.append(1))
    assert done == []
    with pytest.raises(ValueError, match="mine"), Behind() as behind:
        behind.hand(broken)
        raise ValueError("mine")  # the error on its way is the one that is told


@pytest.mark.parametrize("mode", [True, False])
def test_it_keeps_gradients_as_rarely_as_its_caller(mode):
    seen = []
    with torch.inference_mode(mode), Behind() as behind:
        behind.hand(lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled())))
    assert seen == [(mode, False)]
