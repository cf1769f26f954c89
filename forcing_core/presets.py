"""Every published system of the family as one row of data: what to load and how its authors run it.

Frames are latent frames (pixel frames = 1 + 4 * (frames - 1)). Rows come from the papers, the public code and
the default configurations; whatever could not be checked there says so in `notes`. Licences are those of the
weights as last seen: cards change, so read the live card before you publish anything.
"""
from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import PurePosixPath

from .errors import ForcingError

FEW_STEP = (1000, 750, 500, 250)
WAN_1_3B, WAN_14B = "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"
FLAT = "flat"  # weights key of a file that is one state dict, without a container around it

# The negative prompt of official Wan 2.1; only the many-step models use one.
WAN_NEGATIVE_PROMPT = (
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001\uff0c\u7ec6\u8282\u6a21\u7cca\u4e0d\u6e05\uff0c"
    "\u5b57\u5e55\uff0c\u98ce\u683c\uff0c\u4f5c\u54c1\uff0c\u753b\u4f5c\uff0c\u753b\u9762\uff0c\u9759\u6b62\uff0c"
    "\u6574\u4f53\u53d1\u7070\uff0c\u6700\u5dee\u8d28\u91cf\uff0c\u4f4e\u8d28\u91cf\uff0c"
    "JPEG\u538b\u7f29\u6b8b\u7559\uff0c\u4e11\u964b\u7684\uff0c\u6b8b\u7f3a\u7684\uff0c"
    "\u591a\u4f59\u7684\u624b\u6307\uff0c\u753b\u5f97\u4e0d\u597d\u7684\u624b\u90e8\uff0c"
    "\u753b\u5f97\u4e0d\u597d\u7684\u8138\u90e8\uff0c\u7578\u5f62\u7684\uff0c\u6bc1\u5bb9\u7684\uff0c"
    "\u5f62\u6001\u7578\u5f62\u7684\u80a2\u4f53\uff0c\u624b\u6307\u878d\u5408\uff0c"
    "\u9759\u6b62\u4e0d\u52a8\u7684\u753b\u9762\uff0c\u6742\u4e71\u7684\u80cc\u666f\uff0c\u4e09\u6761\u817f\uff0c"
    "\u80cc\u666f\u4eba\u5f88\u591a\uff0c\u5012\u7740\u8d70")

# Policies of this version -> None; all others -> what is missing.
POLICIES = {
    "window": None,
    "rolling": None,
    "ema_sink": None,
    "deep_sink": None,
    "deep_compress": None,
    "bounded": None,
    "sparse": "block-sparse attention is not part of this version",
    "routing": None,
    "merging": None,
    "recency": None,
    "recompute": None,
    "rolling_sink": None,
    "relax": None,
    "memflow": None,
    "per_step": None,
    "knot": "its weights are not public; Forcing Knot adds its knots and its reference to other systems",
    "sliding": "it is no Wan 2.1 model: the Forcing LIVE nodes run it",
}


@dataclass(frozen=True)
class File:
    """One published file: Hugging Face repository, path inside it ("" = no single file known), size in bytes.

    `bytes` is None where unknown, and otherwise good to one percent (enough to say what a download means).
    """

    repo: str
    path: str
    bytes: int | None = None


