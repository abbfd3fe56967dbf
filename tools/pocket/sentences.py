"""Turns the first sentence of a docstring into the predicate of a whole sentence.

    "Return the square root of x."             -> "returns the square root of x"
    "Dict subclass for counting hashable items" -> "is a dict subclass for counting hashable items"

It knows English only as far as Python's docstrings need it; what it cannot turn it says so (None).
"""

import re

# What docstrings of the standard library begin with, in the imperative.
_VERBS = """
abort accept access acquire activate add adjust advance align allocate allow analyze annotate append apply approximate
archive arrange ask assert assign attach attempt await backup base64-encode begin bind block build bump byteswap
calculate call cancel capture cast change check choose clean cleanup clear clone close coerce collapse collect combine
compare compile complete compose compress compute concatenate control configure confirm connect construct consume
contain continue convert copy count create customize deactivate debug decide declare decode decompress decorate
decrease decrement decrypt dedent deduce defer define delay delete deregister derive describe deserialize destroy
detach detect determine disable disassemble discard disconnect dispatch display divide do download draw drop dump
duplicate emit enable encode encrypt end enforce ensure enter enumerate erase escape establish estimate evaluate
examine exchange exclude execute exit expand expect expose export extend extract factor fail feed fetch figure fill
filter finalize find finish fire flatten flip flush fold force fork format forward free freeze gather generate get
give go grab group guess halt handle hash help hide hold hook identify ignore implement import improve include
increase increment indent indicate inform inherit initialize initiate inject insert inspect install instruct intercept
interpolate interpret interrupt invalidate invert invoke issue iterate join keep kill launch lay leave let limit link
list listen load locate lock log look lookup lower maintain make manage mangle map mark match maximize measure merge
mimic minimize modify monitor mount move multiply name normalize note notify obtain offer open operate order output
overlay override overwrite pack pad parse partition pass patch pause peek perform permute pickle pipe place play poll
pop populate position post predict prepare prepend present preserve pretty-print prevent print probe proceed process
produce prohibit prompt propagate protect provide prune publish pull purge push put query queue quit quote raise
randomize read realize rebuild recalculate receive recompute reconfigure reconstruct record recurse redirect reduce
refresh register reject relax release reload remember remove rename render reopen reorder repeat replace report
represent request require rescale reserve reset resize resolve respond restore restrict resume retrieve return reverse
revert rewind rotate round run sample satisfy save scan schedule search seed seek select send separate serialize serve
set shift show shuffle shut signal simplify simulate skip sleep slice sort specify spawn split squeeze start stash
step stop store stringify strip subclass substitute subtract suggest sum summarize support suppress suspend swap
switch synchronize take tear tell terminate test tie tokenize toggle trace track transfer transform translate transmit
transpose traverse treat trigger trim truncate try turn undo unescape unfold unlink unlock unmount unpack unregister
unset untie unwrap update upload uppercase uncompress use validate verify view visit wait wake walk warn watch wrap
write yield zip xor exponentiate complement emulate extrapolate overload obey resample re-raise reinitialize unquote
uudecode uuencode rpartition
"""
VERBS = frozenset(_VERBS.split())
_IRREGULAR = {"do": "does", "go": "goes", "have": "has", "be": "is", "undo": "undoes", "quit": "quits"}


def third_person(verb: str) -> str:
    """ "return" -> "returns", "copy" -> "copies", "push" -> "pushes"."""
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if re.search(r"(s|x|z|ch|sh)$", verb):
        return verb + "es"
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + "s"


_THIRD = {third_person(verb): verb for verb in VERBS}
# … and what may as well begin a noun phrase: "List of …".
_NOUNS = """
list map name set test order sum hash format step position sample group handle signal process queue match support lock
link access block base copy filter note file archive hook help print view input trace context call exit time message
count cast record factor report
"""
_NOUNS_TOO = frozenset(_NOUNS.split())
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|a\.k\.a|aka|approx|resp|incl|Dr|No)|\.\.)\.$")


