"""The house: the four scripts have one shape, stay readable, and `common/` stays free of frameworks."""

import ast
import re
import subprocess
import sys

import pytest

from conftest import FRAMEWORKS, IMAGE_FRAMEWORKS, ROOT, environment

FUNCTIONS = [
    "parse_args",
    "choose_device",
    "load_data",
    "build_model",
    "save_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
    "train",
    "evaluate",
    "export_model",
    "main",
]
LIBRARIES = {"tensorflow", "keras", "torch", "torchvision", "mxnet", "xgboost"}


def source(framework):
    return (ROOT / framework / "train.py").read_text()


def top_level_functions(framework):
    return [node for node in ast.parse(source(framework)).body if isinstance(node, ast.FunctionDef)]


def test_each_framework_folder_is_complete_and_shadows_no_library(framework):
    folder = ROOT / framework
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert names == {"common", "train.py"} | ({"parameter_servers.py"} if framework == "mxnet" else set())
    assert (folder / "common").is_symlink()
    assert (folder / "common").readlink().as_posix() == "../common"
    assert not (ROOT / "setup.py").exists()


def test_the_scripts_have_the_same_functions_in_the_same_order(framework):
    names = [function.name for function in top_level_functions(framework)]
    assert [name for name in names if name in FUNCTIONS] == FUNCTIONS


def test_the_scripts_have_the_same_sections_and_the_same_two_places_for_your_own(framework):
    banner = re.compile(r"^# -{100,}\n((?:# .*\n)+)# -{100,}$", re.MULTILINE)
    titles = [text.split(":")[0].split("\n")[0] for text in banner.findall(source(framework))]
    assert titles == ["# Data and model", "# Checkpoints", "# Training"]
    marked = (
        "# Data and model: replace the bodies of these two functions with your own. Nothing else knows what is trained."
    )
    assert source(framework).count(marked) == 1
    after = re.findall(r"^def (\w+)", source(framework).split(marked)[1], re.MULTILINE)
    assert after[:2] == ["load_data", "build_model"]


@pytest.mark.parametrize("name", ["parse_args", "load_data"])
def test_functions_that_need_not_differ_do_not_differ(name):
    def body(framework):
        function = next(function for function in top_level_functions(framework) if function.name == name)
        return ast.unparse(function).replace(framework, "FRAMEWORK")

    assert len({body(framework) for framework in IMAGE_FRAMEWORKS}) == 1


def test_the_same_things_have_the_same_names(framework):
    names = {node.id for node in ast.walk(ast.parse(source(framework))) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(ast.parse(source(framework))) if isinstance(node, ast.arg)}
    wanted = "args data model progress checkpoint path metrics found interrupted"
    assert not set(wanted.split()) - names


def test_each_script_is_short_and_so_is_each_function(framework):
    assert 150 <= len(source(framework).splitlines()) <= 300
    for node in ast.walk(ast.parse(source(framework))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_every_public_function_says_what_it_does():
    scripts = [*(ROOT / framework / "train.py" for framework in FRAMEWORKS), ROOT / "mxnet/parameter_servers.py"]
    for path in [*scripts, *(path for folder in ("common", "spot", "launch") for path in ROOT.glob(f"{folder}/*.py"))]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_common_imports_no_framework():
    for path in ROOT.glob("common/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & LIBRARIES, path


@pytest.mark.parametrize("path", [*ROOT.glob("common/*.py"), *ROOT.glob("mxnet/*.py")], ids=lambda path: path.name)
def test_what_sagemakers_mxnet_image_runs_is_python_3_8(path):
    ast.parse(path.read_text(), feature_version=(3, 8))


def test_help_and_usage_errors_do_not_wait_for_the_framework(framework, tmp_path):
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({sorted(LIBRARIES)!r}))\n"
    code += "path = sys.argv.pop(1); sys.path.insert(0, path); runpy.run_path(path + '/train.py', run_name='__main__')"
    for flags, exit_code, text in ((["--help"], 0, "--checkpoint-path"), (["--epochs", "0"], 2, "--epochs")):
        command = [sys.executable, "-c", code, str(ROOT / framework), *flags]
        finished = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert finished.returncode == exit_code
        assert text in finished.stdout + finished.stderr
