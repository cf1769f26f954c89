"""The example workflows beyond five seconds."""
from example_clip import PROMPTS, Clip, widgets
from example_prompts import BALLOON, CYCLIST, HARBOUR, HORSE, LANTERN, OPEN_SEA, SCENES, SURFER, TRAIN
from forcing_pack.forcing_core.policies import DeepCompressOptions, MergingOptions, WindowOptions
from forcing_pack.forcing_core.presets import get
from notes import MATCH, bullets, files_of, licence, lora, seconds, store, text

LONG = WindowOptions(window=12, sink=3, positions="relative")
# label -> cache policy, for videos side by side
COMPARED = {"Window": WindowOptions(window=12, positions="relative"), "Window and sink": LONG,
            "Deep Forcing": DeepCompressOptions(positions="rebased"), "TempCache": MergingOptions()}
CHANGES = ((5.0, "flush"), (10.0, "cut"), (15.0, "recache"))  # of the story


def longlive_30s():
    preset = get("longlive")
    adapter = lora(preset)
    note = text(
        "LongLive: 30 seconds in one go",
        f"{seconds(120)}, in 40 blocks. Each block sees 12 latent frames: the first 3 of the video (the *sink*, "
        "which keeps the subject the same), the 6 before it, and itself. So time and memory a block stay constant.",
        files_of(preset, adapter),
        "Base and LoRA belong together. Both come from the folder `models` of one repository; `lora.pt` is a common "
        "name, so give it a subfolder if you have another one.",
        bullets("What to change", "**Prompt**: something that can go on for half a minute.",
                "**Length**: up to 4 min 15 s. Beyond, set *system* in both places to `longlive-infinity`.",
                "**Forcing Plan View** draws what every block sees, without sampling: select it and press the play "
                "button above it."),
        bullets("Memory", f"KV store {store(preset, 120)} for any length, besides about 2.8 GB of weights.",
                "The decoded video takes 2.3 GB of ordinary memory (4.8 MB a frame)."),
        licence(preset))
    clip = Clip(preset, note, 640, CYCLIST, lora_file=adapter).empty(30.0)
    clip.sampling()
    clip.by_preset()
    samples = clip.sample(clip.guider(), clip.noise(5))
    clip.plan_view("5  What every block sees")
    return clip.video(samples, "longlive")


def longlive_60s_prompts():
    preset = get("longlive")
    adapter = lora(preset)
    note = text(
        "LongLive: one minute, four prompts",
        f"{seconds(240)} in one go. **Forcing Prompt Track** holds the script: one line a prompt, with the second at which "
        "it takes over. At each change the memory of 12 latent frames is replayed once under the new prompt "
        "(*recache*), so that the action follows at once and the subject stays.",
        files_of(preset, adapter),
        "Base and LoRA belong together. Both come from the folder `models` of one repository; `lora.pt` is a common "
        "name, so give it a subfolder if you have another one.",
        bullets("What to change", "**script**: `seconds | prompt`, or `seconds | transition | prompt`. The last line fades in "
                "over 6 blocks (*soft 6*).",
                "**Every prompt** says the whole picture again, subject and style included: the network knows only the one "
                "that rules.",
                "**Length**: up to 4 min 15 s. Times past the end are refused."),
        bullets("Memory", f"KV store {store(preset, 240)} for any length, besides about 2.8 GB of weights.",
                "The decoded video takes 4.6 GB of ordinary memory (4.8 MB a frame)."),
        licence(preset))
    clip = Clip(preset, note, 680, lora_file=adapter)
    clip.prompts = [clip.add("ForcingPromptTrack", "Prompts", 460, clip=clip.clip, script=LANTERN, transition="recache")]
    return clip.empty(60.0).usual("longlive_prompts", 9)


