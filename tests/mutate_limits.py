"""Tests the limiter's tests: each small fault put into ``runtime/limits.py`` must make them fail.

    python tests/mutate_limits.py [--jobs N] [--only LINE ...] [--json FILE]

Faults, one at a time: a comparison widened, narrowed or turned; + and -, * and / exchanged; a number changed; min and
max, and/or, True/False exchanged; a sign or a `not` dropped; += and -= exchanged; a call whose value nobody takes left
out. Messages, docstrings and annotations are left alone. Faults that survive are printed as they stand in the source;
``mutation.md`` beside this file says of each why no test can or need tell it from the original.

Only tests of the interpreted source are run, without the comparison with the compiled one: that would tell every
fault, since the compiled module does not have it.
"""

import argparse
import ast
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "runtime" / "limits.py"
SUITE = ["tests/runtime/test_stops.py", "tests/runtime/test_limits.py", "tests/runtime/test_limits_fuzz.py"]
SELECT = "not compiled and not ten_thousand and not oracle and not any_stream and not vendors"
LONGEST = 120.0  # s; an endless loop is a fault found

COMPARISONS = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
OPERATORS |= {ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift}
EXCHANGED = {"min": "max", "max": "min", "ceil": "floor", "floor": "ceil", "sin": "cos", "cos": "sin"}


@dataclass(frozen=True)
class Mutant:
    """One fault: where, what it says instead, and the whole text with it."""

    line: int
    before: str
    after: str
    text: str


def variants(node):
    """Replacements for one node, as functions that make a node."""
    match node:
        case ast.Compare(ops=ops):
            for k, op in enumerate(ops):
                for other in COMPARISONS.get(type(op), []):
                    yield ast.Compare(node.left, [*ops[:k], other(), *ops[k + 1 :]], node.comparators)
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(op)](), node.right)
        case ast.BoolOp(op=op):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node.operand
        case ast.Call(func=ast.Name(id=name)) if name in EXCHANGED:
            yield ast.Call(ast.Name(EXCHANGED[name], ast.Load()), node.args, node.keywords)
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
            if value not in (0, 1):
                yield ast.Constant(value / 2 if isinstance(value, float) else value - 1)
        case ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield ast.AugAssign(node.target, OPERATORS[type(op)](), node.value)
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()


def left_alone(tree):
    """Nodes in messages, docstrings, annotations and keyword defaults that are only text."""
    skipped = set()
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Raise):
            parts = [node]
        elif isinstance(node, ast.FunctionDef):
            parts = [node.returns, *(a.annotation for a in [*node.args.args, *node.args.kwonlyargs])]
        elif isinstance(node, ast.AnnAssign):
            parts = [node.annotation]
        for part in parts:
            if part is not None:
                skipped.update(map(id, ast.walk(part)))
    return skipped


def mutants(text):
    tree = ast.parse(text)
    skipped = left_alone(tree)
    found = []
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            for place, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or id(node) in skipped:
                    continue
                for other in variants(node):
                    original = ast.unparse(node)
                    ast.copy_location(other, node)
                    if isinstance(value, list):
                        value[place] = other
                    else:
                        setattr(parent, name, other)
                    found.append(
                        Mutant(node.lineno, original, ast.unparse(other), ast.unparse(ast.fix_missing_locations(tree)))
                    )
                    if isinstance(value, list):
                        value[place] = node
                    else:
                        setattr(parent, name, node)
    return sorted(found, key=lambda mutant: mutant.line)


def killed(mutant, folder):
    """Whether the tests notice: they are run in a fork, so that what they import is imported once."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=folder, delete=False) as file:
        file.write(mutant.text)
    child = os.fork()
    if child == 0:
        import pytest

        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.environ["LIMITS_SOURCE"] = file.name
        try:
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", SELECT, *SUITE])
        finally:
            os._exit(0 if int(code) == 0 else 1)
    begin = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            Path(file.name).unlink()
            return os.waitstatus_to_exitcode(status) != 0
        if time.monotonic() - begin > LONGEST:
            os.kill(child, 9)
            os.waitpid(child, 0)
            Path(file.name).unlink()
            return True
        time.sleep(0.02)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", metavar="LINE", help="only faults on these lines")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.chdir(ROOT)
    # Imported before the forks; not the limiter's source, which each fork reads for itself.
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401

    import chatvla_edge.runtime.arm_model
    import chatvla_edge.runtime.limits  # noqa: F401

    text = SOURCE.read_text()
    todo = [m for m in mutants(text) if not options.only or m.line in options.only]
    begin = time.monotonic()
    survivors = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        if killed(Mutant(0, "", "", text), folder):
            sys.exit("the tests fail on the source as it is")
        for number, (mutant, dead) in enumerate(zip(todo, pool.map(lambda m: killed(m, folder), todo), strict=True), 1):
            if not dead:
                survivors.append(mutant)
                print(f"survives: line {mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
            if number % 50 == 0:
                print(
                    f"{number} of {len(todo)}, {len(survivors)} survive, {time.monotonic() - begin:.0f} s", flush=True
                )
    print(f"{len(todo)} faults, {len(todo) - len(survivors)} found, {len(survivors)} survive")
    if options.json:
        rows = [{"line": m.line, "before": m.before, "after": m.after} for m in survivors]
        options.json.write_text(json.dumps({"faults": len(todo), "survivors": rows}, indent=1))


if __name__ == "__main__":
    main()
