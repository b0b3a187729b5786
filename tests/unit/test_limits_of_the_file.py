"""What keeps validate_npu.py readable: short lines, short functions, few parameters, few branches."""

import ast

import validate_npu as v

SOURCE = open(v.__file__, encoding="utf-8").read()
FUNCTIONS = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
BRANCHES = (ast.If, ast.For, ast.While, ast.Try, ast.With)


def test_no_line_has_more_than_120_columns():
    assert [line for line in SOURCE.splitlines() if len(line) > 120] == []


def test_no_function_has_more_than_60_lines_6_parameters_or_20_branches():
    for function in FUNCTIONS:
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        branches = sum(isinstance(node, BRANCHES) for node in ast.walk(function))
        assert function.end_lineno - function.lineno < 60, function.name
        assert len([each for each in parameters if each.arg != "self"]) <= 6, function.name
        assert branches <= 20, function.name
