"""Who imports whom, by the sources: `python -m tests.import_graph` prints the picture of docs/architecture.md."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENTRIES = ("varzoo", "varzoo.__main__", "varzoo.eval.__main__")  # they only hand over to what stands above all


def modules() -> dict[str, Path]:
    """All modules of varzoo by name; a package is the module of its `__init__`."""
    files = sorted((ROOT / "varzoo").rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return dict(zip(names, files))


def imports() -> dict[str, set[tuple[str, str]]]:
    """Of every module but the entries, what it imports of varzoo, inside functions too: (module, name) pairs."""
    known, found = modules(), {}
    for module in known.keys() - set(ENTRIES):
        found[module] = pairs = set()
        for node in ast.walk(ast.parse(known[module].read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                names = [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [(alias.name, "") for alias in node.names]
            else:
                continue
            for source, name in names:
                if source.split(".")[0] == "varzoo":
                    within = f"{source}.{name}" in known
                    pairs.add((f"{source}.{name}", "") if within else (source, name))
    return found


def package(module: str) -> str:
    return module.split(".")[1]


def package_edges() -> dict[str, set[str]]:
    """Which packages (or modules beside them) each package imports."""
    edges: dict[str, set[str]] = {}
    for module, pairs in imports().items():
        edges.setdefault(package(module), set()).update(
            package(source) for source, _ in pairs if package(source) != package(module))
    return edges


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges that no longer way implies. Raises CycleError if there is a cycle."""
    reach: dict[str, set[str]] = {}
    for name in TopologicalSorter(edges).static_order():
        reach[name] = set().union(*({other} | reach[other] for other in edges.get(name, ())))
    return {name: {other for other in others if not any(other in reach[third] for third in others)}
            for name, others in edges.items()}


def mermaid() -> str:
    """The package graph as a Mermaid block; what an arrow's chain implies is not drawn again."""
    edges = reduced(package_edges())
    height: dict[str, int] = {}  # the longest way down
    for name in TopologicalSorter(edges).static_order():
        height[name] = 1 + max((height[other] for other in edges.get(name, ())), default=-1)
    order = sorted((name for name, others in edges.items() if others), key=lambda name: (-height[name], name))
    lines = [f"    {name} --> {' & '.join(sorted(edges[name]))}" for name in order]
    return "\n".join(["graph TD", *lines, ""])


if __name__ == "__main__":
    print(mermaid(), end="")
