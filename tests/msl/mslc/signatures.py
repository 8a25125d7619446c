"""What a .metal file declares: functions and kernels, explicit instantiations, program-scope variables, types."""
import re
from dataclasses import dataclass, field

SPACES = {"device", "constant", "threadgroup", "thread"}
TYPE_DECLARATIONS = {"struct", "class", "union", "enum"}
NOT_VARIABLES = {"using", "typedef", "static_assert", "friend"}
NOT_FUNCTIONS = {"decltype", "alignas", "__attribute__", "sizeof"}


@dataclass
class Parameter:
    first: int  # token index
    words: list  # its tokens, without attributes and brackets of its declarator
    attributes: dict  # name -> argument text

    @property
    def name(self):
        return next((word for word in reversed(self._declarator()) if re.match(r"[A-Za-z_]", word)), "")

    def _declarator(self):
        return self.words[: self.words.index("[")] if "[" in self.words else self.words

    @property
    def is_pointer(self):
        return bool({"*", "&", "&&"} & set(self.words))

    @property
    def type_words(self):
        return [word for word in self._declarator()[:-1] if word not in ("const", "volatile")]


@dataclass
class Function:
    name: str
    namespace: tuple
    start: int  # token range of the whole declaration
    end: int
    opening: int  # the '(' of its parameters
    body: int  # the '{' of its body, 0 for a declaration
    parameters: list
    result: list  # the words before its name
    attributes: dict
    template_types: set = field(default_factory=set)
    template_values: set = field(default_factory=set)
    is_template: bool = False

    @property
    def host_name(self):
        return host_name(self.attributes) or self.name

    @property
    def is_kernel(self):
        return "kernel" in self.result or "kernel" in self.attributes

    @property
    def qualified(self):
        return "::".join(self.namespace + (self.name,))


@dataclass
class Instantiation:
    """`template [[host_name("x")]] [[kernel]] decltype(f<half>) f<half>;`"""

    base: str
    expression: str
    host_name: str
    start: int


@dataclass
class Variable:
    name: str
    namespace: tuple
    words: list
    attributes: dict
    start: int
    end: int  # its ';'
    equals: int  # its '=', 0 without initialiser
    is_array: bool
    is_member: bool

    @property
    def qualified(self):
        return "::".join(self.namespace + (self.name,))

    @property
    def type_name(self):
        plain = [word for word in self.words[:-1] if word not in ("constant", "const", "constexpr", "static")]
        return " ".join(plain)


@dataclass
class Type:
    name: str
    start: int
    end: int
    template_types: set


