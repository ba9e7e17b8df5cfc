"""Encoding on two nodes and as an array of jobs: the shards of a single process, byte for byte."""

from conftest import SCRIPTS, TWO_NODES

SHARDS = ("shards/digits/train-*.tar", "--pipeline", "runs/tiny/pipeline", "--resolution", "8", "--text")
OPTIONS = (*SHARDS, "--buckets", "8x8,8x16", "--filter", "class != 3", "--batch", "64")


def submit(site, *words: str) -> str:
    return site.call("sbatch", "--parsable", *TWO_NODES, *words).strip()


def test_two_nodes_and_an_array_encode_as_one_process(site):
    script = str(SCRIPTS / "encode.sh")
    nodes = submit(site, "--array=0", script, *OPTIONS, "--out", "shards/nodes")
    array = submit(site, "--array=2-3", script, *OPTIONS, "--out", "shards/array")
    site.verb("shards", "--encode", *OPTIONS, "--out", "shards/alone")
    log = site.ends(f"{nodes}_0", "COMPLETED")
    assert "rank 0: " in log and "rank 1: " in log and "part 0/1" in log
    logs = [site.ends(f"{array}_{number}", "COMPLETED") for number in (2, 3)]
    assert "part 0/2" in logs[0] and "part 1/2" in logs[1]
    alone = sorted((site.folder / "shards/alone").glob("*.tar"))
    assert len(alone) > 2
    for name in ("nodes", "array"):
        for tar in alone:
            assert (site.folder / "shards" / name / tar.name).read_bytes() == tar.read_bytes()


def test_a_mistake_ends_the_job(site):
    """At once, though srun kills the other rank and reports its code, and with the mistake in the last line."""
    job = submit(site, "--array=0", str(SCRIPTS / "encode.sh"), "shards/none", "--pipeline", "runs/tiny/pipeline",
                 "--resolution", "8", "--out", "shards/x")  # fmt: skip
    log = site.ends(f"{job}_0", "FAILED")
    assert "(shards): " in site.last_line(f"{job}_0") and "shards/none does not exist" in site.last_line(f"{job}_0")
    assert log.count(" ranks x ") == 1 and not list(site.folder.glob(".disback-*"))
