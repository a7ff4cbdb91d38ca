"""The house keeps its shape: who imports whom, who may say what, and how long things grow."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

CODE = sorted([*(ROOT / "aq_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), ROOT / "train.py"])

# Left may import right, never the reverse; members of one level do not import each other, but a level that is one
# member here stands for a package, inside which imports are free.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("train",),
    ("callbacks",),
    ("aq_lightning.api",),
    ("aq_lightning.cli",),
    ("aq_lightning.commandline",),
    ("aq_lightning.verbs", "aq_lightning.plan", "aq_lightning.scorecard"),
    ("aq_lightning.preparation", "aq_lightning.summary"),
    (
        "aq_lightning.pipeline",
        "aq_lightning.rotating",
        "aq_lightning.writing",
        "aq_lightning.comparison",
        "aq_lightning.scoring",
        "aq_lightning.conversion",
        "aq_lightning.language_model",
        "aq_lightning.doctor",
        "aq_lightning.fingerprint",
        "aq_lightning.disk",
        "aq_lightning.status",
        "aq_lightning.report",
        "aq_lightning.methods",
        "aq_lightning.nulls",
        "aq_lightning.quiet",
    ),
    ("aq_lightning.deploy",),  # reads what export writes
    ("aq_lightning.calibration", "aq_lightning.export", "aq_lightning.evaluation"),
    ("aq_lightning.recipe",),
    (
        "aq_lightning.data",
        "aq_lightning.models",
        "aq_lightning.transforms",
        "aq_lightning.quantizers",
        "aq_lightning.rounders",
        "aq_lightning.optimizers",
        "aq_lightning.objectives",
    ),
    ("aq_lightning.kernels",),
    ("aq_lightning.qtensor", "aq_lightning.experts", "aq_lightning.attention"),
    ("aq_lightning.scheme", "aq_lightning.models.sites"),
    ("aq_lightning.vigil", "aq_lightning.strategy"),
    ("aq_lightning.errors", "aq_lightning.durable", "aq_lightning.distributed", "aq_lightning.wording"),
)
ARCHITECTURES = re.compile(
    r"llama(?!\.cpp|-server)|mistral|qwen|gemma|gpt2|\bopt\b|bert|phi3|mixtral|falcon|gpt_neox|bloom", re.IGNORECASE
)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in CODE}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, wherever the statement stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:  # `from package import module` names a module too
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def level(module: str) -> tuple[int, str]:
    """Place in LEVELS of a module, by its longest known prefix, and that prefix."""
    places = [
        (number, member)
        for number, members in enumerate(LEVELS)
        for member in members
        if module == member or module.startswith(f"{member}.")
    ]
    assert places, f"{module} has no place in the layout: name it in LEVELS"
    return max(places, key=lambda place: len(place[1]))


def forbidden(importer: str, imported: str) -> bool:
    (above, one), (below, other) = level(importer), level(imported)
    return one != other and above >= below


def nodes(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, kinds))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_checks_see_the_code() -> None:
    assert {"train", "aq_lightning.pipeline", "aq_lightning.calibration.fold", "callbacks.gradual_mask"} <= MODULES
    assert len(list(imports(ROOT / "aq_lightning" / "pipeline.py"))) > 8


@pytest.mark.parametrize(
    "importer, imported, wrong",
    [
        ("aq_lightning.scheme", "aq_lightning.qtensor", True),
        ("aq_lightning.transforms.affine", "aq_lightning.quantizers", True),
        ("aq_lightning.calibration.attach", "aq_lightning.export.directory", True),
        ("aq_lightning.evaluation.bits", "aq_lightning.pipeline", True),
        ("aq_lightning.calibration.attach", "callbacks", True),
        ("aq_lightning.models.sites", "aq_lightning.models.loading", True),
        ("aq_lightning.transforms.base", "aq_lightning.models.sites", False),
        ("aq_lightning.transforms.base", "aq_lightning.models.loading", True),
        ("aq_lightning.calibration.attach", "aq_lightning.models.loading", False),
        ("aq_lightning.calibration.attach", "aq_lightning.calibration.fold", False),
        ("callbacks.report", "aq_lightning.calibration", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, wrong: bool) -> None:
    assert forbidden(importer, imported) == wrong


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_imports_point_one_way(path: Path) -> None:
    importer = module_name(path)
    if importer == "aq_lightning":
        assert set(imports(path)) == {"importlib", "typing", "aq_lightning.api"}, "the last for type checkers alone"
        return
    own = [name for name in imports(path) if name in MODULES and name != "aq_lightning"]
    assert not [name for name in own if forbidden(importer, name)]


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_only_kernels_import_triton(path: Path) -> None:
    assert "kernels" in path.parts or not [name for name in imports(path) if name.split(".")[0] == "triton"]


def spoken(path: Path) -> Iterator[str]:
    """Everything a file says that is code: identifiers, imports, and strings other than docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose = {
        id(node.value)
        for parent in ast.walk(tree(path))
        if isinstance(parent, (*documented, ast.If))
        for node in parent.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        yield from (
            value
            for name in ("id", "attr", "arg", "name", "module")
            if isinstance(value := getattr(node, name, None), str)
        )


@pytest.mark.parametrize("path", [path for path in CODE if "models" not in path.parts], ids=ids)
def test_only_models_name_an_architecture(path: Path) -> None:
    assert not [text for text in spoken(path) if ARCHITECTURES.search(text)]


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_forbidden_words(path: Path) -> None:
    called = {node.func.id for node in nodes(path, ast.Call) if isinstance(node.func, ast.Name)}
    assert not called & {"hasattr", "breakpoint", "eval", "exec"}
    assert not {name.split(".")[0] for name in imports(path)} & {"pdb", "ipdb", "pickle"}
    assert path.name in ("cli.py", "commandline.py", "verbs.py") or "print" not in called


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_no_broad_except(path: Path) -> None:
    for handler in nodes(path, ast.ExceptHandler):
        caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        names = [ast.unparse(kind) if kind is not None else "everything" for kind in caught]
        assert not {"everything", "Exception", "BaseException"} & set(names), f"line {handler.lineno}"
        assert not all(isinstance(line, ast.Pass) for line in handler.body), f"line {handler.lineno}: swallowed"


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_length(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    for function in nodes(path, ast.FunctionDef):
        assert function.end_lineno - function.lineno < 60, function.name


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in given if argument.arg not in ("self", "cls")])


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_number_of_parameters(path: Path) -> None:
    """More may take: a constructor that the command line reads, which lists every option by name; operators and device
    code, whose arguments are flat."""
    for function in nodes(path, ast.FunctionDef):
        options = function.name == "__init__" and path.name in ("language_model.py", "windows.py")
        flat = any(
            re.search("custom_op|^operator$|register_fake|triton.jit", ast.unparse(d)) for d in function.decorator_list
        )
        assert options or flat or parameters(function) <= 7, f"{function.name} takes {parameters(function)}"


def undocumented(path: Path) -> Iterator[str]:
    """Public names without a docstring; an override inherits its own from the base class that documents it."""
    if not ast.get_docstring(tree(path)) and path.read_text().strip():
        yield "module"
    for node in tree(path).body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef) and not node.bases:
            for method in node.body:
                public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                if public and not ast.get_docstring(method):
                    yield f"{node.name}.{method.name}"


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_public_names_are_documented(path: Path) -> None:
    assert not list(undocumented(path))


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_dataclasses_are_frozen(path: Path) -> None:
    for cls in nodes(path, ast.ClassDef):
        if not any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
            continue
        assert "frozen=True" in ast.unparse(cls.decorator_list[0]), f"{cls.name} can be changed"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout: what is tracked is not known")
def test_no_path_of_a_machine_in_any_file() -> None:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    pattern = re.compile(r"(?<![\w.])/(?:" + "|".join(("work", "home", "root", "Users", "mnt", "data")) + r")/\w")
    found = [
        f"{name}:{number}"
        for name in files
        if (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]
    assert files and not found
