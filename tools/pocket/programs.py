"""Small programs made up of parts, for the training text: what a function or a class of a few lines looks like.

The standard library's own code is long and unlike what a person begins to type, so that a model which knows only that ends up in the
middle of something else. Here names, arguments and bodies are drawn at random, and agree with each other. Every program parses.
None begins like an item of questions.jsonl: `make_data.py` checks that.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator

VERBS = "get find make build collect compute update check parse format convert clean split merge select remove insert create".split()
VERBS += "load save send receive print show describe validate filter sort sum scale move copy rename open close start stop".split()
NOUNS = "value item name record user order line word price score node path message number total index key entry token".split()
NOUNS += "color shape point row column page report task event date letter file account product city student book color".split()
ADJECTIVES = (
    "first last longest shortest smallest new old valid empty unique common next previous total average".split()
)
CLASSES = "Queue Account Student Book Rectangle Circle Matrix Timer Logger Cache Parser Buffer Robot Shape Vehicle Player".split()
CLASSES += "Inventory Order Product Message Node Graph Deck Card Library Person Employee Temperature Polynomial Fraction".split()
ERRORS = "ValueError TypeError KeyError IndexError OSError RuntimeError ZeroDivisionError AttributeError".split()

Make = Callable[[random.Random], str]


def plural(noun: str) -> str:
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


class Names:
    """The words of one program."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.noun, self.other = rng.sample(NOUNS, 2)
        self.many, self.others = plural(self.noun), plural(self.other)
        self.verb, self.verb2 = rng.sample(VERBS, 2)
        self.adjective = rng.choice(ADJECTIVES)
        self.error = rng.choice(ERRORS)
        self.kind = rng.choice(CLASSES)
        self.number = rng.choice((0, 1, 2, 3, 5, 7, 10, 12, 20, 50, 100, 1000))
        self.a, self.b = rng.choice(
            (("a", "b"), ("x", "y"), ("left", "right"), ("n", "m"), ("first", "second"), ("u", "v"))
        )
        self.operator = rng.choice("+ - * // %".split())
        self.compare = rng.choice("< > <= >= == !=".split())
        self.letter = rng.choice("i j k n".split())
        self.title = self.noun.capitalize()