class Declarations:
    """One walk over a Source."""

    def __init__(self, source):
        self.source = source
        self.functions, self.instantiations, self.variables, self.types = [], [], [], []
        self.aliases = {}  # name -> the words it stands for, wherever it is declared
        self._find_aliases()
        self._walk(0, source.size, (), False)

    @property
    def kernels(self):
        return [function for function in self.functions if function.is_kernel and function.body]

    @property
    def function_constants(self):
        return [variable for variable in self.variables if "function_constant" in variable.attributes]

    def uses(self, name):
        """Every identifier that the declarations called `name` reach, by name."""
        known = {}
        for entry in self.functions + self.variables + self.types:
            known.setdefault(entry.name, set()).update(self.source.words(entry.start, entry.end))
        for alias, words in self.aliases.items():
            known.setdefault(alias, set()).update(words)
        reached, waiting = set(), [name]
        while waiting:
            for word in known.get(waiting.pop(), ()):
                if word not in reached:
                    reached.add(word)
                    waiting.append(word)
        return reached

    def _find_aliases(self):
        source = self.source
        for i in range(source.size):
            if source[i] == "using" and source[i + 2] == "=":
                self.aliases[source[i + 1]] = source.texts(i + 3, self._statement_end(i) - 1)
            elif source[i] == "typedef":
                end = self._statement_end(i) - 1
                if source.tokens[end - 1].kind == "word":
                    self.aliases[source[end - 1]] = source.texts(i + 1, end - 1)

    def _walk(self, i, end, namespace, member):
        source = self.source
        while i < end:
            if source[i] == "namespace":
                j = i + 1
                names = []
                while source[j] not in ("{", "=", ";"):
                    names += [source[j]] if source[j] != "::" else []
                    j += 1
                if source[j] == "{":
                    self._walk(j + 1, source.pair[j], namespace + tuple(names), False)
                    i = source.pair[j] + 1
                else:
                    i = self._statement_end(j)
            elif source[i] == ";" or (member and source[i + 1] == ":"):
                i += 1 if source[i] == ";" else 2
            else:
                i = self._declaration(i, end, namespace, member)

    def _statement_end(self, i):
        while self.source[i] != ";" and i < self.source.size:
            i = self.source.skip(i)
        return i + 1

    def _template_header(self, i, types, values):
        """Reads `template <...>` at i into the two sets; the index after it."""
        source = self.source
        end = source.angle_end(i + 1)
        j = i + 2
        while j < end - 1:
            parameter = []
            while source[j] != "," and j < end - 1:
                closing = source.angle_end(j) if source[j] == "<" else None
                after = closing if closing else source.skip(j)
                parameter += source.texts(j, after)
                j = after
            j += 1
            declared = parameter[: parameter.index("=")] if "=" in parameter else parameter
            if declared:
                (types if declared[0] in ("typename", "class") else values).add(declared[-1])
        return end

    def _declaration(self, start, end, namespace, member):
        source = self.source
        types, values = set(), set()
        i = start
        while source[i] == "template" and source[i + 1] == "<":
            i = self._template_header(i, types, values)
        if source[i] == "template":
            return self._instantiation(i, namespace)
        if source[i] in NOT_VARIABLES:
            return self._statement_end(i)

        attributes, words, is_array = {}, [], False
        j = i
        while j < end and source[j] not in ("{", ";", "="):
            text = source[j]
            if source.is_attribute(j):
                found, j = source.attributes(j)
                attributes.update(found)
            elif text == "operator":
                name_end = j + 3 if source[j + 1] == "(" else j + 1
                while source[name_end] != "(":
                    name_end += 1
                words.append("".join(source.texts(j, name_end)))
                j = name_end
            elif text == "(" and words and re.match(r"[A-Za-z_]", words[-1]) and words[-1] not in NOT_FUNCTIONS:
                function = Function(
                    words[-1], namespace, start, 0, j, 0, self.parameters(j), words[:-1], attributes,
                    types, values, start != i,
                )  # fmt: skip
                return self._function_end(function, member)
            elif text in ("(", "["):
                is_array |= text == "["
                j = source.pair[j] + 1
            elif text == "<" and source.angle_end(j):
                after = source.angle_end(j)
                if source[after] != "(":  # else a specialisation: `f<int>(...)` has the name f
                    words += source.texts(j, after)
                j = after
            else:
                words.append(text)
                j += 1
        if source[j] == "{" and TYPE_DECLARATIONS & set(words):
            return self._type(start, j, words, namespace, types)
        after = self._statement_end(j)
        if words and not TYPE_DECLARATIONS & set(words[:1]):
            equals = j if source[j] == "=" else 0
            self.variables.append(
                Variable(words[-1], namespace, words, attributes, i, after - 1, equals, is_array, member)
            )
        return after

    def _type(self, start, body, words, namespace, template_types):
        source = self.source
        at = next(k for k, word in enumerate(words) if word in TYPE_DECLARATIONS)
        name = words[at + 1] if at + 1 < len(words) else ""
        after = self._statement_end(source.pair[body])
        self.types.append(Type(name, start, after, template_types))
        if words[at] != "enum":
            self._walk(body + 1, source.pair[body], namespace + (name,), True)
        return after

    def _function_end(self, function, member):
        """Finds the body behind the parameters, past qualifiers and a constructor's initialisers."""
        source = self.source
        j = source.pair[function.opening] + 1
        while source[j] not in ("{", ";", ":", "="):
            j = source.skip(j)
        if source[j] == ":" and member:
            j += 1
            while True:
                while source[j] not in ("(", "{"):
                    j += 1
                j = source.pair[j] + 1
                if source[j] != ",":
                    break
        if source[j] == "{":
            function.body = j
            function.end = source.pair[j] + 1
        else:
            function.end = self._statement_end(j)
        self.functions.append(function)
        return function.end

    def _instantiation(self, start, namespace):
        source = self.source
        attributes, base, expression = {}, "", ""
        end = self._statement_end(start)
        j = start + 1
        while j < end - 1:
            if source.is_attribute(j):
                found, j = source.attributes(j)
                attributes.update(found)
            elif source[j] == "<" and source.angle_end(j):
                after = source.angle_end(j)
                base = source[j - 1]
                expression = base + " " + " ".join(source.texts(j, after))
                j = after
            else:
                j = source.skip(j)
        prefix = "".join(name + "::" for name in namespace)
        self.instantiations.append(Instantiation(base, prefix + expression, host_name(attributes) or base, start))
        return end

    def parameters(self, opening):
        """The parameters inside the parentheses at `opening`."""
        source = self.source
        found = []
        for start, end in source.arguments(opening):
            words, attributes = [], {}
            j = start
            while j < end:
                if source.is_attribute(j):
                    names, j = source.attributes(j)
                    attributes.update(names)
                    continue
                if source[j] not in "()":
                    words.append(source[j])
                j += 1
            if words and words != ["void"]:
                found.append(Parameter(start, words, attributes))
        return found


def host_name(attributes):
    """The text of `[[host_name("a" "b")]]`, or nothing."""
    return "".join(re.findall(r'"([^"]*)"', attributes.get("host_name", "")))


def assign_indices(function):
    """For each parameter of a kernel: ("buffer" | "threadgroup", index) or ("builtin", name).

    A parameter without an index gets the lowest free one, as Metal does.
    """
    kinds = []
    for parameter in function.parameters:
        kind = None
        for name, argument in parameter.attributes.items():
            if name in ("buffer", "threadgroup"):
                kind = (name, argument)
            elif name != "function_constant":
                kind = kind or ("builtin", name)
        kinds.append(kind or ("threadgroup" if "threadgroup" in parameter.words else "buffer", None))
    for wanted in ("buffer", "threadgroup"):
        used = {index for kind, index in kinds if kind == wanted and index is not None}
        free = (str(n) for n in range(64) if str(n) not in used)
        kinds = [(kind, next(free)) if kind == wanted and index is None else (kind, index) for kind, index in kinds]
    return kinds
