"""Import rules: one direction between rooms, deepspeed in one file, no torch in data_tools."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOW = ["common", "config", "data", "model", "training"]  # each may import the rooms before it
RULES = {room: set(FLOW[:i]) for i, room in enumerate(FLOW)}
RULES["cluster"] = {"common", "config"}
RULES["training"] |= {"cluster"}
LOADING = {f"interop.{module}" for module in ("load_model", "checkpoints", "vocabularies")}
for room in ("interop", "evaluation", "finetuning", "reporting"):
    RULES[room] = {*FLOW, "cluster", *LOADING}
RULES["data_tools"] = {"common", "config", "data"}
RULES["cli"] = {*RULES, "interop"}


def room_of(path):
    """Room of a file: `data` for electra_ds/data/loader.py, `electra_ds` for the top level."""
    first, second, *_ = *path.relative_to(ROOT).with_suffix("").parts, ""
    inside = path.parent != ROOT / "electra_ds"
    return second if first == "electra_ds" and inside else first


def imports(source):
    """(full name, line) of all imports in the source, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def sources():
    found = [
        path
        for package in ("electra_ds", "data_tools")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    return [path for path in found if path != ROOT / "electra_ds" / "__init__.py"]


def own_imports(path):
    """(name below the package, line) of what a file imports of this project."""
    for name, line in imports(path.read_text(encoding="utf-8")):
        first, *rest = name.split(".")
        if first == "electra_ds":
            yield ".".join(rest), line
        elif first == "data_tools":
            yield first, line


def imports_when_run(path):
    """Top-level names that a file imports at run time, without those below `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return {name.split(".")[0] for name, _ in imports(ast.unparse(tree))}


def importers(package):
    """Files that import a package of others anywhere, also inside functions."""
    found = {
        path
        for path in sources()
        for name, _ in imports(path.read_text())
        if name.split(".")[0] == package
    }
    return {str(path.relative_to(ROOT)) for path in found}


def test_every_module_is_in_a_room():
    rooms = {room_of(path) for path in sources()} - {"electra_ds"}
    assert rooms == set(RULES)
    top = {path.name for path in (ROOT / "electra_ds").glob("*.py")}
    assert top == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_between_rooms_go_one_way(path):
    here = room_of(path)
    for name, line in own_imports(path):
        room = name.split(".")[0]
        allowed = here in ("electra_ds", room) or any(
            name == other or name.startswith(f"{other}.") for other in RULES[here]
        )
        assert allowed, f"{path.relative_to(ROOT)}:{line}: room {here} imports {name}"


def test_imports_have_no_cycle():
    """Top-level imports have no cycle."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources()}
    below = {
        name: {
            target
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            for target in (node.module, f"{node.module}.{alias.name}")
            if target in modules
        }
        for name, path in modules.items()
    }
    finished = set()

    def visit(module, trail=()):
        assert module not in trail, " -> ".join([*trail, module])
        if module not in finished:
            for target in below[module]:
                visit(target, (*trail, module))
            finished.add(module)

    for module in modules:
        visit(module)


def test_deepspeed_is_imported_by_one_file_and_transformers_by_one_room():
    assert importers("deepspeed") == {"electra_ds/training/engine.py"}
    assert all(path.startswith("electra_ds/interop/") for path in importers("transformers"))
    assert "electra_ds/model/encoder.py" in importers("torch")  # importers() finds imports


def test_kernels_import_only_torch():
    for path in (ROOT / "electra_ds" / "model" / "kernels").glob("*.py"):
        foreign = {name.split(".")[0] for name, _ in imports(path.read_text())}
        assert foreign <= {"torch", "electra_ds", *sys.stdlib_module_names}, path
        assert all(name.split(".")[0] == "model" for name, _ in own_imports(path)), path


def test_data_tools_never_import_torch():
    for path in (path for path in sources() if room_of(path) in ("data_tools", "common", "config")):
        assert not imports_when_run(path) & {"torch", "deepspeed", "transformers"}, path


def modules_after(statement):
    """Names in sys.modules of a fresh interpreter after a statement."""
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_data_tools_start_without_torch():
    tools = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "data_tools").rglob("*.py")
        if path.stem != "__init__"
    ]
    assert "data_tools.prepare" in tools
    loaded = modules_after("import " + ", ".join(sorted(tools)))
    assert "data_tools.prepare" in loaded and not loaded & {"torch", "deepspeed", "transformers"}


def test_importing_the_package_imports_no_large_package():
    loaded = modules_after("import electra_ds")
    assert not loaded & {"torch", "numpy", "pydantic", "deepspeed", "transformers", "typer"}
    assert len((ROOT / "electra_ds" / "__init__.py").read_text().splitlines()) < 40


def test_public_names_are_listed_and_loaded_at_first_use():
    loaded = modules_after(
        "import electra_ds\nassert set(electra_ds.__all__) <= set(dir(electra_ds))"
    )
    assert "electra_ds.config.loading" not in loaded
    loaded = modules_after("from electra_ds import load_run")
    assert "electra_ds.config.loading" in loaded and "torch" not in loaded
    loaded = modules_after("from electra_ds import Detector, Electra, load")
    assert "torch" in loaded and "deepspeed" not in loaded
    command = [sys.executable, "-c", "import electra_ds; electra_ds.no_such_name"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "module 'electra_ds' has no attribute 'no_such_name'" in done.stderr
