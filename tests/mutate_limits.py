"""Tests the limiter's tests: each small fault put into ``runtime/limits.py`` must make them fail.

    python tests/mutate_limits.py [--jobs N] [--only LINE ...] [--state FILE] [--json FILE]

Faults, one at a time: a comparison widened, narrowed or turned; + and -, * and / exchanged; a number changed; min and
max, and/or, True/False exchanged; a sign or a `not` dropped; += and -= exchanged; a call whose value nobody takes left
out. Messages, docstrings and annotations are left alone. Faults that survive are printed as they stand in the source;
``mutation.md`` beside this file says of each why no test can or need tell it from the original.

Only tests of the interpreted source are run, without the comparison with the compiled one: that would tell every
fault, since the compiled module does not have it.

The whole run takes an hour or two. With ``--state`` every verdict is kept as it falls, and an interrupted run goes on;
verdicts are of one text of the limiter and are dropped when it changes. ``--again`` judges the kept survivors anew,
which is what one does after adding a test.
"""

import argparse
import ast
import hashlib
import json
import os
import sys
import time
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


class Run:
    """A pytest plugin: collects once, then judges every mutant in a fork whose copy of the module it is put into."""

    def __init__(self, text, jobs, only, verdicts):
        self.jobs, self.verdicts = jobs, verdicts
        self.todo = [m for m in mutants(text) if not only or m.line in only]
        self.survivors = []

    def pytest_runtestloop(self, session):
        from support import limits_source

        module = limits_source.MODULES["interpreted"]
        items = list(session.items)
        took = self.baseline(items, session)
        order = sorted(items, key=lambda item: took[item.nodeid])
        begin = time.monotonic()
        running = {}
        waiting = []
        outcome = {}
        for number, mutant in list(enumerate(self.todo))[::-1]:
            known = self.verdicts.of(mutant)
            if known is None:
                waiting.append((number, mutant))
            else:
                outcome[number] = known
                self.survivors += [] if known else [mutant]
        print(f"{len(self.todo)} faults, {len(outcome)} judged before", flush=True)
        while waiting or running:
            while waiting and len(running) < self.jobs:
                number, mutant = waiting.pop()
                # Flushed, or the child would write it once more.
                sys.stdout.flush()
                child = os.fork()
                if child == 0:
                    os._exit(self.judge(mutant, module, order, session))
                running[child] = (number, time.monotonic())
            for child, (number, since) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    dead = os.waitstatus_to_exitcode(status)
                    killer = dead - 10 if dead >= 10 else None
                elif time.monotonic() - since > LONGEST:
                    os.kill(child, 9)
                    os.waitpid(child, 0)
                    dead, killer = True, None
                else:
                    continue
                del running[child]
                outcome[number] = bool(dead)
                self.verdicts.keep(self.todo[number], bool(dead))
                if killer is not None and killer < len(order):
                    # What found this fault is likely to find the next one, a line below.
                    order.insert(0, order.pop(killer))
                if not dead:
                    mutant = self.todo[number]
                    self.survivors.append(mutant)
                    print(f"survives: line {mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
                if len(outcome) % 100 == 0:
                    spent = time.monotonic() - begin
                    print(
                        f"{len(outcome)} of {len(self.todo)}, {len(self.survivors)} survive, {spent:.0f} s", flush=True
                    )
            time.sleep(0.005)
        return True

    def baseline(self, items, session):
        """Seconds per test on the source as it is, which must pass."""
        took = {}
        for item in items:
            begin = time.monotonic()
            if not self.passes(item, session):
                sys.exit(f"the tests fail on the source as it is: {item.nodeid}")
            took[item.nodeid] = time.monotonic() - begin
        return took

    @staticmethod
    def passes(item, session):
        from _pytest.runner import runtestprotocol

        reports = runtestprotocol(item, log=False, nextitem=None)
        return not any(report.failed for report in reports)

    def judge(self, mutant, module, order, session):
        """In the fork: 0 if every test passes, else 10 + the place of the one that failed (at most 255)."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            exec(compile(mutant.text, str(SOURCE), "exec"), module.__dict__)
            for place, item in enumerate(order):
                if not self.passes(item, session):
                    return min(10 + place, 255)
        except BaseException:  # noqa: BLE001  (whatever the fault raised, it was noticed)
            return 1
        return 0


class Verdicts:
    """What became of each fault, kept in ``file`` (None: nowhere) line by line; True: found."""

    def __init__(self, text, file, again):
        self.file, self.found = file, {}
        head = {"limits": hashlib.sha256(text.encode()).hexdigest()}
        if file is None:
            return
        lines = file.read_text().splitlines() if file.is_file() else []
        if lines and json.loads(lines[0]) == head:
            for line in lines[1:]:
                fault, verdict = json.loads(line)
                self.found[fault[:16]] = verdict
        if again:
            self.found = {fault: verdict for fault, verdict in self.found.items() if verdict}
        kept = [json.dumps(head), *(json.dumps(row) for row in self.found.items())]
        file.write_text("".join(f"{line}\n" for line in kept))

    @staticmethod
    def key(mutant):
        return hashlib.sha256(mutant.text.encode()).hexdigest()[:16]

    def of(self, mutant):
        return self.found.get(self.key(mutant))

    def keep(self, mutant, verdict):
        self.found[self.key(mutant)] = verdict
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps([self.key(mutant), verdict]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", metavar="LINE", help="only faults on these lines")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep verdicts there, and go on from them")
    parser.add_argument("--again", action="store_true", help="judge the survivors in the state file anew")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    os.chdir(ROOT)
    import pytest  # after chdir: it reads its settings from where it stands

    text = SOURCE.read_text()
    run = Run(text, options.jobs, options.only, Verdicts(text, options.state, options.again))
    code = pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-k", SELECT, *SUITE], plugins=[run])
    if code not in (0, 5):
        sys.exit(int(code))
    survivors = sorted(run.survivors, key=lambda mutant: mutant.line)
    print(f"{len(run.todo)} faults, {len(run.todo) - len(survivors)} found, {len(survivors)} survive")
    if options.json:
        rows = [{"line": m.line, "before": m.before, "after": m.after} for m in survivors]
        options.json.write_text(json.dumps({"faults": len(run.todo), "survivors": rows}, indent=1))


if __name__ == "__main__":
    main()
