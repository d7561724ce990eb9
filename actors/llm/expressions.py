"""Arithmetic expressions: a small recursive-descent parser with exact values, for text that nobody can be trusted with.

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor  = number | "(" sum ")"

Numbers are plain decimal integers. There are no signs, powers or functions, so that the size of a value is bounded by that of
the text; text and nesting are bounded too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MOST_CHARACTERS = 256
MOST_DEPTH = 32
MOST_DIGITS = 12  # of one number

_TOKENS = re.compile(r"[0-9]+|[-+*/()]")  # not \d, which takes the digits of every script
_SPACES = re.compile(r"[ \t\r\n]+")


class ExpressionError(ValueError):
    """Text that is not an expression; says why."""


@dataclass(frozen=True, slots=True)
class Expression:
    """What a text comes to."""

    value: Fraction | int
    numbers: list[int]  # from left to right
    operators: set[str]


def parse(text: str) -> Expression:
    """The exact value of `text`, with the numbers and operators in it.

    Raises:
        ExpressionError: it is no expression, is too long or too deep, or divides by zero.
    """
    if len(text) > MOST_CHARACTERS:
        raise ExpressionError(f"more than {MOST_CHARACTERS} characters")
    tokens = _TOKENS.findall(text)
    if len("".join(tokens)) != len(text):
        _check_characters(text, tokens)
    parser = _Parser(tokens)
    value = parser.sum(0)
    if parser.at < len(tokens):
        raise ExpressionError(f"{tokens[parser.at]!r} comes after its end")
    return Expression(value, parser.numbers, {token for token in tokens if token in "+-*/"})


def _check_characters(text: str, tokens: list[str]) -> None:
    spaces = "".join(_SPACES.findall(text))
    if len("".join(tokens)) + len(spaces) != len(text):
        strange = next(character for character in text if character not in "0123456789+-*/() \t\r\n")
        raise ExpressionError(f"{strange!r} is neither a digit, an operator nor a parenthesis")


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction | int:
        if depth > MOST_DEPTH:
            raise ExpressionError(f"nested more than {MOST_DEPTH} deep")
        tokens = self.tokens
        value = self.product(depth)
        while self.at < len(tokens) and (operator := tokens[self.at]) in ("+", "-"):
            self.at += 1
            other = self.product(depth)
            value = value + other if operator == "+" else value - other
        return value

    def product(self, depth: int) -> Fraction | int:
        tokens = self.tokens
        value = self.factor(depth)
        while self.at < len(tokens) and (operator := tokens[self.at]) in ("*", "/"):
            self.at += 1
            other = self.factor(depth)
            if operator == "*":
                value = value * other
            elif other == 0:
                raise ExpressionError("divides by zero")
            else:
                value = Fraction(value) / other
        return value

    def factor(self, depth: int) -> Fraction | int:
        if self.at >= len(self.tokens):
            raise ExpressionError("ends where a number should be")
        token = self.tokens[self.at]
        self.at += 1
        if token == "(":
            value = self.sum(depth + 1)
            if self.at >= len(self.tokens) or self.tokens[self.at] != ")":
                raise ExpressionError("a parenthesis is not closed")
            self.at += 1
            return value
        if not token.isdecimal():
            raise ExpressionError(f"{token!r} stands where a number should be")
        if len(token) > MOST_DIGITS:
            raise ExpressionError(f"a number of more than {MOST_DIGITS} digits")
        number = int(token)
        self.numbers.append(number)
        return number
