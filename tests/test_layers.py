"""Who may import whom: the layers of the README, held over the syntax trees, and imports without effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmray"
MODULES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))

# Lower layers first. A module may import from its own layer's folder and from the layers before it.
LAYERS = (
    {"errors"},
    {"machine", "config", "stop"},
    {"options"},
    {"table", "parquet", "store"},
    {"url"},
    {"config_file", "slices", "labels", "source", "bundle_info"},
    {"preprocess"},
    {"model"},
    {"metrics", "curves", "histogram", "knobs"},
    {"bundle"},
    {"prediction"},
    {"predictor"},
    {"placement", "mistakes", "profile"},
    {"cluster", "submit"},
    {"train", "score", "serve"},
    {"labelled", "parity", "schedule"},
    {"evaluate"},
    {"report", "progress"},
    {"summary", "account"},
    {"demo", "compare", "tune"},
    {"commands"},
    {"cli"},
)
RAY = {
    "mmray/cluster.py",
    "mmray/placement.py",
    "mmray/schedule/meters.py",
    "mmray/score/actor.py",
    "mmray/score/feed.py",
    "mmray/score/foreman.py",
    "mmray/score/meters.py",
    "mmray/submit.py",
    "mmray/train/interim.py",
    "mmray/train/rows.py",
    "mmray/train/loop.py",
    "mmray/train/parallel.py",
    "mmray/train/job.py",
    "mmray/train/place.py",
    "mmray/train/trainer.py",
    "mmray/serve/app.py",
    "mmray/serve/meters.py",
    "mmray/tune.py",
}
NO_TORCH = {
    "errors",
    "machine",
    "config",
    "options",
    "config_file",
    "table",
    "parquet",
    "store",
    "url",
    "slices",
    "labels",
    "source",
    "bundle_info",
    "preprocess",
    "report",
    "progress",
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((PACKAGE.parent / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(part: str) -> int:
    return next(k for k, layer in enumerate(LAYERS) if part in layer)


def part_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    if part_of(path) == "__init__":
        assert {name.partition(".")[0] for name in imports(path)} <= sys.stdlib_module_names
        return
    own = part_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "mmray" and len(parts) > 1 and parts[1] not in ("__version__", own):
            assert layer_of(parts[1]) < layer_of(own), f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_doors_to_the_cluster_import_ray(path: Path) -> None:
    if str(path) not in RAY:
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_what_prepares_rows_does_not_import_torch(path: Path) -> None:
    if part_of(path) in NO_TORCH:
        assert not [name for name in imports(path) if name.split(".")[0] in ("torch", "torchvision")]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_one_module_decodes_images_and_one_loads_torchvision(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert "cv2" not in roots or str(path) in ("mmray/preprocess/image.py", "mmray/demo/make_clipart.py")
    assert "torchvision" not in roots or str(path) == "mmray/model/vision.py"
    assert not roots & {"PIL", "pickle", "cloudpickle", "joblib"}


def test_a_command_that_runs_no_model_does_not_load_torch() -> None:
    modules = "score.job score.verify score.scored score.problems account schedule.tick schedule.published submit"
    imported = ", ".join(f"mmray.{name}" for name in modules.split())
    code = f"import sys, {imported}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_loads_neither_ray_nor_torch_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, mmray, mmray.cli, mmray.config; mmray.cli.build_parser(); "
        "loaded = {'ray', 'torch', 'cv2', 'pyarrow'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True, env={"HOME": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []
