"""fetch: download the weights of a preset. The only part of the pack that uses the network, and only when called."""
from __future__ import annotations

import argparse
import errno
import shutil
from pathlib import Path

from ..errors import ForcingError
from ..presets import File, Preset, get

HELP = ("Download the weights of a preset from Hugging Face, after showing their size and licence. An interrupted "
        "download goes on where it stopped when the command is repeated.")

# What huggingface_hub raises, most specific first -> what to tell.
TROUBLE = (
    ("OfflineModeIsEnabled", "huggingface_hub is in offline mode. Unset HF_HUB_OFFLINE, or copy the file by hand."),
    ("LocalEntryNotFoundError", "the Hub cannot be reached. Check the connection and repeat the command: it goes on "
                                "where it stopped."),
    ("GatedRepoError", "the repository asks for consent. Accept its terms on its page, then log in with "
                       "`hf auth login`."),
    ("RepositoryNotFoundError", "there is no such public repository. Look for its new name in the code repository."),
    ("EntryNotFoundError", "the repository has no such file any more. Look at its file list and choose with --file."),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", help="name of a preset; see the command presets")
    parser.add_argument("--dir", type=Path, default=Path("models"), metavar="DIR",
                        help="folder for the files, one subfolder a repository (default: models)")
    parser.add_argument("--file", metavar="PATH", help="take this one of the preset's files instead of the usual ones")
    parser.add_argument("--accept-licence", action="store_true", help="I have read the licence and keep to it")


def run(args: argparse.Namespace) -> int:
    preset = get(args.preset)
    files = _wanted(preset, args.file)
    for file in files:
        print(f"{file.repo}/{file.path}: {_size(file)}")
    print(f"Licence: {preset.licence}. Card: https://huggingface.co/{files[0].repo}")
    if preset.restrictions:
        print(f"Restriction: {preset.restrictions}.")
        if not args.accept_licence:
            raise ForcingError(f"The weights of {preset.name} are restricted ({preset.restrictions}). "
                               "Read the card, then repeat the command with --accept-licence.")
    _check_space(files, args.dir)
    for file in files:
        print(f"Saved {download(file, args.dir)}")
    return 0


def download(file: File, folder: Path) -> Path:
    """Fetch one file to folder/<repository>/<path>, resuming a partial download; raises ForcingError."""
    try:
        from huggingface_hub import errors, hf_hub_download
    except ModuleNotFoundError as error:
        raise ForcingError("Downloading needs huggingface-hub. Install it with `pip install huggingface-hub`, "
                           f"or fetch https://huggingface.co/{file.repo} by hand.") from error
    try:
        return Path(hf_hub_download(file.repo, file.path, local_dir=folder / file.repo.split("/")[-1]))
    except Exception as error:  # the download stack (hub, HTTP client, xet) has no common error type
        raise ForcingError(f"{file.repo}/{file.path} was not downloaded: {_why(error, errors)}") from error


def _wanted(preset: Preset, path: str | None) -> tuple[File, ...]:
    known = (*preset.files, *((preset.lora,) if preset.lora else ()))
    if not any(file.path for file in known):
        raise ForcingError(f"No single weights file of {preset.name} is known. {preset.notes}")
    if path is None:
        return preset.files[:1] + ((preset.lora,) if preset.lora else ())
    chosen = tuple(file for file in known if path in (file.path, Path(file.path).name))
    if not chosen:
        raise ForcingError(f"{preset.name} has no file {path!r}. Choose one of {', '.join(f.path for f in known)}.")
    return chosen


def _check_space(files: tuple[File, ...], folder: Path) -> None:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    needed, free = sum(file.bytes or 0 for file in files), shutil.disk_usage(existing).free
    if needed > free:
        raise ForcingError(f"{_gigabytes(needed)} are needed in {folder}, but only {_gigabytes(free)} are free. "
                           "Free some space, or choose another folder with --dir.")


def _size(file: File) -> str:
    return "size not published" if file.bytes is None else f"about {_gigabytes(file.bytes)}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _why(error: Exception, errors) -> str:
    for name, text in TROUBLE:
        kind = getattr(errors, name, None)
        if kind is not None and isinstance(error, kind):
            return text
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full. Free some space, or choose another folder with --dir, and repeat the command."
    return f"{type(error).__name__}: {error}. Repeat the command: it goes on where it stopped."