@dataclass(frozen=True)
class Preset:
    """How one system is run. Frames are latent frames, timesteps run from 1000 (noise) to 0 (clean).

    policy: cache policy, a key of POLICIES; `options` are its further settings as (name, value) pairs.
    block: frames denoised together. window: sink + past + current frames a pass may see, None = everything.
    sink: frames never evicted. positions: "absolute" or "relative" temporal RoPE.
    steps, first_steps: denoising step list, and another one for the first generated block only.
    warp: pass the list through the flow shift. context_timestep: timestep of the clean pass.
    solver: "renoise" (x0, then fresh noise at the next step) or a many-step solver with `step_count` steps.
    cfg: guidance scale, 1.0 = off. recache: rewrite the cache on a prompt switch; global_sink: but keep the sink.
    weights_key: container the authors' default command line takes the weights from.
    training_frames: clip length of the training, None = not published.
    """

    name: str
    title: str
    policy: str = "window"
    block: int = 3
    window: int | None = None
    sink: int = 0
    positions: str = "absolute"
    steps: tuple[int, ...] = FEW_STEP
    first_steps: tuple[int, ...] | None = None
    warp: bool = True
    shift: float = 5.0
    context_timestep: float = 0.0
    independent_first: bool = False
    solver: str = "renoise"
    step_count: int = 0
    cfg: float = 1.0
    negative_prompt: str = ""
    recache: bool = False
    global_sink: bool = False
    options: tuple[tuple[str, object], ...] = ()
    base: str = WAN_1_3B
    weights_key: str = "generator_ema"
    files: tuple[File, ...] = ()
    lora: File | None = None
    licence: str = ""
    restrictions: str = ""
    paper: str = ""
    code: str = ""
    training_frames: int | None = 21
    fps: int | None = 16
    notes: str = ""

    @property
    def available(self) -> bool:
        """True if this version of the pack runs the row from end to end, with public weights."""
        return POLICIES[self.policy] is None and bool(self.files)

    @property
    def runs(self) -> str:
        """"yes", or "no: " and the reason."""
        if self.available:
            return "yes"
        return "no: " + (POLICIES[self.policy] or "there are no public weights")


FP32_1_3B = 5_675_987_200  # 1,418,996,800 parameters
SF_LICENCE = "Apache-2.0 since 2025-09-23, CC BY-NC-SA 4.0 before"
VERIFY = "verify the live card: "
ACADEMIC = "code: academic use only, no commercial or production use"


def _hub(repo: str, *paths: str, size: int | None = FP32_1_3B) -> tuple[File, ...]:
    return tuple(File(repo, path, size) for path in paths)


_SELF_FORCING = Preset(
    "self-forcing", "Self Forcing",
    files=_hub("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt", "checkpoints/self_forcing_sid.pt",
               "checkpoints/self_forcing_sid_v2.pt", "checkpoints/self_forcing_gan.pt"),
    licence=SF_LICENCE, restrictions=VERIFY + "older copies of it say non-commercial",
    paper="2506.08009", code="guandeh17/Self-Forcing",
    notes="Trained for 21 frames (5 s), sees everything. The sid and gan file names come from third-party lists.")

# The model that comes with the package. Whatever goes wrong in its first block stays for the whole video, so that block gets
# sixteen steps; it costs what three more blocks cost, once.
_MICRO = Preset(
    "micro", "The bundled micro model", first_steps=tuple(round(1000 - 62.5 * step) for step in range(16)), weights_key=FLAT,
    files=(File("bundled with the pack", "micro_student.safetensors", 4_613_640),), licence="Apache-2.0",
    paper="2506.08009", code="guandeh17/Self-Forcing",
    notes="Self Forcing in small, trained for 21 frames at 64x64; up to 5 s.")

# Methods that need no training run on these weights.
_ON_SELF_FORCING = replace(_SELF_FORCING, files=_SELF_FORCING.files[:1])

_CAUSAL_FORCING = Preset(
    "causal-forcing-chunkwise", "Causal Forcing, blocks of 3", weights_key="generator",
    files=_hub("zhuhz22/Causal-Forcing", "chunkwise/causal_forcing.pt"),
    licence="Apache-2.0", paper="2602.02214", code="thu-ml/Causal-Forcing",
    notes="Trained for 21 frames.")

_AR_TEACHER = replace(
    _CAUSAL_FORCING, name="causal-forcing-ar-teacher-chunkwise",
    title="Causal Forcing, many-step teacher, blocks of 3",
    steps=(), solver="unipc", step_count=50, cfg=3.0, negative_prompt=WAN_NEGATIVE_PROMPT,
    files=_hub("zhuhz22/Causal-Forcing", "chunkwise/ar_diffusion.pt"),
    notes="Not distilled: 50 UniPC steps with guidance, two caches.")

_LONGLIVE = Preset(
    "longlive", "LongLive 1", window=12, sink=3, recache=True, global_sink=True, weights_key="generator",
    files=_hub("Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt"),
    lora=File("Efficient-Large-Model/LongLive-1.3B", "models/lora.pt"),
    licence="CC BY-NC-SA 4.0 (card), Apache-2.0 (code)", restrictions=VERIFY + "the card said non-commercial",
    paper="2509.22622", code="NVlabs/LongLive, branch v1.0", training_frames=240,
    notes="Base and LoRA (rank 256, alpha 256, so scale 1) belong together. Absolute positions end at 1024 frames "
          "(255 s). Prompt switches recache the window and keep the sink.")

