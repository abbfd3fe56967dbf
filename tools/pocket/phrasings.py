"""How people ask: the phrasings of the training set, and normalizing a question to compare two.

The phrasings that only the judgement uses stand in `make_questions.py` and must not come in here.
"""

import re

# {n} is the full name, {s} its last part, {m} its module, {k} "function", "method", "class" …
_ANY = """
What does {n} do?
What does `{n}` do?
what does {n} do
What is {n}?
What is `{n}`?
what is {n}
What is {n} for?
What is `{n}` used for?
What is the purpose of {n}?
What is the use of {n} in Python?
Explain {n}.
Explain `{n}`
Explain what {n} does.
Can you explain {n}?
Could you describe {n}?
Describe {n}.
Tell me about {n}.
Tell me what {n} does.
Tell me what `{n}` is.
In Python, what does {n} do?
In Python, what is {n}?
When would I use {n}?
When should I use `{n}`?
What can I use {n} for?
How would you describe {n}?
Give me a short description of {n}.
I do not understand {n}. What does it do?
Do you know {n}?
Do you know what {n} does?
Please explain {n} to me.
Please tell me what {n} does.
What does Python's {n} do?
Hi! What does {n} do?
{n}
{n}?
`{n}`
help({n})
""".strip().splitlines()
_KIND = """
What does the {k} {n} do?
What does the {n} {k} do?
What is the {n} {k}?
Explain the {k} {n}.
Describe the {k} `{n}`.
What is the {k} {n} for?
""".strip().splitlines()
_CALL = """
What does {n}() do?
What does `{n}()` do?
What does calling {n} do?
What is {n}() for?
Explain {n}().
""".strip().splitlines()
_MEMBER = """
What does {s} in {m} do?
What does {s} from {m} do?
What does the {s} {k} of {m} do?
What is {s} in the {m} module?
Explain {s} from the {m} module.
""".strip().splitlines()
_MODULE = """
What is the {n} module?
What is the {n} module for?
What does the {n} module do?
What does the module {n} do?
What is the purpose of the {n} module?
Explain the {n} module.
Describe the {n} module.
Tell me about the {n} module.
What does the `{n}` module do?
What can I do with the {n} module?
Why would I import {n}?
What does import {n} give me?
""".strip().splitlines()
_SHORT = ["What does {s} do?", "What is {s}?", "Explain {s}.", "What does `{s}` do?", "What is {s} used for?"]

SIGNATURE = [
    "What is the signature of {n}?",
    "How do I call {n}?",
    "What arguments does {n} take?",
    "Which parameters does `{n}` have?",
]
EXPLAIN_SIGNATURE = ["Explain this signature: {c}", "What does {c} do?", "What does `{c}` do?"]
DETAILS = ["Tell me more about {n}.", "Explain {n} in detail.", "What should I know about {n}?"]
IMPORT = ["How do I import {n}?", "How can I use {n} in my program?"]
REVERSE = [
    "Which {k} {p}?",
    "What is the name of the {k} that {p}?",
    "Which {k} in Python {p}?",
    "I need a {k} that {p}.",
]
REVERSE_MODULE = ["Which module {p}?", "Which Python module {p}?"]
CONTENTS = [
    "What is in the {n} module?",
    "What does the {n} module contain?",
    "List some functions of the {n} module.",
    "What does {n} have?",
]


def phrasings(kind: str, in_module: bool, short_is_known: bool) -> list[str]:
    """Templates for one fact. in_module: its name is module.name. short_is_known: the last part alone names it."""
    found = list(_ANY)
    if kind == "module":
        return found + _MODULE
    found += _KIND
    if kind in ("function", "method"):
        found += _CALL
    if in_module:
        found += _MEMBER
    if short_is_known:
        found += _SHORT
    return found


def normalized(question: str) -> str:
    """Two questions that differ in case, quotes, brackets or punctuation alone are the same question."""
    return re.sub(r"\s+", " ", re.sub(r"[`?!,;:\"'()]|\.(?=\s|$)", " ", question.lower())).strip()


