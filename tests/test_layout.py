"""The shape of the tree, read from the sources: who imports whom, who reads the environment, what the kernel library exports."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

import lmi_dist
from lmi_dist import EngineConfig

ROOT = Path(__file__).parent.parent
ENGINE, HANDLER = ROOT / "lmi_dist", ROOT / "handlers" / "lmi_dist_handler"
HEADER = ROOT / "kernels" / "include" / "lmi_kernels.h"

# Low to high; an item may import items of lower rows only. A folder is one item: inside it, files import each other.
ENGINE_LEVELS = (
    ("collector", "errors", "pace", "plan"),
    ("config", "request", "ops", "parallel", "fetch"),
    ("device", "link", "pages", "plan_stream", "staging"),
    ("device_group",),
    ("local_link",),
    ("meeting",),
    ("blocks", "images", "weights"),
    ("kv_cache", "sequence"),
    ("batch",),
    ("decode_batch",),
    ("scheduler", "quant", "lora", "sampler", "text"),
    ("layers",),
    ("models",),
    ("admission", "answers", "recorded", "setup"),
    ("flight", "runner"),
    ("fitting",),
    ("engine", "follower"),
    ("__init__",),
)
HANDLER_LEVELS = (
    (
        "background",
        "bench_work",
        "cache",
        "demo_text",
        "dialects",
        "fields",
        "formatter",
        "images",
        "inbox",
        "logs",
        "options",
        "packages",
        "sagemaker",
        "request_io",
        "special_tokens",
        "supervisor",
        "timings",
        "wire",
        "worker_log",
    ),
    ("launcher",),
    ("bench_limits", "bench_target", "bodies", "chat", "demo_model", "gpus", "group", "model_py", "sampling", "synthetic", "words"),
    ("openai_responses", "responses"),
    ("custom", "host", "load_models", "settings", "settle", "tgi_responses", "todays_responses", "worker"),
    ("metrics", "page", "registration", "server_words", "tgi_requests"),
    ("front", "properties"),
    ("connection", "openai_requests", "registry", "streamed"),
    ("requests",),
    ("openapi", "streaming"),
    ("management", "rolling_batch", "whole_batch"),
    ("http", "served"),
    ("forwarding", "ranks"),
    ("server",),
    ("__init__", "cli"),
    ("bench", "demo"),
)
FORBIDDEN = {
    "models": {"ops", "quant", "request", "scheduler", "sequence"},
    "layers": {"request", "scheduler", "sequence", "blocks"},
}
WITHOUT_TORCH = ("errors", "config", "request", "plan", "blocks", "sequence", "scheduler", "pace")
HOST_PROCESS = ("properties", "wire", "group", "host", "front", "http", "server", "cli", "demo")
# worker.py: the rank is part of its socket's name, which it must tell before torch is loaded
READ_ENVIRONMENT = {f"handlers/lmi_dist_handler/{name}.py" for name in ("properties", "worker")} | {"lmi_dist/parallel.py"}
PRINT = {f"handlers/lmi_dist_handler/{name}.py" for name in ("bench", "cli", "demo", "demo_model")}
SOURCES = sorted(chain(ENGINE.rglob("*.py"), HANDLER.rglob("*.py")))


def item_of(path: Path, package: Path) -> str:
    """A file's name in the table of levels."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each import, also of those inside functions; name is None for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the level"
            yield from ((node.module or "", alias.name) for alias in node.names)


def imported_items(path: Path, package: Path) -> set[str]:
    """What of its own package a file imports, as names in the table of levels."""
    items = set()
    for module, name in imports_of(path):
        head, _, rest = module.partition(".")
        if head == package.name:
            is_file = name is not None and ((package / f"{name}.py").exists() or (package / name).is_dir())
            items.add(rest.split(".")[0] or (name if is_file and name else "__init__"))
    return items - {item_of(path, package)}


def level_of(item: str, levels: tuple[tuple[str, ...], ...]) -> int:
    return next((i for i, row in enumerate(levels) if item in row), len(levels))  # unknown: another test says so