def multi_scene_story():
    preset = get("longlive")
    adapter = lora(preset)
    note = text(
        "A story in four scenes",
        f"{seconds(81)} in one go, with a different kind of change at each of three times.",
        files_of(preset, adapter),
        bullets("The changes", "5 s, *flush*: the same man does something else. Only the sink and the newest two latent "
                "frames stay in memory.",
                "10 s, *cut*: another place, nothing of the old scene is left. The boat's first frames become the sink of "
                "the new scene.",
                "15 s, *recache*: the same boat, and the memory rewritten under the new prompt."),
        bullets("What to change", "**Prompts**: each is one scene and says all of it.",
                "**More scenes**: copy a Forcing Prompt Segment, connect it to the last one, and the last one to the guider.",
                "*jump* keeps the subject but leaves the place. It needs relative positions: set *system* in both places to "
                "`longlive-infinity`."),
        bullets("Memory", f"KV store {store(preset, 81)} for any length, besides about 2.8 GB of weights."),
        licence(preset))
    clip = Clip(preset, note, 680, *SCENES, lora_file=adapter).empty(20.0)
    clip.group("3  Scenes", PROMPTS)
    clip.column(320)
    told = clip.prompts[0]
    for number, (start, transition) in enumerate(CHANGES, 1):
        told = clip.add("ForcingPromptSegment", f"Scene {number + 1}", previous=told, conditioning=clip.prompts[number],
                        start=start, transition=transition)
    clip.prompts = [told]
    return clip.usual("story", 10, "4  Sampling", "5  Video")


def rolling_forcing_30s():
    preset = get("rolling-forcing")
    note = text(
        "Rolling Forcing: 30 seconds",
        f"{seconds(120)} in one go. Five blocks of 3 latent frames are denoised together, the newest with the most noise; "
        "with every step the first of them is finished and a new one comes in. So errors are corrected by what follows, "
        "and the picture holds for minutes.",
        files_of(preset),
        bullets("What to change", "**Prompt**: something that can go on for half a minute. Prompts that change need the "
                "transition *keep*.",
                "**Length**: no limit. The cache counts positions from a later frame where the published table ends.",
                "**Forcing Plan View** draws what every window of blocks sees, without sampling.", MATCH),
        bullets("Memory", f"KV store {store(preset, 120)} for any length, besides about 2.8 GB of weights.",
                "The decoded video takes 2.3 GB of ordinary memory (4.8 MB a frame)."),
        licence(preset))
    clip = Clip(preset, note, 600, BALLOON).empty(30.0)
    clip.sampling()
    clip.by_preset()
    samples = clip.sample(clip.guider(), clip.noise(11))
    clip.plan_view("5  What every window sees")
    return clip.video(samples, "rolling_forcing")


def reward_forcing_60s():
    preset = get("reward-forcing")
    note = text(
        "Reward Forcing: one minute",
        f"{seconds(240)} in one go, with a small window: 9 latent frames, 3 of them a sink that takes up, little by "
        "little, what leaves the window (*EMA sink*). So the memory is small, and motion does not die down.",
        files_of(preset),
        bullets("What to change", "**Prompt**: lively motion is what this model is for.",
                "**Length**: no limit, positions are counted inside the window.",
                "**alpha**: connect Forcing Cache with *ema_sink* to **cache** of Forcing Preset. 0.999 is published; less "
                "follows the video faster. In bf16 a sink with 0.999 hardly moves, *sink_dtype* `float32` lets it.", MATCH),
        bullets("Memory", f"KV store {store(preset, 240)} for any length, besides about 2.8 GB of weights.",
                "The decoded video takes 4.6 GB of ordinary memory (4.8 MB a frame)."),
        licence(preset))
    return Clip(preset, note, 600, SURFER).empty(60.0).usual("reward_forcing", 12)


