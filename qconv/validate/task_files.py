"""Which tasks lm-evaluation-harness runs: built-in names, and the user's own YAML files.

A task is asked for by name (built in, or in the ``include`` folder) or by the path of a YAML file. Built-in tasks
are indexed only when a name asks for them: there are thousands. A data file that a local task names by a relative
path is looked for in the working folder, as lm_eval does, and then beside the YAML file.

Code: ``!function`` in a YAML file names Python that lm_eval imports and runs. lm_eval's own tasks use it freely.
For local files it is refused unless ``allow_task_code`` says otherwise, before anything is imported. That is a
reminder, not a wall: lm_eval renders the templates of task files with an unrestricted Jinja, so task files deserve
the trust that programs do. Tasks that run what the model writes (``unsafe_code``) are refused always.

The index and the YAML reader of lm_eval are internal to it; they are used as of lm_eval 0.4.13, in this file alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qconv.errors import CalibrationError, UsageError

INSTALL = 'pip install "qconv[eval]"'
_UNSAFE = "task {} runs code that the model writes; qconv does not, leave the task out"


def load_tasks(tasks: Sequence[str], include: Path | None, *, allow_task_code: bool) -> dict[str, Any]:
    """Builds the tasks with their documents; the result is what `lm_eval.evaluate` takes.

    Args:
        tasks: names of tasks, groups or tags, or paths of YAML files.
        include: folder with local task files, searched with its subfolders.

    Raises:
        UsageError: lm_eval is missing or too old; no task or an unknown one; a task file that cannot be read or
            brings code.
        CalibrationError: the documents of a task are not here and cannot be fetched.
    """
    if not tasks:
        raise UsageError("no task was named: give the name of an lm_eval task, or the path of a task's YAML file")
    if include is not None and not include.is_dir():
        raise UsageError(f"{include}: expected a folder with task files (*.yaml), found none")
    manager, names = _index(list(dict.fromkeys(tasks)), include)
    for entry in _reachable(names, manager.task_index):
        # Before anything is built: some of these tasks run code as they are loaded.
        if (entry.cfg or {}).get("unsafe_code"):
            raise UsageError(_UNSAFE.format(entry.name))
        if _is_local(entry):
            _check_code(entry.yaml_path, allow_task_code)
            _find_data(entry, manager.task_index)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in names:
        built = _build(manager, name)
        loaded["tasks"].update(built["tasks"])
        loaded["groups"].update(built.get("groups", {}))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(_UNSAFE.format(name))
    if not loaded["tasks"]:
        raise UsageError(f"{', '.join(names)}: holds no task")
    return loaded


def _index(tasks: list[str], include: Path | None) -> tuple[Any, list[str]]:
    """A task manager that knows everything that ``tasks`` needs, and the names they stand for."""
    manager = _manager(include, builtin=False)
    paths = _path_entries(tasks)
    names = [paths[task].name if task in paths else task for task in tasks]
    manager.task_index.update({entry.name: entry for entry in paths.values()})
    if any(True for _ in _missing(names, manager.task_index)):
        manager = _manager(include, builtin=True)
        manager.task_index.update({entry.name: entry for entry in paths.values()})
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise UsageError(_unknown(unknown[0], list(manager.task_index), include))
    return manager, names


def _manager(include: Path | None, *, builtin: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"tasks need lm-evaluation-harness, which cannot be imported ({error}): {INSTALL}") from None
    if not hasattr(TaskManager, "load"):
        raise UsageError(f"this lm_eval is too old; tasks need lm_eval 0.4.13: {INSTALL}")
    return TaskManager(include_path=str(include) if include else None, include_defaults=builtin)


def _path_entries(tasks: Sequence[str]) -> dict[str, Any]:
    """Index entries of the tasks that are given as files, by what the user wrote."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    entries = {}
    for task in tasks:
        if not task.endswith((".yaml", ".yml")):
            continue
        path = Path(task).expanduser()
        if not path.is_file():
            raise UsageError(f"{path}: there is no such task file")
        _functions(path)  # says what is wrong with the YAML
        try:
            entry = TaskIndex.entry_from_path(path)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{path}: is not a task file of lm_eval: {error}") from error
        config = load_yaml(path, resolve_func=False)
        name = config.get("group", config.get("task"))
        if entry is None or not isinstance(name, str):
            raise UsageError(f"{path}: a task file needs `task: NAME`, or `group: NAME` with a list of tasks")
        entries[task] = replace(entry, name=name, cfg=config)
    return entries


