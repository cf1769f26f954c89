"""Endless video in constant memory: causal decoding block by block, and files that grow as frames come."""
from .endless import ENDLESS, EndlessBlocks
from .sink import FORMATS, Audio, VideoSink
from .tiny import TinyDecodeStream
from .vae import DecodeStream, EncodeStream

__all__ = ["ENDLESS", "FORMATS", "Audio", "DecodeStream", "EncodeStream", "EndlessBlocks", "TinyDecodeStream", "VideoSink"]