@pytest.mark.parametrize(("package", "levels"), [(ENGINE, ENGINE_LEVELS), (HANDLER, HANDLER_LEVELS)], ids=["engine", "handler"])
def test_every_file_has_a_level(package, levels):
    items = {item_of(path, package) for path in package.rglob("*.py")}

    assert items - set(chain(*levels)) == set()


@pytest.mark.parametrize(("package", "levels"), [(ENGINE, ENGINE_LEVELS), (HANDLER, HANDLER_LEVELS)], ids=["engine", "handler"])
def test_imports_go_down(package, levels):
    wrong = [
        f"{path.relative_to(ROOT)} imports {item}"
        for path in sorted(package.rglob("*.py"))
        for item in imported_items(path, package)
        if level_of(item, levels) >= level_of(item_of(path, package), levels)
    ]

    assert wrong == []


def test_models_and_layers_stay_in_their_field():
    wrong = [
        f"{path.relative_to(ROOT)} imports {item}"
        for folder, forbidden in FORBIDDEN.items()
        for path in (ENGINE / folder).rglob("*.py")
        for item in imported_items(path, ENGINE) & forbidden
    ]

    assert wrong == []


def test_handlers_import_public_names_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name} from {module}"
        for path in HANDLER.rglob("*.py")
        for module, name in imports_of(path)
        if module.split(".")[0] == "lmi_dist" and not (module == "lmi_dist" and name in lmi_dist.__all__)
    ]

    assert wrong == []


def test_engine_knows_no_host():
    outward = {"lmi_dist_handler", "djl_python", "starlette", "uvicorn"}
    wrong = [
        f"{path} imports {module}"
        for path in ENGINE.rglob("*.py")
        for module, _ in imports_of(path)
        if module.split(".")[0] in outward
    ]

    assert wrong == []


def test_deciding_files_know_no_torch():
    wrong = [name for name in WITHOUT_TORCH for module, _ in imports_of(ENGINE / f"{name}.py") if module.split(".")[0] == "torch"]

    assert wrong == []


def test_host_process_loads_no_torch():
    modules = ", ".join(f"lmi_dist_handler.{name}" for name in HOST_PROCESS)
    check = f"import sys, {modules}; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return (
            isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in ("environ", "environb", "getenv", "getenvb")
        )
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in alias.name for alias in node.names)


def test_environment_is_read_in_three_files():
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if reads_environment(node)
    }

    assert readers == READ_ENVIRONMENT


def test_only_commands_print():
    printers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }

    assert printers == PRINT


def test_kernels_need_nothing_but_torch():
    """So that they run, and are tested, where nothing else of ours is installed."""
    ours = "[name for name in ('pydantic', 'transformers', 'safetensors', 'tokenizers') if name in sys.modules]"

    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from lmi_dist import ops; print({ours})"], capture_output=True, text=True
    )

    assert done.stdout.strip() == "[]", done.stderr


def test_every_module_says_what_it_is():
    silent = [path for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]

    assert silent == []


@pytest.mark.parametrize("column", ["cpu", "sim"])
def test_library_exports_the_header(column):
    header = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    declared = set(re.findall(r"^LMI_API\s[^(;]*?(\w+)\s*\(", header, flags=re.MULTILINE))
    from lmi_dist import ops

    library = next(path for folder in ops.__path__ for path in Path(folder).glob(f"liblmi_{column}.so"))
    symbols = subprocess.run(["nm", "--dynamic", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[2] for line in symbols.splitlines() if line.split()[1] in "TWVBDRu"}

    assert declared == {name for name in exported if not name.startswith("lmi_sim_")}  # its counters, for tests


def test_kernels_know_no_python():
    wrong = [
        f"{path.relative_to(ROOT)}: {header}"
        for path in (ROOT / "kernels").rglob("*.*")
        for header in re.findall(r'#include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
        if re.match(r"(Python|torch|ATen|c10|pybind11)", header)
    ]

    assert wrong == []


def test_every_setting_has_an_option():
    from lmi_dist_handler.options import OPTIONS

    assert {option.field for option in OPTIONS.values() if option.reader == "engine"} == set(EngineConfig.model_fields)
