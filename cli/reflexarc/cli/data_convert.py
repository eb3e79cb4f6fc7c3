"""``reflexarc data convert``: LIBERO's HDF5 files to LeRobot v3.0, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from reflexarc.data.lerobot.encoding import CodecName

_CODECS = ("h264", "av1", "lossless")
_ALIGNMENTS = ("before_action", "after_action")


@data_app.command()
def convert(
    paths: Annotated[
        list[Path], typer.Argument(help="HDF5 files or folders of them; or one LeRobot folder.")
    ],
    output: Annotated[Path, typer.Option(help="New folder; it appears when it is whole.")],
    codec: Annotated[str, typer.Option(help=f"Of the videos: {', '.join(_CODECS)}.")] = "h264",
    quality: Annotated[
        int | None, typer.Option(help="Constant rate factor, less is better (h264 18, av1 24).")
    ] = None,
    alignment: Annotated[
        str, typer.Option(help=f"For files that cannot be recognised: {' or '.join(_ALIGNMENTS)}.")
    ] = "",
) -> None:
    """HDF5 files become a LeRobot v3.0 dataset; such a dataset becomes HDF5 files again.

    Arrays stay exactly what they are. Images pass through the codec; the error over all of them
    is measured, printed and written into the dataset. Run the same command again after an
    interruption: whole task files are kept.
    """
    require("reflexarc data convert", "train", "h5py", "tqdm", "pyarrow", "av")
    from tqdm import tqdm

    from reflexarc.data.lerobot.dataset import is_lerobot
    from reflexarc.data.lerobot.encoding import Codec
    from reflexarc.data.lerobot.to_lerobot import convert_to_lerobot
    from reflexarc.data.lerobot.to_libero import convert_to_libero

    folders = [path for path in paths if is_lerobot(path)]
    if folders and len(paths) > 1:
        raise ConfigError("convert one LeRobot folder at a time, and no HDF5 files with it")
    if codec not in _CODECS:
        raise ConfigError(f"--codec {codec!r}: give one of {', '.join(_CODECS)}")
    if alignment and alignment not in _ALIGNMENTS:
        raise ConfigError(f"--alignment {alignment!r}: give one of {', '.join(_ALIGNMENTS)}")
    with tqdm(total=_count(paths, folders), unit="demo", disable=None) as progress:

        def advance(name: str) -> None:
            progress.set_postfix_str(Path(name).name, refresh=False)
            progress.update()

        if folders:
            convert_to_libero(folders[0], output, on_demo=advance)
            typer.echo(f"Written: {output}")
            return
        error = convert_to_lerobot(
            paths,
            output,
            codec=Codec(cast("CodecName", codec), quality),
            alignment=cast("Literal['before_action', 'after_action'] | None", alignment or None),
            on_demo=advance,
        )
    typer.echo(f"Written: {output}")
    typer.echo(
        f"Images: {error.images}; mean error {error.mean:.3f} of 255, of the worst image "
        f"{error.largest_mean:.3f}, of one value {error.largest}"
    )


def _count(paths: list[Path], folders: list[Path]) -> int:
    from reflexarc.data.inspection import count_demos
    from reflexarc.data.lerobot.info import read_info

    return (read_info(folders[0]).total_episodes or 0) if folders else count_demos(paths)
