"""Turns the tokens of a .metal file into C++ for the shim, in place: every token stays on its line.

- `[[...]]` vanishes: clang refuses attributes in explicit instantiations.
- Threadgroup variables become references into the threadgroup's memory.
- Vector constructors and casts, which clang would read as comma expressions or bit-casts, become `metal::construct`.
- For the check, casts of pointers become `reinterpret_cast`, which leaves the address space and const as they are.
- For execution, function constants become registered variables, and every kernel gets an entry in a table.
"""
import re

from .signatures import SPACES, assign_indices

VECTOR = re.compile(r"(u?char|u?short|u?int|u?long|float|half|bfloat)[234]$")
NOT_A_CALL = {".", "->", "typename", "class", "struct", "operator"}
BEFORE_CAST = {"return", "case", "else"}
MOST_THREADS = "max_total_threads_per_threadgroup"
FILE_SCOPE = "namespace {"  # files linked into one library keep their helpers to themselves


class Rewriter:
    """`kernels` are the host names that can be launched, or None for all."""

    def __init__(self, source, declarations, execute, kernels=None):
        self.source, self.declarations, self.execute = source, declarations, execute
        self.edits = []  # (start, end, text), in characters
        self.shared_count = 0
        self.chosen = [entry for entry in self._entries() if kernels is None or entry[1] in kernels]

    def result(self):
        if self.execute:
            self._function_constants()
        else:
            for variable in self.declarations.function_constants:
                self._insert(variable.start, "extern ")
        for function in self.declarations.kernels:
            self._threadgroup_variables(function)
            if self.execute and MOST_THREADS in function.attributes:
                self._limit_threads(function, function.attributes[MOST_THREADS])
        self._constructors()
        text = self._apply()
        if self.execute:
            text = f"{FILE_SCOPE}\n{text}\n{self._registration()}\n}}\n"
        return text

    def kernel_names(self):
        return [name for _, name, _ in self.chosen]

    # Edits ----------------------------------------------------------------------------------------------------------

    def _replace(self, i, text):
        token = self.source.tokens[i]
        self.edits.append((token.start, token.end, text))

    def _insert(self, i, text):
        """Before token i."""
        start = self.source.tokens[i].start
        self.edits.append((start, start, text))

    def _append(self, i, text):
        """After token i."""
        end = self.source.tokens[i].end
        self.edits.append((end, end, text))

    def _blank(self, start, end):
        first, last = self.source.tokens[start].start, self.source.tokens[end - 1].end
        self.edits.append((first, last, re.sub(r"[^\n]", " ", self.source.text[first:last])))

    def _apply(self):
        parts, position = [], 0
        for start, end, text in sorted(self.edits, key=lambda edit: edit[:2]):
            parts += [self.source.text[position:start], text]
            position = end
        return "".join(parts) + self.source.text[position:]

    def _limit_threads(self, function, limit):
        """Launches with more threads are to be refused."""
        self._append(function.body, f" msl::limit_threads({limit});")

    # Threadgroup variables ------------------------------------------------------------------------------------------

    def _threadgroup_variables(self, function):
        """`threadgroup float a[4], b;` -> a typedef for each name and a reference to memory of that type."""
        source = self.source
        scopes = [[]]  # the typedefs that are visible, a list for each open brace
        for i in range(function.body, source.pair[function.body]):
            if source[i] == "{":
                scopes.append([])
            elif source[i] == "}":
                scopes.pop()
            elif source[i] == "threadgroup" and source[i - 1] in (";", "{", "}"):
                names = threadgroup_names(source, i)
                if not names:
                    continue
                end = i
                while source[end] != ";":
                    end = source.skip(end)
                self._replace(i, "typedef")
                references = ""
                for at in names:
                    self.shared_count += 1
                    alias = f"msl_shared_{self.shared_count}"
                    self._replace(at, alias)
                    references += f" MSL_SHARED({alias}, {source[at]}, {self.shared_count});"
                    scopes[-1].append(alias)
                visible = ", ".join(alias for scope in scopes for alias in scope)
                self._append(end, f"{references} MSL_SHARED_LIMIT({visible});")

    # Constructors and casts -----------------------------------------------------------------------------------------

    def _constructors(self):
        source = self.source
        templates = self.declarations.functions + self.declarations.types
        generic = [(entry.start, entry.end, entry.template_types) for entry in templates if entry.template_types]
        i = 0
        while i < source.size:
            if source.is_attribute(i):
                after = source.attributes(i)[1]
                self._blank(i, after)
                i = after
                continue
            text, before = source[i], source[i - 1] if i else ""
            if text == "static_cast" and not self._is_pointer_cast(i + 1):
                self._replace(i, "metal::construct")
            elif text == "vec" and source[i + 1] == "<":
                after = source.angle_end(i + 1)
                if after and source[after] == "(":
                    self._construct(i, after - 1, "metal::vec", ">>")
            elif text == "(" and not self.execute and self._is_pointer(i + 1, source.pair[i]) and self._is_cast(i):
                self._pointer_cast(i)
            elif source.tokens[i].kind == "word" and before not in NOT_A_CALL:
                if self._may_name_vector(i, generic):
                    if source[i + 1] == "(" and not self._declares_array(i + 1):
                        self._construct(i, i, text, ">")
                    elif before == "(" and source[i + 1] == ")" and self._is_cast(i - 1):
                        self._c_cast(i)
            i += 1

    def _may_name_vector(self, i, generic):
        text = self.source[i]
        if VECTOR.match(text) or text in self.declarations.aliases:
            return True
        return any(start <= i < end and text in types for start, end, types in generic)

    def _declares_array(self, opening):
        """`T (&name)[n]`."""
        return self.source[opening + 1] in ("&", "*") and self.source[self.source.pair[opening] + 1] == "["

    def _is_pointer_cast(self, opening):
        after = self.source.angle_end(opening)
        return not after or bool({"*", "&"} & set(self.source.texts(opening, after)))

    def _construct(self, first, last, name, closing):
        """`name<...>` or `name` before a parenthesis -> `metal::construct<name>`."""
        start = first
        if self.source[first - 1] == "::" and self.source[first - 2] == "metal":
            start = first - 2
            self._blank(start, first)
        if first == last:
            self._replace(first, f"metal::construct<{name}>")
        else:
            self._replace(first, f"metal::construct<{name}")
            self._replace(last, closing)

    def _is_cast(self, opening):
        before = self.source.tokens[opening - 1]
        if before.kind == "word":
            return before.text in BEFORE_CAST
        return before.text not in (")", "]", ">")

    def _c_cast(self, i):
        """`(half4)expression` -> `metal::construct<half4>(expression)`."""
        last = self._unary_end(i + 2)
        if last:
            self._replace(i - 1, "metal::construct<")
            self._replace(i + 1, ">(")
            self._append(last - 1, ")")

    def _is_pointer(self, start, end):
        """`device const uint4*` and the like."""
        return self.source[end - 1] == "*" and bool(SPACES & set(self.source.texts(start, end)))

    def _pointer_cast(self, opening):
        """`(device uint4*)expression` -> `reinterpret_cast<device uint4*>(expression)`."""
        closing = self.source.pair[opening]
        last = self._unary_end(closing + 1)
        if last:
            self._replace(opening, "reinterpret_cast<")
            self._replace(closing, ">(")
            self._append(last - 1, ")")

    def _unary_end(self, i):
        """The index after the unary expression at i, or None."""
        source = self.source
        while source[i] in ("+", "-", "!", "~", "*", "&", "++", "--"):
            i += 1
        kind = source.tokens[i].kind
        if source[i] == "(":
            after = source.pair[i] + 1
            follows = source.tokens[after]
            if after - i == 3 and (follows.kind in ("word", "number") or follows.text == "("):
                return self._unary_end(after)  # a cast of a cast
            i = after
        elif kind in ("word", "number"):
            i += 1
            while source[i] == "::":
                i += 2
            if source[i] == "<":
                after = source.angle_end(i)
                i = after if after and source[after] == "(" else i
        else:
            return None
        while True:
            if source[i] in ("(", "["):
                i = source.pair[i] + 1
            elif source[i] in (".", "->"):
                i += 2
            elif source[i] in ("++", "--"):
                i += 1
            else:
                return i

    # Function constants and kernels, for execution ------------------------------------------------------------------

    def _derived_constants(self):
        """Program-scope constants whose initialisers read function constants: computed anew for every launch."""
        known = {variable.name for variable in self.declarations.function_constants}
        derived = []
        for variable in self.declarations.variables:
            if variable.equals and known & self.source.words(variable.equals, variable.end):
                known.add(variable.name)
                derived.append(variable)
        return derived

    def _function_constants(self):
        self.derived = self._derived_constants()
        for variable in self.declarations.function_constants + self.derived:
            for i in range(variable.start, variable.equals or variable.end):
                if self.source[i] == "constant":
                    self._replace(i, "MSL_PER_LAUNCH")
                elif self.source[i] in ("static", "const"):
                    self._blank(i, i + 1)
        for variable in self.declarations.function_constants:
            self._append(variable.end, f" MSL_PER_LAUNCH bool msl_defined_{variable.name};")
        for variable in self.derived:
            self._replace(variable.equals, f"; void msl_derive_{variable.name}() {{ {variable.name} =")
            self._append(variable.end, " }")

    def _registration(self):
        """The table behind the file: its constants, and each kernel with its parameters."""
        lines = ['# 1 "<kernel table>"']
        constants = self.declarations.function_constants
        for variable in constants:
            index, name = variable.attributes["function_constant"], variable.qualified
            defined = _qualified(variable, "msl_defined_")
            accessors = f"[]() -> void* {{ return &{name}; }}, []() -> bool* {{ return &{defined}; }}"
            entry = f'{index}, "{variable.name}", sizeof({name}), {accessors}, nullptr'
            lines += _registered("Constant", f"constant_{variable.name}", entry, "msl_file, ")
        guarded = self._guarded_constants()
        uses = {function.name: self.declarations.uses(function.name) for function in self.declarations.kernels}
        for i, (function, host_name, expression) in enumerate(self.chosen):
            reached = uses[function.name]
            required = [v.attributes["function_constant"] for v in constants if v.name in reached - guarded]
            derived = ["&" + _qualified(v, "msl_derive_") for v in self.derived if v.name in reached]
            rows = [
                self._parameter_row(parameter, *kind)
                for parameter, kind in zip(function.parameters, assign_indices(function))
            ]
            lines += [
                f"using msl_caller_{i} = metal::Caller<decltype({expression})>;",
                f"const int msl_required_{i}[] = {{{', '.join([*required, '-1'])}}};",
                f"void (*const msl_derived_{i}[])() = {{{', '.join([*derived, 'nullptr'])}}};",
                f"const msl::Parameter msl_parameters_{i}[] = {{{', '.join([*rows, '{}'])}}};",
            ]
            entry = (
                f'"{host_name}", &msl_file, &msl_caller_{i}::call<{expression}>, msl_parameters_{i}, '
                f"msl_caller_{i}::shapes, msl_caller_{i}::count, msl_required_{i}, msl_derived_{i}, nullptr"
            )
            lines += _registered("Kernel", f"kernel_{i}", entry)
        return "\n".join(lines)

    def _guarded_constants(self):
        """Those asked about with is_function_constant_defined: a launch may leave them out."""
        guarded = set()
        for i in range(self.source.size):
            if self.source[i] == "is_function_constant_defined":
                guarded |= self.source.words(i + 1, self.source.pair[i + 1])
        return guarded

    def _entries(self):
        """(function, host name, expression) of each kernel that can be launched, once each."""
        kernels = {function.name: function for function in self.declarations.kernels}
        found = {}
        for function in kernels.values():
            if not function.is_template:
                found[function.host_name] = (function, function.host_name, function.qualified)
        for entry in self.declarations.instantiations:
            if entry.base in kernels:
                found.setdefault(entry.host_name, (kernels[entry.base], entry.host_name, entry.expression))
        return list(found.values())

    @staticmethod
    def _parameter_row(parameter, kind, index):
        if kind == "builtin":
            return f"msl::Parameter::builtin(msl::Builtin::{index})"
        if kind == "threadgroup":
            return f'msl::Parameter::shared("{parameter.name}", {index})'
        guard = parameter.attributes.get("function_constant")
        enabled = f"[]() -> bool {{ return {guard}; }}" if guard else "nullptr"
        packed = any(word.startswith("packed_") for word in parameter.words)
        return f'msl::Parameter::buffer("{parameter.name}", {index}, {str(packed).lower()}, {enabled})'


def _qualified(variable, prefix):
    return "::".join((*variable.namespace, prefix + variable.name))


def _registered(kind, name, entry, owner=""):
    """The definition of one entry of the table, and its registration."""
    return [
        f"msl::{kind} msl_{name} = {{{entry}}};",
        f"const bool msl_{name}_added = msl::add({owner}msl_{name});",
    ]


def threadgroup_names(source, i):
    """The token indices of the names that `threadgroup T a[n], b;` at i declares; none if it declares pointers."""
    names = []
    j = i + 1
    while source[j] not in (";", "="):
        text = source[j]
        if text in ("*", "&") or text in SPACES:
            return []
        closing = source.angle_end(j) if text == "<" else None
        if closing:
            j = closing
            continue
        if source.tokens[j].kind == "word" and source[j + 1] in ("[", ",", ";", "="):
            names.append(j)
        j = source.skip(j)
    return names