def clean(text: str) -> str:
    """Without reStructuredText's marks, on one line."""
    text = re.sub(r":[a-z:]+:`~?\.?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"``([^`]*)``|`([^`]*)'|`([^`]*)`", lambda m: m.group(1) or m.group(2) or m.group(3) or "", text)
    text = re.sub(r"(?<![\w*])\*(\w+)\*(?![\w*])", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def first_sentence(paragraph: str) -> str:
    """Up to the first full stop that ends a sentence, without it."""
    text = clean(paragraph)
    for match in re.finditer(r"[.!?](?=\s+[\"'(]?[A-Z_\d]|$)", text):
        end = match.end()
        if text[match.start()] == "." and _ABBREVIATION.search(text[:end]):
            continue
        if text[:end].count("(") == text[:end].count(")"):
            return text[: end - 1].strip()
    return text.rstrip(":;, ")


def _lower_first(text: str) -> str:
    word = re.match(r"[A-Za-z]+", text)
    if (
        word is None
        or (len(word.group()) > 1 and not word.group()[1:].islower())
        or word.group() in ("True", "False", "None", "I")
    ):
        return text
    if word.group() in (
        "Python",
        "Unix",
        "Windows",
        "Telnet",
        "English",
        "Unicode",
        "Gaussian",
        "Euclidean",
        "Cartesian",
        "Internet",
    ):
        return text
    return text[0].lower() + text[1:]


_SECOND_VERBS = """
pop push keep truncate try update insert append put get send load parse stop return raise remove add make create set
yield give write read convert store close print call exit start replace open wait run
"""


def _conjugate_rest(text: str) -> str:
    """ "sorts the list and return None" -> "sorts the list and returns None"."""
    verbs = "|".join(_SECOND_VERBS.split())

    def turn(match: re.Match) -> str:
        if re.search(r"\b(?:to|can|will|may|should|must|not) \w+$", text[: match.start()]):
            return match.group()  # "can read and write": both hang on the same helper
        return match.group(1) + third_person(match.group(2))

    return re.sub(rf"((?:,|;)? (?:and then|or else|and|or|then) )({verbs})(?= )(?! (?:is|are|was) )", turn, text)


# A noun phrase that goes on with its own verb is a sentence about something else than what is documented.
_OWN_VERB = re.compile(r"\b(is|are|can|will|was|were|has|have|yields|creates|cannot|should|must|may|needs?)\b")
_RELATIVE = re.compile(r"\b(that|which|who|whose|where|when|whether|if|how|for|to|what|while|as)\b")


def _is_clause(text: str) -> bool:
    verb, relative = _OWN_VERB.search(text), _RELATIVE.search(text)
    return verb is not None and (relative is None or verb.start() < relative.start())


def predicate(sentence: str, kind: str) -> str | None:
    """What follows the subject: "returns the square root of x". None if no honest sentence comes out of it.

    kind: "class", "exception", "function", "method", "module".
    """
    sentence = sentence.strip().rstrip(".\\ ")
    if len(sentence) < 8 or len(sentence) > 260 or not re.search(r"[a-z]{3}", sentence):
        return None
    if re.search(r">>>|--|->|::|\||^- | - ", sentence) or sentence.count("(") != sentence.count(")"):
        return None
    words = sentence.split(" ")
    if len(words) < 3:
        return None
    first, rest = words[0], " ".join(words[1:])
    lowered = first.lower().rstrip(",")
    if lowered in ("this", "the") and words[1].lower() in (
        "class",
        "function",
        "method",
        "module",
        "is",
        "function,",
        "constructor",
    ):
        rest = " ".join(words[2:]) if words[1].lower() != "is" else " ".join(words[1:])
        start = rest.split(" ")[0]
        if start in _THIRD or start in ("is", "has", "does", "can", "will", "should", "must", "may"):
            return rest
        return None
    if lowered.endswith("ly") and words[1] in VERBS:
        return _conjugate_rest(f"{lowered} {third_person(words[1])} {' '.join(words[2:])}")
    if lowered in VERBS and (
        kind in ("function", "method") or lowered not in _NOUNS_TOO or words[1] in ("a", "an", "the")
    ):
        return _conjugate_rest(f"{third_person(lowered)} {rest}")
    if lowered in _THIRD and not (
        kind in ("class", "exception", "module")
        and lowered in ("lists", "maps", "sets", "tests", "locks", "links", "hooks", "files", "subclasses", "copies")
    ):
        return f"{lowered} {rest}"
    if lowered in ("a", "an", "the"):
        if _is_clause(rest):
            return None
        return f"is {lowered} {rest}"
    if kind in ("class", "exception") and not _is_clause(sentence):
        if lowered in (
            "abstract",
            "base",
            "common",
            "generic",
            "simple",
            "basic",
            "internal",
            "exception",
            "class",
            "mixin",
            "mix-in",
            "object",
            "subclass",
            "concrete",
            "wrapper",
            "context",
            "dict",
            "built-in",
            "special",
            "instance",
            "helper",
            "handler",
            "iterator",
            "thread-safe",
            "threaded",
            "immutable",
            "mutable",
            "raw",
            "buffered",
            "text",
            "http",
            "error",
            "type",
            "node",
            "proxy",
            "character",
        ):
            return f"is {'an' if lowered[0] in 'aeiou' or lowered == 'http' else 'a'} {_lower_first(sentence)}"
        if lowered in ("raised", "used"):
            return f"is {_lower_first(sentence)}"
        if (
            re.fullmatch(r"[A-Za-z-]+", first)
            and not first.endswith("s")
            and lowered not in ("if", "when", "in", "for", "to", "all", "see", "not", "no", "it", "on", "by", "with")
        ):
            return f"is {'an' if lowered[0] in 'aeiou' else 'a'} {_lower_first(sentence)}"
    return None
