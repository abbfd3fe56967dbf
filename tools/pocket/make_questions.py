"""Wrote questions.jsonl, the 200 fixed items that judge pocket. Run again only to replace them all.

150 questions, each about one thing of the library, and 50 code prefixes. Each says how new it is to the model:
    seen          the training text asks this function in these words
    new_pair      it asks other functions in these words, and this one in others; this question is withheld from it
    new_phrasing  it asks nothing in these words: the phrasings below stand nowhere else
    stdlib        the prefix of a code item is the library's own
    new           the prefix was written for this file
make_data.py withholds what is new, and stops if a question is on the wrong side.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from extract import gather
from phrasings import phrasings

SEEN = """
len sorted enumerate zip isinstance str.split list.append dict.get itertools.chain itertools.groupby
functools.lru_cache functools.partial collections.Counter collections.deque os.getcwd os.path.join os.listdir
re.compile re.search json.dumps json.loads math.sqrt math.floor random.choice random.shuffle datetime.timedelta
pathlib.Path sys.exit time.sleep subprocess.run threading.Thread asyncio.run asyncio.gather logging.getLogger
csv.reader io.StringIO statistics.mean heapq.heappush bisect.bisect_left textwrap.dedent shutil.rmtree
tempfile.TemporaryDirectory urllib.parse.urlparse socket.gethostbyname hashlib.sha256 base64.b64encode struct.pack
copy.deepcopy pprint.pprint contextlib.contextmanager dataclasses.dataclass enum.Enum typing.Optional
argparse.ArgumentParser unittest.TestCase ValueError itertools heapq pickle sqlite3
"""
NEW_PAIR = """
abs print open sum reversed str.join str.replace list.sort set.union dict.items itertools.product itertools.islice
functools.reduce collections.defaultdict collections.namedtuple os.remove os.path.exists os.walk re.findall json.load
math.gcd math.factorial random.randint datetime.date sys.getsizeof time.perf_counter subprocess.Popen threading.Lock
asyncio.sleep logging.basicConfig csv.DictReader statistics.median heapq.nlargest textwrap.wrap shutil.copytree
tempfile.mkdtemp urllib.parse.quote hashlib.md5 struct.unpack copy.copy contextlib.suppress dataclasses.asdict
pickle.dumps KeyError json
"""
NEW_PHRASING = """
max min hasattr callable str.strip str.upper list.pop set.add itertools.permutations itertools.zip_longest
functools.wraps collections.OrderedDict collections.ChainMap os.mkdir os.path.basename os.getpid re.sub re.split
json.dump math.ceil math.log random.sample random.seed datetime.datetime sys.argv time.time threading.Event
asyncio.create_task logging.warning csv.writer statistics.stdev heapq.heappop textwrap.fill shutil.move
socket.gethostname base64.b64decode secrets.token_hex glob.glob weakref.ref uuid.uuid4 zlib.compress
operator.itemgetter inspect.signature FileNotFoundError shutil
"""
PHRASINGS = """
Could you tell me what {n} is good for?
I came across {n} in some code. What does it do?
In one sentence, what does {n} do?
Please summarize {n}.
I am new to Python. What is the point of {n}?
Why would somebody use {n}?
My teacher mentioned {n} yesterday. What is that?
Quick question: what exactly does {n} do?
Somebody on my team uses {n} everywhere. What is it used for?
""".strip().splitlines()

STDLIB_CODE = [
    ("textwrap", "def dedent(text):\n"),
    ("bisect", "def bisect_left(a, x, lo=0, hi=None, *, key=None):\n"),
    ("heapq", "def heappush(heap, item):\n"),
    ("heapq", "def nsmallest(n, iterable, key=None):\n"),
    ("posixpath", "def join(a, *p):\n"),
    ("posixpath", "def basename(p):\n"),
    ("shutil", "def copyfileobj(fsrc, fdst, length=0):\n"),
    ("statistics", "def mean(data):\n"),
    ("random", "def shuffle(self, x):\n"),
    ("functools", "def wraps(wrapped,\n"),
    ("fnmatch", "def fnmatch(name, pat):\n"),
    ("base64", "def b64encode(s, altchars=None):\n"),
    ("contextlib", "def contextmanager(func):\n"),
    ("glob", "def glob(pathname, *, root_dir=None, dir_fd=None, recursive=False,\n"),
    ("calendar", "def isleap(year):\n"),
]
NEW_CODE = [
    'def add(a, b):\n    """Return the sum of a and b."""\n',
    'def factorial(n):\n    """Return n factorial."""\n',
    'def is_even(number):\n    """Return True if number is even."""\n',
    'def read_lines(path):\n    """Return the lines of a file as a list."""\n    with open(path) as file:\n',
    'def write_text(path, text):\n    """Write text to a file."""\n',
    'def count_words(text):\n    """Return a dictionary of word counts."""\n    counts = {}\n    for word in text.split():\n',
    'def largest(numbers):\n    """Return the largest of the numbers."""\n',
    'def reverse_string(s):\n    """Return the string reversed."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    'class Point:\n    """A point in the plane."""\n\n    def __init__(self, x, y):\n',
    "class Counter:\n    def __init__(self):\n        self.value = 0\n\n    def increment(self):\n",
    "class Animal:\n    def __init__(self, name):\n        self.name = name\n\n    def __repr__(self):\n",
    "import os\n\ndef list_files(directory):\n",
    "import json\n\ndef load_config(path):\n",
    "import sys\n\ndef main():\n",
    "import re\n\ndef find_numbers(text):\n",
    "import time\n\ndef wait_for(seconds):\n",
    "import random\n\ndef pick_one(items):\n",
    "import argparse\n\ndef parse_args():\n    parser = argparse.ArgumentParser()\n",
    "import unittest\n\nclass TestAddition(unittest.TestCase):\n    def test_add(self):\n",
    "import threading\n\ndef worker(queue):\n",
    "import logging\n\nlogger = logging.getLogger(__name__)\n\ndef log_error(message):\n",
    "import subprocess\n\ndef run_command(args):\n",
    "from collections import defaultdict\n\ndef group_by_length(words):\n",
    "from pathlib import Path\n\ndef find_python_files(root):\n",
    "for i in range(10):\n",
    "with open('data.txt') as f:\n",
    "try:\n    value = int(text)\nexcept ValueError:\n",
    "if __name__ == '__main__':\n",
    "def fibonacci(n):\n    a, b = 0, 1\n",
    "def flatten(lists):\n    result = []\n    for item in lists:\n",
    "def safe_divide(a, b):\n    try:\n",
    "async def fetch(reader):\n",
    "def binary_search(items, target):\n    low = 0\n    high = len(items) - 1\n    while low <= high:\n",
    "def merge_dicts(first, second):\n    result = dict(first)\n",
]


def main() -> None:
    rng = random.Random(7)
    facts = {fact.name: fact for fact in gather()}
    items = []
    for split, names in (("seen", SEEN), ("new_pair", NEW_PAIR), ("new_phrasing", NEW_PHRASING)):
        deck: list[str] = []
        for i, name in enumerate(names.split()):
            fact = facts[name]
            if split == "new_phrasing":
                template = PHRASINGS[i % len(PHRASINGS)]
            else:
                known = phrasings(fact.kind, False, False)
                # The bare name says too little to a reader of the list.
                known = [t for t in known if " " in t and (split == "new_pair" or "Hi!" not in t)]
                fresh = [t for t in known if t not in deck] or known
                template = (
                    "What does {n} do?"
                    if split == "seen" and i % 4 == 0 and fact.kind != "module"
                    else rng.choice(fresh)
                )
                deck.append(template)
            kind = "exception" if fact.kind == "exception" else fact.kind
            items.append(
                {
                    "kind": "question",
                    "split": split,
                    "prompt": template.format(n=name, k=kind),
                    "name": name,
                    "reference": fact.sentence,
                }
            )
    for _, prefix in STDLIB_CODE:
        items.append({"kind": "code", "split": "stdlib", "prompt": prefix})
    for prefix in NEW_CODE:
        items.append({"kind": "code", "split": "new", "prompt": prefix})
    assert len(items) == 200, len(items)
    assert len({item["prompt"] for item in items}) == 200
    path = Path(__file__).parent / "questions.jsonl"
    with path.open("w") as file:
        for i, item in enumerate(items):
            file.write(json.dumps({"id": i + 1, **item}) + "\n")
    print(f"{len(items)} items in {path}")


if __name__ == "__main__":
    main()