def deep_forcing_60s():
    preset = get("deep-forcing")
    note = text(
        "Deep Forcing: one minute with Self Forcing's weights",
        f"{seconds(240)} in one go, without further training: only the memory differs. A large sink of 10 latent frames "
        "moves along in time, and of all the past between it and the newest frames those tokens are kept which the "
        "newest frames look at most.",
        files_of(preset),
        bullets("What to change", "**Prompt**: one scene that can go on for a minute.",
                "**Length**: no limit. The cache counts positions from a later frame where the published table ends.",
                "**Memory policy**: *compare_long_self_forcing* shows others with the same weights.", MATCH),
        bullets("Memory", f"KV store {store(preset, 240)} for any length, besides about 2.8 GB of weights. Less: connect "
                f"Forcing Cache with *deep_compress* and *compact* "
                f"({store(preset, 240, cache=DeepCompressOptions(positions='rebased', compact=True))}), or a smaller size.",
                "The decoded video takes 4.6 GB of ordinary memory (4.8 MB a frame)."),
        licence(preset))
    return Clip(preset, note, 620, TRAIN).empty(60.0).usual("deep_forcing", 13)


def compare_long_self_forcing():
    preset = get("self-forcing")
    sizes = (f"*{label}*: {what} Store {store(preset, 60, cache=COMPARED[label])}." for label, what in (
        ("Window", "the newest 12 latent frames and nothing else."),
        ("Window and sink", "12, the first 3 of the video always among them."),
        ("Deep Forcing", "a moving sink of 10, and the tokens that are looked at most."),
        ("TempCache", "old tokens that say the same are merged.")))
    note = text(
        "Self Forcing beyond 5 s: four memories",
        f"The same weights, prompt and noise, four times {seconds(60)}. The videos begin alike and part where their "
        "memories differ: this checkpoint was trained for 5 s, and what it may look back at decides how it drifts.",
        files_of(preset),
        bullets("The columns", *sizes),
        bullets("What to change", "**Fewer**: mute the Save Video of a column (Ctrl+M). They run one after another, so only "
                "the largest store has to fit.",
                "**More**: copy a column with its wires (Ctrl+C, Ctrl+Shift+V), and choose another *policy* in its Forcing "
                "Cache.",
                "**Seed** is fixed, so a change in one column runs that column only.",
                "**Length**: raise it to see more drift."),
        bullets("Memory", "The largest store, besides about 2.8 GB of weights.",
                "The decoded videos take 4.5 GB of ordinary memory (4.8 MB a frame)."),
        licence(preset))
    return Clip(preset, note, 740, HORSE).empty(15.0).compared(COMPARED, "compare", 14)


def extend_video():
    preset = get("self-forcing")
    note = text(
        "Extend a video",
        f"A first clip of 5 s, then 5 s more that go on from its latents with a second prompt: {seconds(42)}. "
        "Nothing is decoded and encoded again at the joint; the video is decoded once, at the end.",
        files_of(preset),
        bullets("How it works", "**Forcing Cache** lets each block see 12 latent frames, always with the first 3 of "
                "the video among them. Without it Self Forcing drifts after 5 s.",
                "**Forcing Extend** puts the finished latents in front of new empty ones. The second sampler fills the "
                "store from them under its own prompt."),
        bullets("What to change", "**Seeds**: the first is fixed, so that only the second part is made again while you "
                "try prompts. Keep the two seeds different.",
                "**Prompt 2**: repeat subject and style of prompt 1, change the action.",
                "**More parts**: copy group 4, and connect its Forcing Extend to the sampler before."),
        bullets("Memory", f"KV store {store(preset, 42, cache=LONG)} at this size, besides about 2.8 GB of weights. "
                "*compact* in Forcing Cache saves a third."),
        licence(preset))
    clip = Clip(preset, note, 680, HARBOUR, OPEN_SEA).empty()
    clip.sampling("3  First clip")
    cache = clip.add("ForcingCache", **widgets(LONG))
    clip.by_preset(cache=cache)
    first = clip.sample(clip.guider(0), clip.noise(6, "fixed"), title="Sample the first clip")
    clip.sampling("4  Second clip", below=True)
    longer = clip.add("ForcingExtend", context=first, length=5.0, unit="seconds", block=preset.block)
    second = clip.sample(clip.guider(1), clip.noise(7), longer, "Sample the second clip")
    return clip.video(second, "extended", "5  Video")


EXAMPLES = (longlive_30s, longlive_60s_prompts, multi_scene_story, rolling_forcing_30s, reward_forcing_60s, deep_forcing_60s,
            compare_long_self_forcing, extend_video)
