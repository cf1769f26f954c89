"""The bundled micro model in tests: the trained files where they are, else small random ones of the same names."""
from pathlib import Path

import safetensors.torch
import torch
from forcing_pack.forcing_core.micro import bundle
from forcing_pack.forcing_core.micro.vae import MicroVAE, vae_bytes
from forcing_pack.forcing_core.wan.random import random_network


def trained():
    """Whether every file of the bundle is in its place."""
    names = [bundle.VAE, *(f"micro_{name}.safetensors" for name in bundle.NETWORKS)]
    return all((bundle.WEIGHTS / name).is_file() for name in names)


def random_bundle(folder, layers=2):
    """Fill `folder` with a random VAE and random networks, all different; returns it as a Path."""
    folder = Path(folder)
    for seed, name in enumerate(bundle.NETWORKS):
        net = random_network(bundle.micro_config(128, layers), seed)
        state = {key: value.to(torch.bfloat16) for key, value in net.state_dict().items()}
        safetensors.torch.save_file(state, folder / f"micro_{name}.safetensors", {"forcing.training": "{}"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = MicroVAE(8)
    (folder / bundle.VAE).write_bytes(vae_bytes(vae, {"forcing.training": "{}"}))
    return folder
