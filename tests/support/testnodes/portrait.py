"""TestPose and TestVision: what a portrait model is told about its pictures, without the gigabytes that tell it.

Neither has a smaller size. SDPose draws heat maps of 768x1024 with 640 channels, 0.2 TFLOP a picture in its head alone,
and ComfyUI knows image encoders by their number of layers.
"""
import math

import torch
from comfy_api.latest import io

TOKENS, DIM = 257, 1280  # of CLIP ViT-H
FACE, HAND, FOOT = 70, 21, 6
# OpenPose order, in parts of the picture: nose, neck, right and left arm, right and left leg, eyes, ears.
BODY = ((.5, .4), (.5, .65), (.3, .7), (.2, .85), (.2, .95), (.7, .7), (.8, .85), (.8, .95), *((.4, .95), (.6, .95)) * 3,
        (.45, .35), (.55, .35), (.4, .38), (.6, .38))


def person(number, width, height):
    """One that sways from frame to frame, in the form of SDPoseKeypointExtractor: x, y in pixels and a score in a row."""
    sway = .1 * math.sin(number / 2)

    def flat(points, score=1.0):
        return [value for x, y in points for value in ((x + sway) * width, y * height, score)]
    oval = [(.5 + .15 * math.cos(turn), .4 + .2 * math.sin(turn)) for turn in (math.tau * k / FACE for k in range(FACE))]
    hidden = {"foot_keypoints_2d": FOOT, "hand_right_keypoints_2d": HAND, "hand_left_keypoints_2d": HAND}
    return {"pose_keypoints_2d": flat(BODY), "face_keypoints_2d": flat(oval),
            **{name: flat([(0, 0)] * count, score=0.0) for name, count in hidden.items()}}


class TestPose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestPose", category="testing", inputs=[io.Image.Input("image")],
                         outputs=[io.Custom("POSE_KEYPOINT").Output()])

    @classmethod
    def execute(cls, image) -> io.NodeOutput:
        frames, height, width = image.shape[:3]
        return io.NodeOutput([{"canvas_width": width, "canvas_height": height, "people": [person(number, width, height)]}
                              for number in range(frames)])


class Seen:
    """What Wan models use of a CLIP vision output."""

    def __init__(self, states):
        self.penultimate_hidden_states = states


class Eye:
    """As many features as ViT-H gives, from the picture's own numbers."""

    def encode_image(self, image, crop=True):
        bright = torch.nn.functional.adaptive_avg_pool1d(image.mean(-1).flatten(1), TOKENS)
        return Seen(torch.sin(bright[..., None] * torch.linspace(1, 60, DIM)))


class TestVision(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestVision", category="testing", inputs=[], outputs=[io.ClipVision.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(Eye())
