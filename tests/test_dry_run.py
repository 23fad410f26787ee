"""`--dry-run` reads all data, reports, and writes nothing."""

from helpers import (
    EPOCHS,
    checkpoint_folder,
    checkpoint_name,
    copy_with,
    environment,
    in_make_test,
    run,
    save_images,
)


def contents(folder):
    """Return the content of all files below a folder, by path."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@in_make_test("pytorch", "xgboost")
def test_a_dry_run_reports_and_writes_nothing(framework, tmp_path, uninterrupted):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    finished = uninterrupted(framework)
    before = contents(finished)
    flags = ["--dry-run", "--epochs", 5, "--keep-checkpoints", 2]
    result = run(framework, *flags, cwd=finished, env=environment(TMPDIR=str(temporary)))
    assert contents(finished) == before
    assert not list(temporary.glob("dry-run-*"))
    assert " s for 5\n" in result.output
    assert "Dry run: a checkpoint takes " in result.output
    assert "--keep-checkpoints keeps 2 epochs" in result.output
    assert result.last_line.endswith(f"output/{framework}/model, output/{framework}/data")
    folder = checkpoint_folder(finished, framework).relative_to(finished)
    newest = checkpoint_name(framework, EPOCHS[framework])
    assert f"{folder} contains {newest}, from which a training would resume" in result.output
    assert not result.epochs


def test_a_dry_run_lists_every_bad_image(tmp_path, digits):
    save_images(tmp_path / "train", *digits)
    for name in ("class-3/3.png", "class-5/5.png", "class-5/15.png"):
        (tmp_path / "train" / name).write_bytes(b"no image")
    result = run("pytorch", "--dry-run", "--train", "train", cwd=tmp_path, code=1)
    for name in ("class-3/3.png", "class-5/5.png", "class-5/15.png"):
        assert result.output.count(f"cannot read the image train/{name}: it is not an image") == 1
    assert "of 270 training samples cannot be read, see above" in result.error_line
    assert not (tmp_path / "output").exists()


SQUARES = """
def load_data(args):
    return Squares(), Squares()

class Squares:
    classes = ["a", "b"]

    def __len__(self):
        return 500

    def __getitem__(self, index):
        if index == 400:
            raise ValueError("no such square")
        return np.full((8, 8, 1), index % 200, np.uint8), index % 2
"""


def test_a_dry_run_reads_a_custom_data_set(tmp_path):
    script = copy_with(tmp_path / "job", "pytorch", SQUARES, "import numpy as np")
    result = run(script, "--dry-run", cwd=tmp_path, code=1)
    assert "sample 400 of the training data set: ValueError: no such square" in result.output
    assert "1 of 500 training samples cannot be read" in result.error_line