def _members(entry: Any) -> Iterator[str]:
    """Names of the tasks that a group or tag holds."""
    yield from sorted(entry.tags) if entry.kind.name == "TAG" else ()
    if entry.kind.name != "GROUP":
        return
    listed = (entry.cfg or {}).get("task")
    stack = list(listed) if isinstance(listed, list) else []
    for item in stack:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict) and isinstance(item.get("task"), list):
            stack.extend(item["task"])
        elif isinstance(item, dict):
            yield str(item.get("task") or item.get("group"))


def _walk(names: Sequence[str], index: dict[str, Any]) -> Iterator[tuple[str, Any | None]]:
    seen: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            entry = index.get(name)
            yield name, entry
            stack.extend(_members(entry) if entry is not None else ())


def _missing(names: Sequence[str], index: dict[str, Any]) -> Iterator[str]:
    yield from (name for name, entry in _walk(names, index) if entry is None)


def _reachable(names: Sequence[str], index: dict[str, Any]) -> list[Any]:
    return [entry for _, entry in _walk(names, index) if entry is not None]


def _is_local(entry: Any) -> bool:
    import lm_eval

    installed = Path(lm_eval.__file__).parent
    return entry.yaml_path is not None and not entry.yaml_path.resolve().is_relative_to(installed)


def _unknown(name: str, known: Sequence[str], include: Path | None) -> str:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists the built-in ones"
    broken = []
    for path in sorted(include.rglob("*.yaml")) if include else ():
        try:
            _functions(path)
        except UsageError as error:
            broken.append(str(error))
    return "; ".join([f"unknown task {name!r}; {hint}", *broken])


def _tag_reader(functions: list[str]) -> type[yaml.SafeLoader]:
    """A YAML reader that collects ``!function`` names and imports nothing."""

    class Reader(yaml.SafeLoader):
        pass

    def collect(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
        functions.append(f"!{suffix} {node.value}")
        return str(node.value)

    Reader.add_multi_constructor("!", collect)
    return Reader


def _functions(path: Path, seen: frozenset[Path] = frozenset()) -> list[str]:
    """Every ``!function`` in a task file and in the files that it includes, as ``FILE: !function NAME``."""
    found: list[str] = []
    if path.resolve() in seen:
        raise UsageError(f"{path}: includes itself")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_tag_reader(found))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as a task file: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: a task file is a YAML mapping, found {type(config).__name__}")
    functions = [f"{path}: {name}" for name in found]
    included = config.get("include") or []
    for name in included if isinstance(included, list) else [included]:
        functions += _functions(path.parent / str(name), seen | {path.resolve()})
    return functions


def _check_code(path: Path, allow_task_code: bool) -> None:
    functions = _functions(path)
    if functions and not allow_task_code:
        raise UsageError(
            f"{functions[0]} runs Python that comes with the task file; qconv runs it only when allowed to "
            "(allow task code, after reading it), or write the task with templates instead"
        )


def _find_data(entry: Any, index: dict[str, Any]) -> None:
    """Makes relative data files that lie beside the YAML file absolute, in the index's copy of the task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(entry.yaml_path)
    except Exception as error:  # functions were allowed: their modules are imported here
        raise UsageError(f"{entry.yaml_path}: {type(error).__name__}: {error}") from error
    options = config.get("dataset_kwargs")
    if not isinstance(options, dict) or "data_files" not in options:
        return
    options["data_files"] = _beside(options["data_files"], entry.yaml_path.resolve().parent, entry.yaml_path)
    index[entry.name] = replace(entry, yaml_path=None, cfg=config)


def _beside(files: Any, folder: Path, source: Path) -> Any:
    if isinstance(files, dict):
        return {split: _beside(names, folder, source) for split, names in files.items()}
    if isinstance(files, list):
        return [_beside(name, folder, source) for name in files]
    name = str(files)
    if "://" in name or any(sign in name for sign in "*?[") or Path(name).exists():
        return name
    if not (folder / name).exists():
        raise CalibrationError(f"{source}: data file {name} is neither in the working folder nor beside the task file")
    return str(folder / name)


def _build(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except ConnectionError as error:
        raise CalibrationError(
            f"the documents of task {name} are not on this machine and cannot be downloaded: {error}. Run the task "
            "once with a network, or write a task file over local data"
        ) from error
    except FileNotFoundError as error:  # also what the datasets library raises for a data set it cannot find
        raise CalibrationError(f"the documents of task {name} are not found: {error}") from error
    except Exception as error:  # a task file can be wrong in as many ways as there are keys
        raise UsageError(f"lm_eval cannot build task {name}: {type(error).__name__}: {error}") from error