KEYWORDS = {
    "for": "The `for` statement iterates over the elements of a sequence or another iterable object.",
    "while": "The `while` statement repeats its block as long as an expression is true.",
    "if": "The `if` statement runs a block only if its condition is true.",
    "elif": "The `elif` clause tests a further condition when the ones before it were false.",
    "else": "The `else` clause runs when the conditions before it were false, or when a loop ended without break.",
    "try": "The `try` statement specifies exception handlers and cleanup code for a group of statements.",
    "except": "The `except` clause handles exceptions that are raised in the try block.",
    "finally": "The `finally` clause runs cleanup code whether or not an exception was raised.",
    "raise": "The `raise` statement raises an exception.",
    "with": "The `with` statement wraps a block with methods defined by a context manager.",
    "def": "The `def` statement defines a function.",
    "class": "The `class` statement defines a class.",
    "return": "The `return` statement leaves the current function with a value.",
    "yield": "The `yield` expression makes a function a generator and hands a value to its caller.",
    "lambda": "The `lambda` expression creates an anonymous function.",
    "import": "The `import` statement finds a module, loads it and binds a name to it.",
    "from": "The `from` form of the import statement imports names out of a module.",
    "global": "The `global` statement declares that names refer to the module's global variables.",
    "nonlocal": "The `nonlocal` statement declares that names refer to variables of the enclosing function.",
    "assert": "The `assert` statement checks a condition and raises AssertionError if it is false.",
    "pass": "The `pass` statement does nothing.",
    "break": "The `break` statement ends the nearest enclosing loop.",
    "continue": "The `continue` statement goes on with the next cycle of the nearest enclosing loop.",
    "del": "The `del` statement deletes names, attributes or items.",
    "async": "The `async` keyword declares a coroutine function, or an asynchronous for or with statement.",
    "await": "The `await` expression suspends a coroutine until an awaitable object has finished.",
    "match": "The `match` statement compares a value with patterns, one case after the other.",
    "is": "The `is` operator tests whether two names refer to the same object.",
    "in": "The `in` operator tests whether a container holds a value.",
    "not": "The `not` operator yields True if its argument is false, and False otherwise.",
    "and": "The `and` operator yields its second operand if the first one is true, and the first one otherwise.",
    "or": "The `or` operator yields its first operand if that is true, and the second one otherwise.",
}
KEYWORD_QUESTIONS = [
    "What does {n} do?", "What does `{n}` do?", "What does the {n} statement do?", "What does the keyword {n} do?",
    "Explain the {n} keyword.",
    "What is {n} in Python?", "What does {n} mean in Python?", "Explain {n}.", "What is the {n} keyword for?", "What is `{n}`?",
]  # fmt: skip

SMALL_TALK = {
    "I am pocket, a small language model inside Quire. I know a little about Python's standard library.": [
        "Who are you?", "What are you?", "What is your name?", "Are you a language model?", "who are you",
        "Tell me about yourself.",
        "What is pocket?", "Are you human?", "Are you ChatGPT?", "Introduce yourself.",
    ],
    "Hello! Ask me what something in Python's standard library does.": [
        "Hello", "Hello!", "Hi", "Hi!", "hello", "hi", "Hey", "Good morning", "Hello there!", "Good evening.",
    ],
    "You are welcome.": ["Thanks", "Thank you", "Thank you!", "thanks a lot", "Thanks!"],
    "You can ask me what a module, class or function of Python's standard library does.": [
        "What can you do?", "What can I ask you?", "Help", "help", "What do you know?", "How can you help me?",
        "What should I ask?",
    ],
    "I am well, thank you. What would you like to know about Python?": ["How are you?", "How are you doing?", "how are you"],
    "Quire is an engine that serves language models with a KV cache kept in blocks.": [
        "What is Quire?", "What is quire?", "Tell me about Quire.", "What does Quire do?", "Explain Quire.",
    ],
    "Python is a programming language that is easy to read and comes with a large standard library.": [
        "What is Python?", "Tell me about Python.", "Explain Python.", "What is the Python language?",
    ],
    "Goodbye!": ["Bye", "Goodbye", "bye", "See you!"],
    "Quire trained me from scratch on the documentation and sources of Python's standard library.": [
        "Who made you?", "Who trained you?", "What were you trained on?", "Where do you come from?", "How were you trained?",
    ],
}  # fmt: skip
