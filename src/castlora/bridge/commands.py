"""What the commands of bridges do; everything heavy is imported when one runs."""

from collections.abc import Callable

from castlora.config import Role


def _fit(
    source: str,
    target: str,
    out: str,
    text: str | None = None,
    roles: list[Role] | None = None,
    passages: int = 4096,
    max_length: int | None = None,
    places: int = 100_000,
    ridge: float = 0.1,
    seed: int = 0,
    shard: str | None = None,
    low_memory: bool = False,
    sharded: bool = False,
) -> None:
    """Fits a bridge: maps between two related models that then carry any number of adapters, each in seconds.

    The same command continues a run that was interrupted.

    Args:
        source: folder or hub id of the model that adapters were trained on
        target: folder or hub id of the model that they are to serve, such as the next version of the source
        out: folder to write, new or empty
        text: general text: .txt or .jsonl, gzipped or not, or a hub data set; by default allenai/c4
        roles: of the modules that get maps, as '["q","v"]'; by default all. Maps grow with the square of the width
        passages: how much text is read
        max_length: tokens per passage; by default as many as both models read, up to 256
        places: of the text where both models end a token, how many the maps are solved from, about; several times the
            width of the widest module
        ridge: penalty of the regression relative to the mean square of the activations
        seed: of the draw of the text
        shard: 3/8 reads the third of eight shares of the text and writes its statistics, for castlora merge-stats
        low_memory: whether an accelerator holds one of the models at a time
        sharded: whether each of the processes that torchrun started keeps a part of both models' layers (FSDP2)
    """
    from transformers.utils.logging import disable_progress_bar

    from castlora.bridge.fit import fit as run

    disable_progress_bar()
    run(source, target, out, text, roles, passages, max_length, places, ridge, seed, shard, low_memory, sharded)


def _merge_stats(shards: list[str], out: str) -> None:
    """Adds the statistics of all shards of a text and solves the bridge from the sums; no model is loaded.

    Args:
        shards: folders that castlora fit --shard wrote
        out: folder of the bridge to write, new or empty
    """
    from castlora.bridge.fit import merge_statistics as run

    run(shards, out)


def _sketch(
    model: str,
    out: str,
    text: str | None = None,
    roles: list[Role] | None = None,
    passages: int = 4096,
    passage_bytes: int = 1024,
    places: int = 32768,
    seed: int = 0,
    sharded: bool = False,
) -> None:
    """Keeps what one model computes at places of a text, so that castlora join can make bridges between any two.

    The same command continues a run that was interrupted.

    Args:
        model: folder or hub id
        out: folder to write, new or empty
        text: general text: .txt or .jsonl, gzipped or not, or a hub data set; by default allenai/c4
        roles: of the modules that are read, as '["q","v"]'; by default all
        passages: how much text is read
        passage_bytes: bytes of a passage, at most; what exceeds the context of the model is not read
        places: how many places are kept, about; several times the width of the model
        seed: of the draw of the text and of the places
        sharded: whether each of the processes that torchrun started keeps a part of the model's layers (FSDP2)
    """
    from transformers.utils.logging import disable_progress_bar

    from castlora.bridge.sketch import sketch as run

    disable_progress_bar()
    run(model, out, text, roles, passages, passage_bytes, places, seed, sharded)


def _join(source: str, target: str, out: str, ridge: float = 0.1) -> None:
    """Fits a bridge from the sketches of two models; neither model is loaded.

    The same command continues a run that was interrupted.

    Args:
        source: folder that castlora sketch wrote of the model that adapters were trained on
        target: the same of the model that they are to serve
        out: folder of the bridge to write, new or empty
        ridge: penalty of the regression relative to the mean square of the activations
    """
    from castlora.bridge.join import join as run

    run(source, target, out, ridge)


def _translate(bridge: str, adapter: list[str] | str, out: str, scale: float | None = None) -> None:
    """Carries adapters over a bridge; no model is loaded, and nothing is trained.

    The same command continues a run that was interrupted.

    Args:
        bridge: folder or hub id of what castlora fit wrote
        adapter: folder or hub id of a plain LoRA for its source; given several times, each one gets a folder in out
        out: folder to write, new or empty
        scale: of the update; by default 1.3 between related models, whose maps predict less than there is, else 1, as
            where a bridge before has scaled it
    """
    from castlora.bridge.cast_maps import translate as run

    run(bridge, [adapter] if isinstance(adapter, str) else adapter, out, scale)


BRIDGE_COMMANDS: dict[str, Callable[..., None]] = {
    "fit": _fit,
    "merge-stats": _merge_stats,
    "sketch": _sketch,
    "join": _join,
    "translate": _translate,
}
"""The commands by name."""
