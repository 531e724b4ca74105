"""The house: its plan, and that every import keeps to it."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("searchspaces", "actors", "orchestrator")

# The plan, from the ground up. A room is a folder, or a single file that stands apart from its folder's others. A file
# may import from its own room and from rooms on floors below it, never from its own floor's other rooms, never from
# above.
PLAN: tuple[tuple[str, ...], ...] = (
    # what can be built
    ("searchspaces",),                                        # contracts and shared parts
    ("searchspaces/trained/given.py",),                       # weights that others published
    ("searchspaces/darts", "searchspaces/efficientnet_lite", "searchspaces/elite", "searchspaces/expanded",
     "searchspaces/mnas", "searchspaces/mobilenetv3", "searchspaces/nasbench201", "searchspaces/proxylessnas",
     "searchspaces/trained", "searchspaces/training"),
    ("searchspaces/catalogue.py",),                           # the spaces by name
    # what lives on another process and holds something
    ("actors",),                                              # data, devices, the evaluator contract
    ("actors/targets", "actors/knowledge", "actors/supernet"),
    ("actors/targets/android", "actors/targets/cuda", "actors/rollout"),
    ("actors/targets/catalogue.py",),                         # the targets by name
    ("actors/latency",),
    # who decides
    ("orchestrator/settings.py",),                            # the base of every section of a configuration
    ("orchestrator/frontier.py", "orchestrator/interrupt.py", "orchestrator/presets.py", "orchestrator/data"),
    ("orchestrator/config.py", "orchestrator/controllers"),
    ("orchestrator/record", "orchestrator/prediction", "orchestrator/controllers/baselines"),
    ("orchestrator/controllers/pnag", "orchestrator/controllers/fnas", "orchestrator/controllers/unas",
     "orchestrator/controllers/nss", "orchestrator/cluster"),
    ("orchestrator/resources",),                              # what there is to run and to measure on
    ("orchestrator/handover", "orchestrator/report"),
    ("orchestrator/services",),                               # what the stages of a run share
    ("orchestrator/comparison",),                             # what a user would have without a search
    ("orchestrator/run/stages",),
    ("orchestrator/run", "orchestrator/latencytables"),
    ("orchestrator/sweep",),                                  # many searches as one experiment
    ("orchestrator",),                                        # the command line
)
FLOORS = {room: floor for floor, rooms in enumerate(PLAN) for room in rooms}
FILES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def room_of(file: str) -> str:
    return file if file in FLOORS else file.rpartition("/")[0]


def imported(file: str) -> set[str]:
    """Files of this project that a file imports, wherever in it (imports under TYPE_CHECKING do not run)."""
    tree = ast.parse((ROOT / file).read_text())
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in
               ast.dump(block.test) for node in ast.walk(block)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {found for name in names if (found := f"{name.replace('.', '/')}.py") in set(FILES)}


def test_every_file_has_a_room_in_the_plan() -> None:
    homeless = {room_of(file) for file in FILES} - set(FLOORS)
    assert not homeless, f"{sorted(homeless)} are not in PLAN; give each a floor above what it imports"
    empty = set(FLOORS) - {room_of(file) for file in FILES}
    assert not empty, f"PLAN has {sorted(empty)}, which hold no file"


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file: str) -> None:
    here = room_of(file)
    wrong = sorted(other for other in imported(file)
                   if (there := room_of(other)) != here and FLOORS[there] >= FLOORS[here])
    assert not wrong, f"{file} is in {here} on floor {FLOORS[here]} and imports {wrong}; imports point down only"


def test_no_file_imports_one_that_imports_it_back_however_far() -> None:
    graph = {file: imported(file) for file in FILES}
    done: set[str] = set()

    def visit(file: str, trail: tuple[str, ...]) -> None:
        assert file not in trail, f"import circle: {' -> '.join((*trail, file))}"
        if file not in done:
            for other in graph[file]:
                visit(other, (*trail, file))
            done.add(file)

    for file in FILES:
        visit(file, ())
    assert done == set(FILES)


def test_a_folder_is_small_enough_to_take_in_at_a_glance() -> None:
    crowded = {folder: count for folder in {file.rpartition("/")[0] for file in FILES}
               if (count := len([path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"])) > 14}
    assert not crowded, f"{crowded}: more than a dozen files or so hide what the folder is for"


def test_searchspaces_know_no_ray() -> None:
    for file in FILES:
        if file.startswith("searchspaces"):
            assert "import ray" not in (ROOT / file).read_text(), f"{file} imports ray"


def test_tests_mirror_the_folders() -> None:
    folders = {file.rpartition("/")[0] for file in FILES}
    strangers = [path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")
                 if path.parent != ROOT / "tests" and path.parent.relative_to(ROOT / "tests").as_posix() not in folders]
    assert not strangers, f"tests/{strangers} test no folder of that name"


def test_nothing_that_is_read_is_executed() -> None:
    """Files and answers of devices and nodes are data; Ray alone carries Python objects, between processes that have
    the cluster's token."""
    allowed = {("searchspaces/conformance.py", "pickle.loads")}     # of what it pickled itself
    banned = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "yaml.load", "marshal.loads", "os.system",
              "cloudpickle.load", "cloudpickle.loads", "ray.cloudpickle.loads", "joblib.load"}
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = {"torch.load": given.get("weights_only") != "True", "np.load": "allow_pickle" in given,
                      "np.fromregex": True}.get(name, False)
            if name in banned or unsafe or given.get("shell") == "True":
                found.add((file, name))
    assert found == allowed