_CAUSVID = Preset(
    "causvid-3step", "CausVid, 3 steps", steps=(1000, 757, 522), warp=False, shift=8.0, weights_key="generator",
    files=_hub("tianweiy/CausVid", "autoregressive_checkpoint/model.pt", size=None),
    licence="CC BY-NC 4.0 (card), CC BY-NC-SA 4.0 (text)", restrictions="non-commercial",
    paper="2412.07772", code="tianweiy/CausVid",
    notes="The step list is fed to the network as it is. The published list ends with a 0 that is dropped.")

_ROLLING = Preset(
    "rolling-forcing", "Rolling Forcing", policy="rolling", window=21, sink=3, steps=(1000, 800, 600, 400, 200),
    options=(("positions", "rebased"),),
    files=_hub("TencentARC/RollingForcing", "checkpoints/rolling_forcing_dmd.pt", size=None),
    licence="academic only (repository), MIT (card)", restrictions=ACADEMIC + "; repository and card disagree",
    paper="2509.25161", code="TencentARC/RollingForcing", training_frames=27,
    notes="As many blocks as there are steps are denoised jointly. Published positions are absolute and end at 1024 "
          "frames; rebased ones give the same pictures and go on.")

_DEEP = replace(
    _ON_SELF_FORCING, name="deep-forcing", title="Deep Forcing (training-free)", policy="deep_compress",
    window=21, sink=10, options=(("budget", 16), ("recent", 4), ("reuse_cap", 7), ("positions", "rebased")),
    paper="2512.05081", code="cvlab-kaist/DeepForcing",
    notes="Runs on Self Forcing weights. Participative compression to 16 frames every second block. Published positions "
          "are absolute and end at 1024 frames; rebased ones give the same pictures and go on.")

_LIGHT = Preset(
    "light-forcing-short", "Light Forcing, 5 s", policy="sparse",
    options=(("sparsity", 0.88), ("sparsity_base", 0.98), ("keep_frames", 6), ("keep_sink", 1), ("keep_near", 2)),
    files=_hub("mack-williams/Light-Forcing", "short_video_gen.pt", size=None),
    licence="Apache-2.0 (proposed by the card)", restrictions=VERIFY + "licence only proposed there",
    paper="2602.04789", code="chengtao-lv/LightForcing",
    notes="Fine-tuned with sparse attention at 512x768 (1536 tokens a frame); dense attention changes the result.")

