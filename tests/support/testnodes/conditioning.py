"""TestTextEncode and TestClip: conditioning without the 11 GB text encoder."""
import hashlib

import torch
from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .portrait import TestPose, TestVision
from .voice import TestVoice

TOKENS, TEXT_DIM = 512, 4096


def encode(text):
    """[1, 512, 4096] that depends on the whole text; like UMT5's, it is zero after the last token."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    length = min(TOKENS, len(text.split()) + 1)
    embedding = torch.zeros(1, TOKENS, TEXT_DIM)
    embedding[:, :length] = torch.randn(1, length, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    return embedding


class TestTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestTextEncode",
            category="testing",
            inputs=[io.String.Input("text", multiline=True)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        return io.NodeOutput([[encode(text), {}]])


class Words:
    """What text nodes use of a CLIP."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return [[encode(tokens), {}]]


class TestClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestClip", category="testing", inputs=[], outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(Words())


class TestExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TestTextEncode, TestClip, TestVoice, TestPose, TestVision]


async def comfy_entrypoint() -> TestExtension:
    return TestExtension()
