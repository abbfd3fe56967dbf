"""Facts about Python's standard library: what each public module, class and function is for.

Pure Python is read by `ast`, and not run. What is written in C (builtins, itertools, math …) has no source to read: those
modules, and the best known others, are imported, and their docstrings asked for.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from curated import MODULES, PURPOSES
from sentences import clean, first_sentence, predicate

STDLIB = Path(sysconfig.get_paths()["stdlib"])

# How often what they hold is asked for, 3 most.
TIERS = {
    3: """
        builtins itertools functools collections os os.path re json math random string datetime pathlib sys time subprocess
        threading asyncio logging csv io statistics heapq bisect textwrap shutil tempfile urllib.parse urllib.request socket
        hashlib base64 struct copy pprint contextlib dataclasses enum typing argparse unittest operator glob fnmatch pickle
        queue inspect types abc decimal fractions calendar secrets uuid zlib gzip zipfile getpass platform traceback warnings
        weakref array collections.abc concurrent.futures
    """,
    2: """
        ast atexit binascii bz2 cmath codecs configparser contextvars cProfile ctypes curses difflib dis doctest email
        email.message email.utils errno faulthandler filecmp fileinput gc getopt gettext graphlib hmac html html.parser http
        http.client http.cookies http.server imaplib importlib importlib.metadata importlib.resources importlib.util ipaddress
        keyword linecache locale lzma mailbox marshal mimetypes mmap multiprocessing multiprocessing.pool
        multiprocessing.shared_memory numbers pdb pkgutil poplib posixpath profile pstats pty quopri readline reprlib resource
        runpy sched select selectors shelve shlex signal site smtplib socketserver sqlite3 ssl stat stringprep symtable
        sysconfig tarfile termios timeit token tokenize trace tracemalloc tty unicodedata unittest.mock urllib.error
        urllib.robotparser venv wave webbrowser wsgiref.simple_server xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils
        xmlrpc.client xmlrpc.server zipapp zipimport zoneinfo colorsys copyreg code codeop compileall crypt fcntl ftplib grp
        pwd modulefinder netrc nturl2path optparse plistlib py_compile pyclbr pydoc rlcompleter string.templatelib tabnanny
        telnetlib tkinter turtle asyncio.subprocess asyncio.streams logging.handlers logging.config json.decoder json.encoder
        ntpath opcode syslog
    """,
}
IMPORTED = [name for tier in (3, 2) for name in TIERS[tier].split()]
_TIER_OF = {name: tier for tier, names in TIERS.items() for name in names.split()}

_SKIPPED = re.compile(
    r"(^|/)(test|tests|idle_test|idlelib|lib2to3|turtledemo|site-packages|dist-packages|__pycache__|ensurepip|config-|pydoc_data|"
    r"distutils|lib-dynload|msilib|_sysconfigdata)"
)


@dataclass(frozen=True)
class Fact:
    """One public thing of the library.

    name: as a user writes it: "itertools.chain", "str.split", "len". purpose: a predicate, "returns …"; `sentence` is whole.
    signature: "(iterable, key=None)" or "". details: the rest of the docstring's first paragraph, a text or "".
    """

    name: str
    kind: str
    purpose: str
    signature: str
    details: str
    module: str
    tier: int

    @property
    def sentence(self) -> str:
        subject = f"The `{self.name}` module" if self.kind == "module" else f"`{self.name}`"
        return f"{subject} {self.purpose}."


def source_files() -> Iterator[tuple[str, Path]]:
    """(module name, path) of the library's own pure-Python modules, in order."""
    for path in sorted(STDLIB.rglob("*.py")):
        relative = path.relative_to(STDLIB).as_posix()
        if _SKIPPED.search(relative) or relative.startswith("encodings/"):
            continue
        yield relative[:-3].replace("/", ".").removesuffix(".__init__"), path


def read_source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return path.read_text(encoding="latin-1")


def gather() -> list[Fact]:
    """All facts, the better known modules first; each name once."""
    facts: dict[str, Fact] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            for fact in _from_module(name, module):
                facts.setdefault(fact.name, fact)
    for name, path in source_files():
        if not any(part.startswith("_") for part in name.split(".")):
            for fact in _from_source(name, read_source(path)):
                facts.setdefault(fact.name, fact)
    return list(facts.values())


# -- imported modules --------------------------------------------------------------------------------------------------
def _from_module(name: str, module: ModuleType) -> Iterator[Fact]:
    tier = _TIER_OF[name]
    if name in MODULES:
        yield Fact(name, "module", MODULES[name], "", "", name, tier)
    elif name != "builtins" and (fact := _fact(name, "module", module.__doc__, "", name, tier)):
        yield fact
    public = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for attribute in public:
        try:
            value = getattr(module, attribute)
        except AttributeError:
            continue
        if inspect.ismodule(value) or not callable(value) or attribute.startswith("_"):
            continue
        home = getattr(value, "__module__", None) or name
        # What a module only borrows from another one is that one's.
        if not _belongs(home, name) and attribute not in (getattr(module, "__all__", None) or ()):
            continue
        if name == "posixpath" or (name == "os" and attribute in ("PathLike",)):
            continue
        full = attribute if name == "builtins" else f"{name}.{attribute}"
        kind = _kind_of(value)
        doc = getattr(value, "__doc__", None)
        if kind in ("class", "exception") and doc in (object.__doc__, Exception.__doc__):
            doc = None
        if fact := _fact(full, kind, doc, _signature(value, doc), name, tier):
            yield fact
        if inspect.isclass(value) and kind == "class":
            yield from _methods(full, value, name, tier)
    for full in PURPOSES:  # constants and what else has no docstring of its own
        if full.startswith(f"{name}.") and full.count(".") == name.count(".") + 1:
            kind = "attribute" if not callable(getattr(module, full.rpartition(".")[2], None)) else "function"
            yield Fact(full, kind, PURPOSES[full], "", "", name, tier)