_ROWS = (
    _SELF_FORCING,
    _MICRO,
    replace(_MICRO, name="micro-endless", title="The bundled micro model, endless", window=12, sink=3, positions="relative",
            notes="The same for any length: a window of 12 frames with a sink of 3."),
    replace(_ON_SELF_FORCING, name="self-forcing-long", title="Self Forcing, long (training-free)",
            window=12, sink=3, positions="relative",
            notes="Community setting without training; another one in use is window 12 with sink 5."),
    replace(_SELF_FORCING, name="self-forcing-10s", title="Self Forcing, 10 s checkpoint", training_frames=None,
            files=_hub("gdhe17/Self-Forcing", "checkpoints/self_forcing_10s.pt"),
            notes="Unverified: the authors did not publish its configuration; the 5 s settings are assumed."),
    _CAUSVID,
    replace(_CAUSVID, name="causvid-4step-warp", title="CausVid, 4 steps, warped", steps=FEW_STEP, warp=True,
            files=_hub("tianweiy/CausVid", "autoregressive_checkpoint_warp_4step_cfg2/model.pt", size=None),
            notes="The published list ends with a 0 that is dropped. Folder name as in the configuration."),
    _CAUSAL_FORCING,
    replace(_CAUSAL_FORCING, name="causal-forcing-framewise", title="Causal Forcing, single frames", block=1,
            weights_key="generator_ema",
            files=_hub("zhuhz22/Causal-Forcing", "framewise/causal_forcing.pt"),
            notes="Also image to video: give the image's latent as first frame."),
    replace(_CAUSAL_FORCING, name="causal-forcing++-2step", title="Causal Forcing++, 2 steps, single frames",
            block=1, steps=(1000, 500), first_steps=FEW_STEP, weights_key="generator_ema", paper="2605.15141",
            files=_hub("zhuhz22/Causal-Forcing", "causal-forcing++/framewise-2step.pt"),
            notes="The first generated block takes four steps, also after a given image."),
    replace(_CAUSAL_FORCING, name="causal-forcing++-1step", title="Causal Forcing++, 1 step, single frames",
            block=1, steps=(1000,), first_steps=FEW_STEP, weights_key="generator_ema", paper="2605.15141",
            files=_hub("zhuhz22/Causal-Forcing", "causal-forcing++/framewise-1step.pt"),
            notes="The first generated block takes four steps, also after a given image."),
    _AR_TEACHER,
    replace(_AR_TEACHER, name="causal-forcing-ar-teacher-framewise",
            title="Causal Forcing, many-step teacher, single frames", block=1,
            files=_hub("zhuhz22/Causal-Forcing", "framewise/ar_diffusion.pt")),
    replace(_ROLLING, name="causal-forcing-longvideo", title="Causal Forcing, long video (rolling)", steps=FEW_STEP,
            files=_hub("zhuhz22/Causal-Forcing", "chunkwise/longvideo.pt"),
            licence="Apache-2.0 (weights)", restrictions=ACADEMIC, paper="2602.02214",
            code="thu-ml/Causal-Forcing, folder long_video", training_frames=None,
            notes="Rolling Forcing with four steps, so a window of four blocks."),
    _LONGLIVE,
    replace(_LONGLIVE, name="longlive-infinity", title="LongLive 1, relative positions", positions="relative",
            notes="The weights of longlive; positions counted inside the window, so the length is not limited."),
    replace(_LONGLIVE, name="lol", title="LoL: LongLive 1 with jittered positions (training-free)",
            options=(("positions", "rebased"), ("jitter", 0.8)), paper="2601.16914", code="",
            notes="The weights of longlive; every head turns in time by a base of its own, against the collapse to the sink "
                  "in long videos. Unverified: draws of the jitter, and that only time is jittered. Positions are absolute "
                  "up to 1024 frames; beyond them the distance to the sink stays."),
    _ROLLING,
    Preset("reward-forcing", "Reward Forcing", policy="ema_sink", window=9, sink=3, positions="relative",
           options=(("alpha", 0.999),), weights_key=FLAT,
           files=_hub("JaydenLu666/Reward-Forcing-T2V-1.3B", "rewardforcing.pt", size=None),
           licence="Apache-2.0 (code); the card names none", restrictions=VERIFY + "it names no licence",
           paper="2512.04678", code="JaydenLyh/Reward-Forcing",
           notes="The file is a flat state dict. Published with blocks as long as the sink; others work here too."),
    _DEEP,
    replace(_DEEP, name="deep-forcing-sink", title="Deep Forcing, deep sink only (training-free)",
            policy="deep_sink", sink=14, options=(("positions", "rebased"),),
            notes="Runs on Self Forcing weights. The authors recommend a sink of 10 to 14 frames."),
    replace(_ON_SELF_FORCING, name="self-forcing++", title="Self-Forcing++ (baseline weights)", window=21,
            paper="2510.02283", code="justincui03/Self-Forcing-Plus-Plus (README only)",
            notes="Its weights are not public: on Self Forcing weights this is the paper's baseline, which degrades "
                  "after about 10 s. At most 1023 frames."),
    _LIGHT,
    replace(_LIGHT, name="light-forcing-long", title="Light Forcing, 15 s", window=12, sink=1, positions="relative",
            options=(("sparsity", 0.85), ("sparsity_base", 0.95), ("keep_frames", 3), ("keep_sink", 1),
                     ("keep_near", 1)),
            files=_hub("mack-williams/Light-Forcing", "long_video_gen.pt", size=None)),
    Preset("context-forcing", "Context Forcing", policy="bounded", window=21, sink=3, positions="relative",
           options=(("slow", 12), ("fast", 6), ("tau", 0.95), ("promote", 1)),
           licence="unknown", restrictions="no licence file seen in the repository",
           paper="2602.06028", code="TIGER-AI-Lab/Context-Forcing", training_frames=None,
           notes="Unverified: the authors say that weights were released on 2026-06-29, their place is not known, "
                 "nor is the weights key."),
    replace(_ON_SELF_FORCING, name="resampling-forcing", title="Resampling Forcing: history routing (training-free)",
            policy="routing", sink=1, positions="relative", options=(("top_k", 5),), paper="2512.15702", code="",
            notes="No weights and no code are public; only its history routing is offered, on Self Forcing weights. "
                  "The original is many-step and makes single frames."),
    Preset("krea-realtime-14b", "Krea Realtime 14B", policy="recompute", window=6, positions="relative", base=WAN_14B,
           weights_key=FLAT, options=(("weight", 1.0),),
           files=(File("krea/krea-realtime-video", "krea-realtime-video-14b.safetensors", 28_580_000_000),),
           licence="unclear: Apache-2.0 or CC BY-NC-SA", restrictions=VERIFY + "its statements conflict",
           code="krea-ai/realtime-video", training_frames=None,
           notes="Self Forcing on the 14B model; the context (the first frame and the newest two) is recomputed before "
                 "every block. Steps, shift and window from its server, whose default is 6 steps where 4 are advised for "
                 "speed, and which encodes its oldest picture anew in place of the first frame. Unverified: container."),
    Preset("knot-forcing", "Knot Forcing", policy="knot", positions="relative", weights_key=FLAT,
           options=(("knot", 1),), licence="none: nothing was published", paper="2512.21734", training_frames=None,
           notes="No weights and no code are public. Unverified: steps, window and start of the running-ahead "
                 "reference; blocks of 3 with a knot of 1 come from a third-party re-implementation."),
    replace(_ON_SELF_FORCING, name="tempcache", title="TempCache (training-free)", policy="merging", sink=1,
            options=(("tau", 0.9),), paper="2602.01801", code="",
            notes="Merges cached tokens, for long unbounded histories; no gain on 5 s clips. Runs on any weights of "
                  "the family (the paper used Rolling Forcing); Self Forcing weights stand here."),
    replace(_ON_SELF_FORCING, name="recency-forcing", title="Recency Forcing (training-free)", policy="recency",
            window=21, sink=3, positions="relative", options=(("recent", 3), ("beta", 12.0), ("gamma", 0.1)),
            paper="2609.19729", code="",
            notes="Runs on Self Forcing weights. Old frames count less, most of all at the noisiest step. Unverified: the "
                  "bias of the clean pass, taken from the last step."),
    replace(_ON_SELF_FORCING, name="rolling-sink", title="Rolling Sink (training-free)", policy="rolling_sink", window=21,
            paper="2602.07775", code="haodong2000/RollingSink",
            notes="Runs on Self Forcing weights; also meant for Causal Forcing. The beginning of the video comes back in the "
                  "memory for ever. Published up to 8192 frames; no limit here."),
    replace(_ON_SELF_FORCING, name="relax-forcing", title="Relax Forcing (training-free)", policy="relax", window=7, sink=2,
            positions="relative", options=(("history", 1), ("recent", 1), ("candidates", 4), ("reservoir", 120),
                                           ("novelty", 2.0)),
            paper="2603.21366", code="zengqunzhao/Relax-Forcing",
            notes="Runs on Self Forcing weights; its code is Apache-2.0. A block attends to 7 frames, chosen from 120 that are "
                  "kept: 34 GB at 832x480 in 16 bit, half of it with store int8. Unverified: what the 120 count, and prompt "
                  "switches, of which the paper says nothing."),
    replace(_ON_SELF_FORCING, name="memflow", title="MemFlow: memory chosen by the prompt (without its weights)",
            policy="memflow", window=12, positions="relative", recache=True, global_sink=True,
            options=(("top_k", 2),), paper="2512.14699",
            code="KlingTeam/MemFlow",
            notes="At a prompt switch the frames that fit the new prompt best become the memory. The authors trained a LoRA "
                  "with it, whose place and licence are not known here; on Self Forcing weights only the mechanism is theirs. "
                  "Unverified: window and size of the bank, what the prompt is compared with, and the recache."),
    Preset("live-avatar", "Live Avatar: a picture that speaks (Wan 2.2 S2V)", policy="per_step", window=12,
           options=(("positions", "rebased"), ("limit", 45000), ("steps", 4), ("nearest", 1), ("farthest", 27)), steps=(),
           solver="euler", step_count=4, shift=3.0, base="Wan2.2-S2V-14B", weights_key=FLAT,
           files=(File("Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
                       "split_files/diffusion_models/wan2.2_s2v_14B_fp8_scaled.safetensors"),),
           lora=File("Quark-Vision/Live-Avatar", "liveavatar.safetensors"), licence="Apache-2.0",
           restrictions=VERIFY + "licences of base and LoRA as last seen", paper="2512.04677", code="Alibaba-Quark/LiveAvatar",
           training_frames=12, fps=25,
           notes="An S2V model with a LoRA (rank 128, alpha 64). Every step keeps a window of its own, no clean passes; the "
                 "reference stays 4 to 30 frames behind the first frame of a block, drawn anew for every forward. Not here: "
                 "the reference becoming the first frame made, after 12. ComfyUI cuts sound for 16 frames a second, the "
                 "LoRA was trained with 25."),
    Preset("live", "LIVE (RealEstate10K)", policy="sliding", block=1, window=32, positions="relative", steps=(),
           solver="dpm", step_count=18, shift=3.0, base="LIVE DiT 774M", weights_key=FLAT,
           files=(File("junchaoh-cs/LIVE-Re10K", "live-re10k.ckpt", 10_436_804_929),
                  File("junchaoh-cs/LIVE-Re10K", "vae-kl16.ckpt", 265_900_046)),
           licence="Apache-2.0", paper="2602.03747", code="Junchao-cs/LIVE", training_frames=None, fps=None,
           notes="Not a Wan model: 256x256, own autoencoder (the second file), driven by a camera. The Forcing LIVE nodes and "
                 "forcing_core/live run it. Its context gets light noise and is encoded anew for every frame."),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ROWS}


