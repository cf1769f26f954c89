"""Waiting with a deadline: the one place in the tests that sleeps."""
import time


def until(probe, timeout, what, pause=0.05):
    """Call `probe()` until it returns something true, and return that; TimeoutError names `what`."""
    deadline = time.monotonic() + timeout
    while True:
        if result := probe():
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout} s")
        time.sleep(pause)
