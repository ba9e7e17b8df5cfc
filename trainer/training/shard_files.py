"""Indexes and facts of shards, built before a data set is opened: each rank builds its share, and all use them."""

import os
import time

from data.caption_source import CaptionSource
from data.errors import DataError
from data.gathered_file import was_gathered
from data.selected_rows import facts_wanted
from data.shard_facts import load_facts
from data.shard_index import load_index
from data.shard_patterns import entries_of, expand
from data.sources import names_prompts
from data.url_patterns import is_url
from trainer.distributed.logs import duration, log
from trainer.distributed.world import first_problem
from trainer.training.run import Run

LINE_SECONDS = 10.0  # between progress lines


def prepare_shards(run: Run, split: str) -> None:
    """Builds the indexes and facts that the shards of `data.train` or `data.heldout` lack. Every rank must call it. Shards in a
    folder that cannot be written are left out: each rank reads these as it needs them. Raises DataError on all ranks."""
    data, problem = run.settings.data, None
    entries, setting = entries_of(getattr(data, split)), f"data.{split}"
    if names_prompts(entries, setting) or any(map(is_url, entries)):
        return
    paths = expand(entries, setting)
    writable = {folder: os.access(folder, os.W_OK) for folder in {path.parent for path in paths}}
    wanted = facts_wanted(data.selection, data.image_keys, CaptionSource.of(data.caption_key, data.caption_field))
    lacking = [] if was_gathered(paths, wanted) else [path for path in paths if writable[path.parent]]
    mine = lacking[run.world.rank :: run.world.size]
    began = shown = time.monotonic()
    try:
        for done, path in enumerate(mine, 1):
            index = load_index(path)
            if wanted and len(index):
                load_facts(index, wanted)
            if time.monotonic() - shown > LINE_SECONDS:
                shown = time.monotonic()
                left = duration((shown - began) / done * (len(mine) - done))
                log.info(
                    f"data.{split}: rank {run.world.rank} has read {done} of its {len(mine)} shards' headers, {left} left"
                )
    except DataError as error:
        problem = str(error)
    if problem := first_problem(problem, run.world):
        raise DataError(problem)
