"""Training with text: categories and class names in checkpoints, models and predictions."""

import csv
import json
import re
import shutil
import sys

import numpy as np
import pytest

from helpers import (
    ROOT,
    TABLE_WRITERS,
    assert_same_bits,
    checkpoint_folder,
    finish,
    history,
    metrics,
    run_many,
    run_python,
    start_command,
    train_together,
)

pytestmark = pytest.mark.quick

ROUNDS = 6


def write_shops(folder, colors=("blue", "green", "red"), first=0, rows=300):
    """Write a table with text whose label, the last column, depends on text and numbers."""
    generator = np.random.default_rng(first)
    folder.mkdir(parents=True)
    with open(folder / "shops.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["", "name", "color", "open", "size[m]", "kind"])
        for number in range(first, first + rows):
            color, size = generator.choice(colors), generator.normal()
            kind = ["kiosk", "market", "store"][int(size > 0.5) + int(color == "red")]
            is_open = generator.choice(["TRUE", "FALSE", "NA"])
            writer.writerow([number, f"Shop {number}; Inc.", color, is_open, f"{size:.3f}", kind])


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """Return a folder with trainings on a table with text, and their results by name."""
    folder = tmp_path_factory.mktemp("shops")
    write_shops(folder / "train")
    write_shops(folder / "validation", first=1000, colors=("blue", "pink", "red"), rows=100)
    write_shops(folder / "other", colors=("azure", "green", "red"))
    data = ["--train", folder / "train", "--validation", folder / "validation", "--label-column", "kind"]
    other = ["--train", folder / "other", *data[2:]]
    jobs = {
        "whole": ("whole", [*data, "--num-round", ROUNDS]),
        "first part": ("parts", [*data, "--num-round", 2]),
        "second part": ("parts", [*data, "--num-round", ROUNDS]),
        "other data": ("parts", [*other, "--num-round", ROUNDS + 1]),
        "on the disk": ("disk", [*data, "--num-round", ROUNDS, "--external-memory"]),
        "approx": ("approx", [*data, "--num-round", ROUNDS, "--tree-method", "approx"]),
        "exact": ("exact", [*data, "--num-round", ROUNDS, "--tree-method", "exact"]),
        "dart": ("dart", [*data, "--num-round", ROUNDS, "--booster", "dart", "--max-cat-to-onehot", 1]),
    }
    paths = {name: folder / place for name, (place, _) in jobs.items()}
    for path in paths.values():
        path.mkdir(exist_ok=True)
    results = run_many("xgboost", [(paths[name], words) for name, (_, words) in jobs.items()], cwd=folder)
    return folder, dict(zip(jobs, results))


def test_a_table_with_text_trains_and_the_log_describes_its_columns(shops):
    _, results = shops
    log = results["whole"].output
    for line in (
        "Files: 2, CSV with semicolons and a header; features: 1 with numbers, 2 with categories: color (3), "
        "open (2)",
        "Left out of the features: Unnamed: 0 (row numbers), name (300 different texts in 300 rows, such as "
        "'Shop 0; Inc.')",
        "Renamed, as XGBoost allows no [, ] and <: size[m] to size(m)",
        "Training: objective=multi:softprob num_class=3 eval_metric=['mlogloss', 'merror']",
    ):
        assert f"{line}\n" in log
    assert (
        "Missing values instead of 33 texts of --validation that no training row has: color 'pink' (33)"
        in log
    )
    assert re.search(r"^Label: kind \(kiosk \d+, market \d+, store \d+\)$", log, re.MULTILINE)
    for name in ("whole", "on the disk", "approx", "dart"):
        assert results[name].metric("train_accuracy") > 0.97, name
    assert "exact has no splits for the text in color, open: use hist" in results["exact"].error_line


def test_an_interrupted_training_with_text_is_bit_identical(shops):
    folder, results = shops
    assert "Resuming training from xgboost-checkpoint.1\n" in results["second part"].output
    assert_same_bits(folder / "whole", folder / "parts", "xgboost")


def test_other_categories_are_another_job(shops):
    _, results = shops
    assert results["other data"].code == 1
    line = results["other data"].error_line
    assert "another job: categories was those of color, open with the checksum" in line


def model_facts(model):
    return json.loads((model / "code/model.json").read_text())


def test_any_checkpoint_is_exported_with_its_categories_without_the_data(shops, tmp_path):
    folder, _ = shops
    model = folder / "whole/output/xgboost/model"
    checkpoint = checkpoint_folder(folder / "whole", "xgboost") / f"xgboost-checkpoint.{ROUNDS - 1}"
    shutil.copy(checkpoint, tmp_path)
    words = [ROOT / "xgboost/train.py", tmp_path / checkpoint.name, tmp_path / "exported"]
    finish(start_command([sys.executable, "-m", "common.export", *map(str, words)], ROOT))
    exported = tmp_path / "exported/model"
    assert (exported / "xgboost-model").read_bytes() == (model / "xgboost-model").read_bytes()
    facts = model_facts(model)
    for name in ("categories", "class_names", "column_names", "column_types"):
        assert model_facts(exported)[name] == facts[name]
    assert facts["categories"] == {"color": ["blue", "green", "red"], "open": ["FALSE", "TRUE"]}
    assert facts["class_names"] == ["kiosk", "market", "store"]
    assert facts["column_names"] == ["color", "open", "size(m)"]
    assert facts["column_types"] == ["c", "c", "float"]


REQUESTS = """
import json, sys
import inference
model = inference.model_fn(sys.argv[1])
def answer(body, kind="application/json"):
    body = body if kind == "text/csv" else json.dumps(body)
    return inference.predict_fn(inference.input_fn(body, kind), model)
def refusal(*request):
    try:
        answer(*request)
    except Exception as error:
        return [error.status_code, str(error)]
row = {"color": "red", "open": "TRUE", "size[m]": 0.7, "name": "not used"}
print(json.dumps({
    "one": answer([row]),
    "same": [
        answer({"instances": [{**row, "open": True}]}),
        answer([{"size(m)": "0,7", "open": "TRUE", "color": " red "}]),
        answer([["red", "TRUE", 0.7]]),
        answer(["red", "TRUE", 0.7]),
        answer("red,TRUE,0.7", "text/csv"),
        answer("name;size[m];open;color\\n;0,7;TRUE;red", "text/csv"),
    ],
    "missing": [answer([[color, None, 0.7]]) for color in ("pink", None, "NA")],
    "bad": [
        refusal([{"color": "red"}]),
        refusal("red,TRUE", "text/csv"),
        refusal([["red", "TRUE", "large"]]),
        refusal([["red", "TRUE", 1e39]]),
        refusal([]),
    ],
}))
"""


def test_requests_with_text(shops):
    folder, _ = shops
    model = folder / "whole/output/xgboost/model"
    result = run_python(REQUESTS, model, cwd=model / "code")
    seen = json.loads(result.last_line)
    assert seen["one"][0]["class_name"] == "store"
    assert seen["same"] == [seen["one"]] * 6
    assert seen["missing"][0] == seen["missing"][1] == seen["missing"][2] != seen["one"]
    assert "warning: 1 values of the column color, such as 'pink', count as missing" in result.errors
    assert [status for status, _ in seen["bad"]] == [400] * 5
    expected = [
        "no column open, size(m)",
        "a row of 2",
        "'large': expected a number",
        "infinite",
        "shape (0, 3)",
    ]
    assert all(part in text for part, (_, text) in zip(expected, seen["bad"])), seen["bad"]


def test_the_exported_code_predicts_a_file_with_the_training_accuracy(shops, tmp_path):
    folder, _ = shops
    path = folder / "validation/shops.csv"
    script = folder / "whole/output/xgboost/model/code/inference.py"
    finish(start_command([sys.executable, str(script), str(path)], tmp_path))
    with open(path) as labels, open(tmp_path / "predictions.csv") as predictions:
        names = [row["kind"] for row in csv.DictReader(labels, delimiter=";")]
        predicted = [row["class_name"] for row in csv.DictReader(predictions)]
    accuracy = np.mean([name == other for name, other in zip(names, predicted)])
    assert len(names) == len(predicted) == 100
    assert accuracy == pytest.approx(metrics(folder / "whole", "xgboost")["validation_accuracy"], abs=1e-7)


def test_several_workers_agree_on_categories_and_classes(shops, tmp_path):
    folder, results = shops
    data = ["--train", folder / "train", "--validation", folder / "validation", "--label-column", "kind"]
    result = train_together("xgboost", 2, *data, "--num-round", ROUNDS, folder=tmp_path)
    assert result.metric("validation_accuracy") == pytest.approx(
        results["whole"].metric("validation_accuracy"), abs=0.05
    )
    facts = model_facts(tmp_path / "1/output/xgboost/model")
    assert facts["categories"] == model_facts(folder / "whole/output/xgboost/model")["categories"]


# SageMaker's built-in algorithm -----------------------------------------------------------------------------

CONTAINER = """
import sys
import numpy as np
import xgboost
rows = np.load(sys.argv[1])
for number, path in enumerate(sys.argv[2:]):
    weights = rows[:, 1] if "weights" in path else None
    features = rows[:, 2:] if "weights" in path else rows[:, 1:]
    matrix = xgboost.DMatrix(features, rows[:, 0], weight=weights)
    params = {"objective": "binary:logistic", "eval_metric": "logloss"}
    results = {}
    options = {"evals": [(matrix, "train")], "evals_result": results, "verbose_eval": False}
    booster = xgboost.train(params, matrix, 5, **options)
    open(f"{path}/xgboost-checkpoint.2", "wb").write(booster[:3].save_raw("ubj"))
    open(f"{path}/expected", "w").write(str(results["train"]["logloss"][-1]))
"""


def test_a_job_of_the_built_in_algorithm_resumes_with_each_file_format(tmp_path):
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(200, 6)).round(2).astype(np.float32)
    rows[rows == 0] = 0.01  # LIBSVM has no zeros
    rows[:, 1] = np.where(rows[:, 2] > 0, 3, 0.5)  # the weights
    rows[:, 0] = rows[:, 3] + generator.normal(size=200) > 0
    np.save(tmp_path / "rows.npy", rows)
    names = {"csv": "csv", "libsvm": "libsvm", "parquet": "parquet", "weights": "csv"}
    jobs = []
    for name, suffix in names.items():
        TABLE_WRITERS[suffix](tmp_path / name / f"train/rows.{suffix}", rows)
        checkpoint_folder(tmp_path / name, "xgboost").mkdir(parents=True)
        words = [
            "--train",
            "train",
            "--validation",
            "train",
            "--num_round",
            5,
            "--objective",
            "binary:logistic",
        ]
        jobs.append((tmp_path / name, [*words, *(["--csv_weights", 1] if name == "weights" else [])]))
    folders = [checkpoint_folder(tmp_path / name, "xgboost") for name in names]
    run_python(CONTAINER, tmp_path / "rows.npy", *folders, cwd=tmp_path)
    for name, result in zip(names, run_many("xgboost", jobs, cwd=tmp_path)):
        assert "Resuming training from xgboost-checkpoint.2\n" in result.output, result.errors
        assert result.epochs == [4, 5]
        expected = float((checkpoint_folder(tmp_path / name, "xgboost") / "expected").read_text())
        last = float(history(tmp_path / name, "xgboost")[-1]["train_loss"])
        assert last == pytest.approx(expected, abs=1e-5), name
