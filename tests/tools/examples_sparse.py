"""The example workflow of sparse attention. Its function is in the table of `examples`."""
from example_clip import MicroClip
from forcing_pack.forcing_core.micro.source import PROMPT
from forcing_pack.forcing_core.presets import get
from notes import bullets, seconds, text


def sparse_micro():
    preset = get("micro")
    note = text(
        "Sparse attention, with nothing to download",
        f"One clip of {seconds(21)}, 64x64 pixels, with the tiny model that comes with the pack. After its first step each "
        "block looks at 28 % of what is remembered: what a search with 8-bit numbers finds.",
        "**Mind**: on a picture this small that takes longer than dense attention. It shows the wires and what it does to the "
        "video; time is saved on large pictures with a long memory.",
        bullets("What to change", "**method**: *none* for the dense video of the same seed. *dummy* gives half of the heads a "
                "short memory. *light* was made for weights of its own.",
                "**density**: less shows when it is too little.",
                "**Seed** is fixed, so that methods can be compared."),
        "## Licence\nModel and pack: Apache-2.0. It was trained on generated clips only.")
    clip = MicroClip(preset, note, 460, PROMPT).empty(width=64, height=64)
    clip.sampling()
    clip.by_preset()
    clip.sampler = clip.add("ForcingSparse", sampler=clip.sampler, method="ann_low_bits", **{
        "method.bits": 8, "method.density": 0.28, "method.group": 4, "method.dense_steps": 1})
    return clip.video(clip.sample(clip.guider(), clip.noise(1, "fixed")), "sparse")


EXAMPLES = (sparse_micro,)
