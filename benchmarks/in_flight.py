"""What a thread loads from global memory and waits for, read from machine code (SASS) from top to bottom.

A load is on its way until the next instruction that names one of the registers that it fills. An asynchronous copy is
on its way until an instruction waits for its group.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*([^;]*);", re.MULTILINE)
_REGISTER = re.compile(r"\b(U?R)(\d+)")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x\w+)\]")
NOTHING: Mapping[int, str] = MappingProxyType({})


class InFlight(NamedTuple):
    """What a thread loads and waits for.

    Args:
        loads, bytes: the most that are on their way at the same time, asynchronous copies included.
        ahead: the most bytes of asynchronous copies alone.
        loaded: the bytes of all ordinary loads in a part of the code.
        waits: how often the thread waits for ordinary loads there. A wait for one covers all that were issued before.
    """

    loads: int = 0
    bytes: int = 0
    ahead: int = 0
    loaded: int = 0
    waits: int = 0


def in_flight(
    sass: str, part: str = "", pointers: Mapping[int, str] = NOTHING, cached: Collection[str] = ()
) -> InFlight:
    """Reads the code of a kernel.

    Args:
        sass: the code.
        part: the part of it that `loaded` and `waits` are about; all of it if empty.
        pointers: the kernel's arguments by their places in the constant memory.
        cached: arguments whose loads don't count.
    """
    begin = sass.index(part)
    end = begin + len(part or sass)
    arguments = _Arguments(pointers)
    loads: list[tuple[set[int], int]] = []  # registers, bytes
    groups: list[list[int]] = [[]]  # bytes of each copy; the last group is open
    new = 0  # loads since the last wait
    most = InFlight()
    for instruction in _INSTRUCTION.finditer(sass):
        op, operands = instruction.groups()
        name, _, modifiers = op.partition(".")
        inside = begin <= instruction.start() < end
        named = {int(number) for kind, number in _REGISTER.findall(operands) if kind == "R"}
        if any(registers & named for registers, _ in loads[len(loads) - new :]):
            most, new = most._replace(waits=most.waits + inside), 0
        loads = [load for load in loads if not load[0] & named]
        counts = not arguments.of_address(operands) & set(cached)
        arguments.follow(op, operands)
        size = sass_bytes(modifiers)
        if name == "LDG" and counts:
            loads.append((_filled(operands, size), size))
            most, new = most._replace(loaded=most.loaded + size * inside), new + 1
        elif name == "LDGSTS" and counts:
            groups[-1].append(size)
        elif name == "LDGDEPBAR":
            groups.append([])
        elif op == "DEPBAR.LE" and operands.startswith("SB0"):
            still = int(operands.split(",")[1], 16)
            groups = groups[max(len(groups) - 1 - still, 0) :]
        copies = [size for group in groups for size in group]
        most = most._replace(
            loads=max(most.loads, len(loads) + len(copies)),
            bytes=max(most.bytes, sum(size for _, size in loads) + sum(copies)),
            ahead=max(most.ahead, sum(copies)),
        )
    return most


def sass_bytes(modifiers: str) -> int:
    """`LDG.E.U16` accesses 2 bytes, `LDG.E` 4, `LDG.E.128` 16."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[modifier] for modifier in modifiers.split(".") if modifier in sizes), 4)


class _Arguments:
    """Which arguments of the kernel the content of each register was computed from."""

    def __init__(self, pointers: Mapping[int, str]):
        self._pointers = pointers
        self._of: dict[tuple[str, str], set[str]] = {}

    def of_address(self, operands: str) -> set[str]:
        """The arguments that an access reads or writes: its address stands in the last brackets."""
        return self._of_registers(_REGISTER.findall(operands.rpartition("[")[2]))

    def follow(self, op: str, operands: str) -> None:
        """The first operand takes what the others were computed from. What is loaded is no address."""
        if not _REGISTER.match(operands):
            return
        (kind, number), *others = _REGISTER.findall(operands)
        found: set[str] = set()
        if not op.startswith("LDG"):
            places = (int(place, 16) for place in _CONSTANT.findall(operands))
            found = {self._pointers[place] for place in places if place in self._pointers}
            found |= self._of_registers(others)
        for i in range(2 if {"WIDE", "64"} & set(op.split(".")) else 1):
            self._of[kind, str(int(number) + i)] = found

    def _of_registers(self, registers: list[tuple[str, str]]) -> set[str]:
        return set().union(*(self._of.get(register, ()) for register in registers))


def _filled(operands: str, size: int) -> set[int]:
    """The registers of 4 bytes that a load fills, from those before its address."""
    first = [int(number) for _, number in _REGISTER.findall(operands.partition("[")[0].removesuffix("desc"))]
    each = max(size // 4 // max(len(first), 1), 1)
    return {start + i for start in first for i in range(each)}
