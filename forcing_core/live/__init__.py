"""LIVE (arXiv 2602.03747): a world generated frame by frame under a camera or actions, over the same block rollout.

A network of its own, with its autoencoder, its conditions and its file format; nothing of the rollout is new. Every line
is written here; names of weights are those of the public repo Junchao-cs/LIVE @20c82a9.
"""
from .autoencoder import Autoencoder
from .camera import CameraPath
from .checkpoint import Loaded, convert, load
from .conditions import ActionTrack, CameraTrack, PoseTrack
from .config import DATASETS, RE10K, AutoencoderConfig, LiveConfig
from .denoiser import LiveDenoiser
from .model import LiveModel
from .rollout import live_rollout

__all__ = ["DATASETS", "RE10K", "ActionTrack", "Autoencoder", "AutoencoderConfig", "CameraPath", "CameraTrack", "LiveConfig",
           "LiveDenoiser", "LiveModel", "Loaded", "PoseTrack", "convert", "live_rollout", "load"]
