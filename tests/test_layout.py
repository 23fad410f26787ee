"""The layout: four readable scripts with the same structure, and a `common/` without frameworks."""

import ast
import difflib
import io
import itertools
import re
import tokenize

import pytest

from common import flags
from helpers import FRAMEWORKS, IMAGE_FRAMEWORKS, ROOT, run_with

pytestmark = pytest.mark.quick

FUNCTIONS = [  # in this order, if present
    "parse_args",
    "load_data",
    "augment",
    "build_model",
    "build_optimizer",
    "learning_rate_factor",
    "compute_loss",
    "compute_metrics",
    "train_step",
    "evaluate",
    "train",
    "TrainingState",
    "export_model",
    "main",
]
IN_ALL = {"parse_args", "load_data", "train", "TrainingState", "export_model", "main"}
BANNERS = ["Make it yours", "Training", "The training state", "Main"]
LIBRARIES = {"tensorflow", "keras", "torch", "torchvision", "mxnet", "xgboost"}
SCRIPTS = [ROOT / framework / "train.py" for framework in FRAMEWORKS]
ENGINES = [ROOT / framework / "engine.py" for framework in FRAMEWORKS]
RECORDS = [ROOT / framework / "records.py" for framework in ("tensorflow", "mxnet")]
TF1 = ROOT / "tensorflow/train_tf1.py"
INFERENCE = [ROOT / framework / "inference.py" for framework in FRAMEWORKS]
COMMON = sorted(ROOT.glob("common/*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def source(framework):
    return (ROOT / framework / "train.py").read_text()


def definitions(framework):
    """Return the names of the functions and classes at the top level, in order."""
    body = ast.parse(source(framework)).body
    return [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


# The four scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_each_framework_folder_is_complete_and_does_not_shadow_the_library(name):
    folder = ROOT / name
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    records = {"records.py"} if name in ("tensorflow", "mxnet") else set()
    old = {"train_tf1.py"} if name == "tensorflow" else set()
    assert names == {"common", "engine.py", "inference.py", "train.py", *records, *old}
    assert (folder / "common").is_symlink()
    assert (folder / "common").readlink().as_posix() == "../common"
    assert not (ROOT / "setup.py").exists()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_scripts_have_the_same_functions_in_the_same_order(name):
    names = definitions(name)
    assert [name for name in names if name in FUNCTIONS] == [name for name in FUNCTIONS if name in names]
    assert set(names) >= IN_ALL
    if name in ("pytorch", "mxnet"):
        assert names == FUNCTIONS


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_scripts_have_the_same_banners_and_the_first_is_for_the_user(name):
    banner = re.compile(r"^# -{60,}\n((?:# .*\n)+)# -{60,}$", re.MULTILINE)
    texts = banner.findall(source(name))
    assert [re.split("[:\n]", text)[0][2:] for text in texts] == BANNERS
    first = "replace the bodies of these functions. Nothing below this section knows what is trained."
    assert first in " ".join(texts[0].split("\n# "))
    functions = re.findall(r"^def (\w+)", source(name).split(texts[0])[1].split(texts[1])[0], re.MULTILINE)
    assert functions[0] == "load_data"


def test_similar_scripts_share_half_of_their_lines():
    lines = [[line for line in source(name).splitlines() if line.strip()] for name in ("pytorch", "mxnet")]
    matcher = difflib.SequenceMatcher(None, *lines, autojunk=False)
    shared = sum(block.size for block in matcher.get_matching_blocks())
    assert shared / max(map(len, lines)) >= 0.45


@pytest.mark.parametrize("function", ["parse_args", "load_data", "learning_rate_factor"])
def test_common_functions_are_identical(function):
    def code_of(name):
        """Return the function without its docstring."""
        for node in ast.parse(source(name)).body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                code = ast.unparse(node.body[1:]).replace(name, "FRAMEWORK")
                return code.replace(", RecordFile", "")  # PyTorch has no such files

    codes = {code_of(name) for name in IMAGE_FRAMEWORKS} - {None}
    assert len(codes) == 1


def test_the_image_scripts_have_the_same_flags():
    def flags_of(name):
        helps = {action.dest: action.help for action in flags.image_flags(name)._actions}
        assert source(name).count("parser.add_argument") == 0
        assert f'flags.image_flags("{name}")' in source(name)
        return helps

    assert flags_of("pytorch") == flags_of("tensorflow") == flags_of("mxnet")


# Sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_and_functions_are_short(path):
    text = path.read_text()
    assert 130 <= len(text.splitlines()) <= 240
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", [*SCRIPTS, *ENGINES, *RECORDS, TF1, *INFERENCE, *COMMON], ids=name_of)
def test_functions_take_few_parameters(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            name = getattr(node, "name", "lambda")
            arguments = node.args
            parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            parameters = [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]
            assert len(parameters) <= 5, name


@pytest.mark.parametrize("path", [*SCRIPTS, *ENGINES, *RECORDS, TF1, *INFERENCE, *COMMON], ids=name_of)
def test_lines_are_not_packed(path):
    text = path.read_text()
    assert max(map(len, text.splitlines()), default=0) <= 110
    lines = tokens_by_line(text)
    if lines:
        assert sum(lines.values()) / len(lines) < 9.5


def tokens_by_line(text):
    """Return the number of tokens of each line of code, without comments and docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
    counts = {}
    depth = 0  # since Python 3.12 an f-string is many tokens; count it as one
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if token.type not in (*layout, tokenize.ENDMARKER) and token.start[0] not in docstrings:
            counts.setdefault(token.start[0], 0)
            counts[token.start[0]] += depth == 0
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
    return counts


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_uses_few_of_our_names(path):
    """Count `module.name`, names imported from our modules, and attributes of Run and State."""
    tree = ast.parse(path.read_text())
    modules, names = set(), set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(("common.", "records")):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names if alias.name == "engine")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            if owner == "run" or owner in modules:
                names.add(f"{owner}.{node.attr}")
    assert len(names) <= 16, sorted(names)


# Wording and imports ----------------------------------------------------------------------------------------


def test_everything_public_has_a_docstring():
    folders = ("common", "spot", "launch", "benchmarks")
    others = itertools.chain.from_iterable(ROOT.glob(f"{folder}/*.py") for folder in folders)
    for path in [*SCRIPTS, *ENGINES, *RECORDS, TF1, *others, ROOT / "tests/helpers.py"]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def imported_modules(path):
    """Return the names of all modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_common_imports_no_framework_and_errors_name_none():
    for path in COMMON:
        assert not {name.split(".")[0] for name in imported_modules(path)} & LIBRARIES, path
    text = (ROOT / "common/errors.py").read_text().lower()
    assert not [name for name in LIBRARIES if name in text]


def test_the_page_of_the_design_names_each_module():
    page = (ROOT / "docs/design.md").read_text()
    assert not [path.name for path in COMMON if path.name != "__init__.py" and f"`{path.name}`" not in page]


def test_no_test_imports_a_script_or_another_test():
    names = {path.stem for path in ROOT.glob("tests/test_*.py")} | {"conftest", "train", "engine", "records"}
    for path in ROOT.glob("tests/*.py"):
        assert not imported_modules(path) & names, path


@pytest.mark.parametrize("path", [*COMMON, *ROOT.glob("mxnet/*.py")], ids=name_of)
def test_code_for_sagemakers_mxnet_image_is_python_3_8(path):
    ast.parse(path.read_text(), feature_version=(3, 8))


def test_the_script_for_tensorflow_1_is_python_3_7():
    ast.parse(TF1.read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_help_and_usage_errors_do_not_wait_for_the_framework(name, tmp_path):
    event = f"sys.modules.update(dict.fromkeys({sorted(LIBRARIES)!r}))"
    for argument, code, text in (("--help", 0, "--checkpoint-path"), ("--epochs=0", 2, "--epochs")):
        result = run_with(event, name, argument, cwd=tmp_path, code=code)
        assert text in result.output + result.errors
