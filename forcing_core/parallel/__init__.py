"""More than one device: one rollout shared by several processes (`ulysses`), and many rollouts side by side (`farm`).

    launch.py    starts worker processes and watches over them: one that dies ends the run with a message
    request.py   what a worker is told: plain data, without PyTorch
    work.py      what a worker does: a rollout from weights to latents, snapshots and a video
    ranks.py     the processes of one rollout and what they send each other
    ulysses.py   which tokens and heads each of them has
    farm.py      a list of prompts and seeds, over processes or over Ray

The command is `python -m forcing_core parallel`. Importing this package imports no PyTorch.
"""