def get(name: str) -> Preset:
    """The preset called `name`; raises ForcingError that lists near names."""
    wanted = _normal(name)
    if wanted in PRESETS:
        return PRESETS[wanted]
    near = difflib.get_close_matches(wanted, PRESETS, n=4, cutoff=0.5)
    raise ForcingError(f"There is no preset called {name!r}. "
                       + (f"Did you mean {', '.join(near)}?" if near else f"Choose one of {', '.join(PRESETS)}."))


def runnable() -> tuple[Preset, ...]:
    """The presets this version runs from end to end."""
    return tuple(preset for preset in PRESETS.values() if preset.available)


def for_file(file_name: str) -> tuple[Preset, ...]:
    """Presets that `file_name` (a name, a path or repository/path) may belong to, the most usual first.

    Official paths count by how many of their last parts agree; only if none does, names of presets count.
    """
    matches = _file_matches(file_name)
    if matches:
        return tuple(preset for preset, _ in matches)
    stem = _parts(file_name)[-1]
    names = [n for n in PRESETS if stem == n or (stem.startswith(n) and stem[len(n)] in "-. ")]
    return (PRESETS[max(names, key=len)],) if names else ()


def guess(file_name: str) -> Preset | None:
    """The one preset a file belongs to by default, or None where the name fits none or several files."""
    files = {file for _, file in _file_matches(file_name)}
    found = for_file(file_name)
    return found[0] if found and len(files) <= 1 else None


EXTENSIONS = (".pt", ".pth", ".safetensors", ".ckpt", ".bin")
GENERIC = ("model", "lora")  # official names that say nothing without their folder


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _parts(path: str) -> tuple[str, ...]:
    parts = PurePosixPath(_normal(path.replace("\\", "/"))).parts or ("",)
    last = parts[-1]
    for extension in EXTENSIONS:
        last = last.removesuffix(extension)
    return (*parts[:-1], last)


def _file_matches(file_name: str) -> list[tuple[Preset, File]]:
    """(preset, file) pairs with the longest common end of path, in table order."""
    given, scored = _parts(file_name), []
    for preset in PRESETS.values():
        for file in (*preset.files, *((preset.lora,) if preset.lora else ())):
            official = _parts(f"{file.repo}/{file.path}")
            same = len(commonprefix([given[::-1], official[::-1]]))
            if file.path and same > (official[-1] in GENERIC):
                scored.append((same, preset, file))
    best = max((same for same, _, _ in scored), default=0)
    return [(preset, file) for same, preset, file in scored if same == best]
