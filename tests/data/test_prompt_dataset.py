"""Prompts alone: the order, the rejects and the refusals of a training set without images."""

import pickle
from itertools import islice

import pytest

from data.errors import DataError
from data.loader import Batches
from data.prompt_dataset import PromptDataset
from data.sampling_order import BatchSplit
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.sources import encoding_of_training, open_dataset

LINES = [f"caption {i}" for i in range(20)]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES))
    return file


def test_the_order_is_that_of_as_many_shard_samples(prompts, shards):
    mine = PromptDataset([prompts], ["caption"], seed=4)
    theirs = ShardDataset(shards(20), 8, ["caption"], seed=4)
    for position in range(45):  # into the third epoch
        row = int(theirs[position]["caption"][1:])
        assert mine[position]["caption"] == LINES[row] and mine[position]["position"] == position


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_exactly(prompts, workers):
    def steps(start, n):
        batches = Batches(PromptDataset([prompts], ["caption"], 4), BatchSplit(2, 3), 1, start, workers)
        found = [batch.captions for batch in islice(batches, n)]
        batches.close()
        return found

    assert steps(0, 9)[5:] == steps(5, 4)
    batch = next(iter(Batches(PromptDataset([prompts], ["caption"]), BatchSplit(1, 4), 0)))
    assert batch.images is None and batch.crops is None and batch.cached == {} and len(batch.index) == 4


def test_every_format_and_several_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "x": 1}\n"two"\n{"text": " "}\n')
    (tmp_path / "b.csv").write_text('id,caption\n1,"three, four"\n2,\n')
    (tmp_path / "c.tsv").write_text('caption\tx\n"five"\t1\n')
    data = DataSettings(train=[str(tmp_path / "a.jsonl"), str(tmp_path / "{b.csv,c.tsv}")])
    dataset = open_dataset(data, "train", ["caption"], 0)
    assert sorted(dataset[i]["caption"] for i in range(4)) == ['"five"', "one", "three, four", "two"]
    assert len(dataset) == 4 and dataset.rejected == {"empty caption": 2} and encoding_of_training(data) is None


def test_what_is_refused(prompts, shards, tmp_path):
    for want, what in (("image", "needs images"), ("latents", "needs latents of images")):
        with pytest.raises(DataError, match=f"{what} .*gan.enabled=false"):
            PromptDataset([prompts], ["caption", want])
    mixed = DataSettings(train=[str(prompts), str(shards(4)[0])])
    with pytest.raises(DataError, match="data.train mixes prompts alone"):
        open_dataset(mixed, "train", ["caption"], 0)
    (tmp_path / "empty.csv").write_text("caption\n \n")
    with pytest.raises(DataError, match="no usable caption .*empty caption"):
        PromptDataset([tmp_path / "empty.csv"], ["caption"])
    (tmp_path / "list.pkl").write_bytes(pickle.dumps(["a"]))
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):  # a pickle is no training set
        open_dataset(DataSettings(train=str(tmp_path / "list.pkl")), "train", ["caption"], 0)