# Each is a function with a docstring or without; {…} are attributes of Names.
BODIES = """
def {verb}_{noun}({a}, {b}):
    \"\"\"Return {a} {operator} {b}.\"\"\"
    return {a} {operator} {b}
===
def {verb}_{many}({many}):
    \"\"\"Return the {adjective} of the {many}.\"\"\"
    result = []
    for {noun} in {many}:
        if {noun} {compare} {number}:
            result.append({noun})
    return result
===
def {verb}_{many}({many}):
    \"\"\"Return a list of the {many} that are {adjective}.\"\"\"
    return [{noun} for {noun} in {many} if {noun} {compare} {number}]
===
def {adjective}_{noun}({many}):
    \"\"\"Return the {adjective} {noun}.\"\"\"
    best = None
    for {noun} in {many}:
        if best is None or {noun} {compare} best:
            best = {noun}
    return best
===
def {adjective}_{noun}({many}):
    \"\"\"Return the {adjective} of the {many}.\"\"\"
    return max({many})
===
def {adjective}_{noun}({many}):
    if not {many}:
        return None
    return sorted({many})[0]
===
def is_{adjective}({noun}):
    \"\"\"Return True if {noun} is {adjective}.\"\"\"
    return {noun} {compare} {number}
===
def is_{adjective}({noun}):
    \"\"\"Return whether the {noun} is {adjective}.\"\"\"
    return {noun} % {number} == 0
===
def {verb}_{noun}(n):
    \"\"\"Return the {noun} of n.\"\"\"
    if n <= 1:
        return 1
    return n * {verb}_{noun}(n - 1)
===
def {verb}_{noun}(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
===
def {verb}_{many}(text):
    \"\"\"Return a dictionary of {many} and how often each occurs.\"\"\"
    {others} = {{}}
    for {noun} in text.split():
        {others}[{noun}] = {others}.get({noun}, 0) + 1
    return {others}
===
def {verb}_{noun}(path):
    \"\"\"Return the {many} of a file.\"\"\"
    with open(path) as file:
        return file.read().splitlines()
===
def {verb}_{many}(path):
    {many} = []
    with open(path) as file:
        for line in file:
            {many}.append(line.strip())
    return {many}
===
def {verb}_{noun}(path, {noun}):
    \"\"\"Write the {noun} to a file.\"\"\"
    with open(path, 'w') as file:
        file.write({noun})
===
def {verb}_{noun}(text):
    \"\"\"Return the text {adjective}.\"\"\"
    return text.strip().lower()
===
def {verb}_{noun}(s):
    \"\"\"Return the string in another form.\"\"\"
    return s[::-1]
===
def {verb}_{noun}({noun}, {other}=None):
    if {other} is None:
        {other} = []
    {other}.append({noun})
    return {other}
===
def {verb}_{noun}({a}, {b}):
    try:
        return {a} / {b}
    except {error}:
        return None
===
def {verb}_{noun}(text):
    try:
        {noun} = int(text)
    except {error}:
        {noun} = {number}
    return {noun}
===
def {verb}_{noun}({many}, {noun}):
    low = 0
    high = len({many}) - 1
    while low <= high:
        middle = (low + high) // 2
        if {many}[middle] == {noun}:
            return middle
        if {many}[middle] < {noun}:
            low = middle + 1
        else:
            high = middle - 1
    return -1
===
def {verb}_{many}({many}):
    result = []
    for {noun} in {many}:
        for {other} in {noun}:
            result.append({other})
    return result
===
def {verb}_{many}({a}, {b}):
    result = dict({a})
    result.update({b})
    return result
===
def {verb}_{many}({many}, {other}):
    result = {{}}
    for {noun} in {many}:
        result[{noun}] = {other}
    return result
===
def {verb}_{many}({many}):
    total = 0
    for {noun} in {many}:
        total += {noun}
    return total
===
def {verb}_{many}(n):
    \"\"\"Yield the {adjective} {many}.\"\"\"
    for {letter} in range(n):
        yield {letter} {operator} {number}
===
async def {verb}_{noun}({noun}, {other}):
    {many} = await {noun}.{verb2}({other})
    return {many}
===
async def {verb}_{noun}(stream):
    data = await stream.read({number})
    return data.decode()
===
import os

def {verb}_{many}(folder):
    {many} = []
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            {many}.append(path)
    return {many}
===
import os

def {verb}_{noun}(path):
    if not os.path.exists(path):
        return None
    return os.path.getsize(path)
===
import json

def {verb}_{noun}(path, {noun}):
    with open(path, 'w') as file:
        json.dump({noun}, file)
===
import json

def {verb}_{noun}(text):
    return json.loads(text)
===
import json

def {verb}_{noun}(name):
    with open(name) as file:
        {noun} = json.load(file)
    return {noun}
===
import sys

def {verb}_{noun}():
    for {noun} in sys.argv[1:]:
        print({noun})
    return 0
===
import sys

def main(argv):
    {noun} = argv[1]
    print({noun})

if __name__ == '__main__':
    main(sys.argv)
===
import re

def {verb}_{many}(text):
    return re.findall(r'[a-z]+', text)
===
import re

def {verb}_{noun}(text):
    match = re.search(r'\\d+', text)
    if match is None:
        return None
    return int(match.group())
===
import time

def {verb}_{noun}(n):
    start = time.time()
    time.sleep(n)
    return time.time() - start
===
import random

def {verb}_{noun}({many}):
    return random.choice({many})
===
import random

def {verb}_{many}(n):
    return [random.randint(1, {number}) for _ in range(n)]
===
import argparse

def {verb}_arguments():
    parser = argparse.ArgumentParser(description='{verb} {many}')
    parser.add_argument('{noun}')
    parser.add_argument('--{other}', type=int, default={number})
    return parser.parse_args()
===
import argparse

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--{noun}', help='the {noun}')
    args = parser.parse_args()
    print(args.{noun})
===
import unittest

class Test{kind}(unittest.TestCase):
    def test_{verb}(self):
        self.assertEqual({number} + 1, {number} + 1)

    def test_{noun}(self):
        {noun} = {number}
        self.assertTrue({noun} >= 0)
===
import threading

def {verb}_{many}({many}):
    threads = []
    for {noun} in {many}:
        thread = threading.Thread(target=print, args=({noun},))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
===
import threading

def {verb}_{noun}({others}):
    while True:
        {other} = {others}.get()
        if {other} is None:
            break
        print({other})
        {others}.task_done()
===
import logging

logger = logging.getLogger(__name__)

def {verb}_{noun}({noun}):
    logger.info('{verb} %s', {noun})
    return {noun}
===
import subprocess

def {verb}_{noun}(command):
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout
===
from collections import defaultdict

def {verb}_{many}({many}):
    {others} = defaultdict(list)
    for {noun} in {many}:
        {others}[{noun}[0]].append({noun})
    return {others}
===
from collections import Counter

def {verb}_{many}({many}):
    return Counter({many}).most_common({number})
===
from pathlib import Path

def {verb}_{many}(folder):
    return sorted(Path(folder).glob('*.txt'))
===
from pathlib import Path

def {verb}_{noun}(folder, name):
    path = Path(folder) / name
    if not path.exists():
        path.write_text('')
    return path
===
from dataclasses import dataclass

@dataclass
class {kind}:
    {noun}: str
    {other}: int = {number}

    def {verb}(self):
        return self.{other} + 1
===
class {kind}:
    def __init__(self):
        self.{many} = []

    def {verb}(self, {noun}):
        self.{many}.append({noun})

    def {verb2}(self):
        return self.{many}.pop()

    def __len__(self):
        return len(self.{many})
===
class {kind}:
    \"\"\"A {noun} with {others}.\"\"\"

    def __init__(self, {noun}, {other}):
        self.{noun} = {noun}
        self.{other} = {other}

    def __repr__(self):
        return f'{kind}({{self.{noun}}}, {{self.{other}}})'
===
class {kind}:
    def __init__(self, {noun}):
        self.{noun} = {noun}

    def {verb}(self):
        self.{noun} += 1
        return self.{noun}

    def __str__(self):
        return str(self.{noun})
===
class {kind}:
    def __init__(self):
        self.{noun} = {number}

    def {verb}(self):
        self.{noun} += 1

    def {verb2}(self):
        self.{noun} = {number}
===
for {noun} in range({number}):
    print({noun} {operator} 2)
===
for {letter}, {noun} in enumerate({many}):
    print({letter}, {noun})
===
with open('{many}.txt') as file:
    for line in file:
        print(line.strip())
===
with open('{noun}.txt', 'w') as f:
    f.write('{noun}')
===
try:
    {noun} = float({other})
except {error}:
    print('not a {noun}')
    {noun} = {number}
===
if {noun} {compare} {number}:
    print('{noun}')
else:
    print('{other}')
===
while {noun} > 0:
    {noun} -= 1
    print({noun})
===
{many} = []
for {letter} in range({number}):
    {many}.append({letter} {operator} 3)
print({many})
===
if __name__ == '__main__':
    {noun} = {verb}_{noun}()
    print({noun})
""".strip().split("\n===\n")  # fmt: skip


def programs(count: int, seed: int = 0) -> Iterator[str]:
    """`count` different programs, each of one part or two; some without their docstring."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        parts = [rng.choice(BODIES).format(**vars(Names(rng))) for _ in range(rng.choice((1, 1, 1, 2)))]
        if rng.random() < 0.4:
            parts = ["\n".join(line for line in part.split("\n") if '"""' not in line) for part in parts]
        text = "\n\n".join(parts) + "\n"
        if text not in seen:
            ast.parse(text)
            seen.add(text)
            yield text