def _belongs(home: str, name: str) -> bool:
    return (
        name == "builtins"
        or home.lstrip("_").split(".")[0] in (name.split(".")[0], "posix", "nt")
        or home.startswith("_")
    )


def _methods(full: str, cls: type, module: str, tier: int) -> Iterator[Fact]:
    for attribute, value in vars(cls).items():
        if attribute.startswith("_"):
            continue
        inner = getattr(value, "__func__", value)
        if not (callable(inner) or isinstance(inner, property)):
            continue
        doc = getattr(inner, "__doc__", None)
        signature = "" if isinstance(inner, property) else _signature(inner, doc)
        if fact := _fact(
            f"{full}.{attribute}", "method", doc, signature, module, max(1, tier - 1) if module != "builtins" else 3
        ):
            yield fact


def _kind_of(value: object) -> str:
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function"


def _signature(value: object, doc: object) -> str:
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):
        match = re.match(r"[\w.]*(\([^\n]*?\))\s*(?:->|--|-|$|\n)", doc if isinstance(doc, str) else "")
        text = match.group(1) if match else ""
    text = re.sub(r"^\((self|cls|type),?( /,?)? ?", "(", text)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return text if len(text) < 160 and "<" not in text else ""


# -- sources -----------------------------------------------------------------------------------------------------------
def _from_source(module: str, source: str) -> Iterator[Fact]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    tier = _TIER_OF.get(module, 1)
    if fact := _fact(module, "module", ast.get_docstring(tree), "", module, tier):
        yield fact
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if fact := _fact(
                f"{module}.{node.name}",
                "function",
                ast.get_docstring(node),
                f"({ast.unparse(node.args)})",
                module,
                tier,
            ):
                yield fact
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            kind = "exception" if node.name.endswith(("Error", "Exception", "Warning")) else "class"
            if fact := _fact(f"{module}.{node.name}", kind, ast.get_docstring(node), "", module, tier):
                yield fact
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
                    arguments = re.sub(r"^(self|cls),? ?", "", ast.unparse(inner.args))
                    if fact := _fact(
                        f"{module}.{node.name}.{inner.name}",
                        "method",
                        ast.get_docstring(inner),
                        f"({arguments})",
                        module,
                        1,
                    ):
                        yield fact


# -- both --------------------------------------------------------------------------------------------------------------
def _fact(name: str, kind: str, doc: object, signature: str, module: str, tier: int) -> Fact | None:
    curated = MODULES.get(name) if kind == "module" else PURPOSES.get(name)
    paragraphs = _paragraphs(doc, name)
    said = None
    used = -1
    for i, paragraph in enumerate(paragraphs[:2]):
        sentence = first_sentence(paragraph)
        said = predicate(sentence, kind)
        if said is None and i == 0 and kind == "module":
            said = _module_predicate(sentence)
        if said is not None:
            used = i
            break
    purpose = curated or said
    if purpose is None:
        return None
    details = ""
    if used >= 0 and not curated:
        whole = clean(paragraphs[used])
        rest = whole[len(first_sentence(paragraphs[used])) :].lstrip(". ")
        if 20 < len(rest) < 300 and rest[0].isupper() and rest.endswith(".") and not re.search(r">>>|::|\|", rest):
            details = rest
    return Fact(name, kind, purpose, signature, details, module, tier)


def _module_predicate(sentence: str) -> str | None:
    """ "Common string manipulations" -> "provides common string manipulations"."""
    if not 12 < len(sentence) < 120 or re.search(
        r"--|\||::|[$@]|^[A-Z]{2,}|copyright|author|written by", sentence, re.I
    ):
        return None
    words = sentence.split()
    if len(words) < 3 or not words[0][0].isupper():
        return None
    sentence = (
        sentence
        if sentence[1:2].isupper() or words[0] in ("Python", "Internet")
        else sentence[0].lower() + sentence[1:]
    )
    return f"is about {sentence}"


def _paragraphs(doc: object, name: str) -> list[str]:
    """Of a docstring, without the lines that only show how to call it."""
    if not isinstance(doc, str) or not doc:
        return []
    last = re.escape(name.split(".")[-1])
    text = inspect.cleandoc(doc)
    text = (
        re.sub(rf"^(?:[\w.]*\b{last}\([^\n]*\)(?: *-+> *[^\n]*)?(?:\n[ \t]+[^\n]*)*\n?)+", "", text).strip()
        if re.match(rf"[\w.]*\b{last}\(", text)
        else text
    )
    if not text:
        # "f(x) -> the answer for x." has its say after the arrow.
        match = re.match(rf"[\w.]*\b{last}\([^\n]*?\)\s*(?:-+>|-)\s*(?:[a-z_]+\.\s+)?([^\n]+)", inspect.cleandoc(doc))
        text = match.group(1)[:1].upper() + match.group(1)[1:] if match else ""
    text = re.sub(
        r"^(?:[HLDTSB]|D|\w{1,3})\.[\w.]+\([^\n]*?\)\s*(?:-+>\s*[^\n.]*?\s+-+\s*|-+>\s*[^\n]*?\.\s*|--\s*)", "", text
    )
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]
