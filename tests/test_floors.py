"""Floors: imports go down only, DeepSpeed and Transformers have one door each, and data_tools never imports torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The table of the architecture; a package counts as one module.
FLOORS = {
    0: "errors files values config ops",
    1: "tokenizer shards order model optim ranks adapters figures",
    2: "objective batches cost engine checkpoint guard metrics run_folder lock watchdog interop mixture remote "
    "data_tools",
    3: "pretrain evaluate detect check plot status pretrained sources wrapper glue export import_weights",
    4: "cli __main__",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
# Modules that siblings may import, with the reason.
SHARED = {
    "errors": "what every module raises",
    "files": "config reads its files as every other module does",
    "lock": "prepare's folder has one owner at a time, as a run's has",
    "order": "its stretches of equal numbers, by which shards gathers rows",
    "batches": "the Protocols of rows and of their order, which a mixture is made of and fulfils",
    "objective": "what a step costs is counted by running it on tensors without data",
    "evaluate": "training evaluates as the verb does, and detect loads a checkpoint as evaluate does",
    "pretrained": "what every verb that takes MODEL reads",
    "sources": "what every verb that takes --data reads",
    "cli": "__main__ is its other name",
}


def module_of(path):
    """config of electra_ds/config.py, ops of electra_ds/ops/linear.py, data_tools of everything in data_tools/."""
    inside = path.relative_to(ROOT)
    return "data_tools" if inside.parts[0] == "data_tools" else inside.with_suffix("").parts[1]


def imports(source):
    """(full name, line) of everything imported anywhere in the source, inside functions too."""
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
    """(module, line) of what a file imports of this project."""
    for name, line in imports(path.read_text(encoding="utf-8")):
        first, *rest = name.split(".")
        if first == "electra_ds":
            yield rest[0], line
        elif first == "data_tools":
            yield first, line


def imports_when_run(path):
    """First names of what a file imports when it runs: what stands below `if TYPE_CHECKING` is for readers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return {name.split(".")[0] for name, _ in imports(ast.unparse(tree))}


def importers(package):
    """Files that import a foreign package, wherever the import stands."""
    found = {
        path
        for path in sources()
        for name, _ in imports(path.read_text())
        if name.split(".")[0] == package
    }
    return {str(path.relative_to(ROOT)) for path in found}


def test_every_module_has_a_floor():
    assert {module_of(path) for path in sources()} - set(FLOOR) == set()


def test_the_table_names_no_module_that_is_gone():
    assert set(FLOOR) - {module_of(path) for path in sources()} == set()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    here = module_of(path)
    for there, line in own_imports(path):
        where = f"{path.relative_to(ROOT)}:{line}: {here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"
        siblings_may = there == here or there in SHARED
        assert FLOOR[there] < FLOOR[here] or (FLOOR[there] == FLOOR[here] and siblings_may), where


def test_no_shared_sibling_is_listed_in_vain():
    pairs = {(module_of(path), there) for path in sources() for there, _ in own_imports(path)}
    for shared in SHARED:
        assert any(
            there == shared != here and FLOOR[here] == FLOOR[there] for here, there in pairs
        ), shared


def test_shared_siblings_make_no_circle():
    below = {here: set() for here in FLOOR}
    for path in sources():
        below[module_of(path)] |= {there for there, _ in own_imports(path)} - {module_of(path)}

    def reach(module, trail=()):
        assert module not in trail, " -> ".join([*trail, module])
        for there in below[module]:
            reach(there, (*trail, module))

    for module in FLOOR:
        reach(module)


def test_deepspeed_and_transformers_have_one_door_each():
    assert importers("deepspeed") == {"electra_ds/engine.py"}
    assert all(path.startswith("electra_ds/interop/") for path in importers("transformers"))
    assert "electra_ds/model.py" in importers("torch")  # the search finds what is there


def test_data_tools_and_what_it_stands_on_never_import_torch():
    plain = "data_tools errors files values config tokenizer shards order ranks cli"
    for path in sources():
        if module_of(path) in plain.split():
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
        f"data_tools.{path.stem}"
        for path in (ROOT / "data_tools").glob("*.py")
        if path.stem != "__init__"
    ]
    assert "data_tools.prepare" in tools
    loaded = modules_after("import " + ", ".join(sorted(tools)))
    assert "data_tools.prepare" in loaded and not loaded & {"torch", "deepspeed", "transformers"}


def test_importing_the_package_imports_next_to_nothing():
    loaded = modules_after("import electra_ds")
    assert not loaded & {"torch", "numpy", "pydantic", "deepspeed", "transformers", "typer"}
    assert len((ROOT / "electra_ds" / "__init__.py").read_text().splitlines()) <= 30
