"""Barriers and simdgroup operations that not every thread may reach, found by following thread indices in the text.

A value is uniform over the threadgroup, uniform over each simdgroup, or varies by lane. A barrier needs conditions that
are uniform over the threadgroup, a simdgroup operation ones that are uniform over its simdgroup: those of `if`, loops
and `switch`, of `&&`, `||` and `?:`, and of a `return` before it. Loads are as uniform as their indices. The reading is
by names, so it errs on both sides; the run-time check is the exact one.
"""
import re

UNIFORM, BY_SIMDGROUP, BY_LANE = 0, 1, 2
BUILTIN_LEVEL = {
    "simdgroup_index_in_threadgroup": BY_SIMDGROUP,
    "thread_index_in_simdgroup": BY_LANE,
    "thread_index_in_threadgroup": BY_LANE,
    "thread_position_in_threadgroup": BY_LANE,
    "thread_position_in_grid": BY_LANE,
}
BARRIER = re.compile(r"threadgroup_barrier$")
SIMDGROUP_OPERATION = re.compile(
    r"(simd_(?!is_first|vote)\w+|simdgroup_(barrier|load|store|multiply|multiply_accumulate))$"
)
SIMDGROUP_UNIFORM = re.compile(r"simd_(sum|product|max|min|and|or|xor|all|any|ballot|broadcast|broadcast_first)$")
# Whatever they are given. Who comes first at an atomic is anybody's guess.
VARIES_BY_LANE = re.compile(r"(simd_is_first|simd_prefix_\w+|atomic_\w+)$")
SWIZZLE = re.compile(r"([xyzw]{1,4}|[rgba]{1,4})$")
ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<="}
MEMORY = {"device", "constant", "threadgroup"}


def problems(source, declarations):
    return Analysis(source, declarations).problems()


class Analysis:
    def __init__(self, source, declarations):
        self.source = source
        self.functions = [f for f in declarations.functions if f.body]
        self.by_name = {}  # name -> its overloads: which of them a call means is not known here
        for function in self.functions:
            self.by_name.setdefault(function.name, []).append(function)
        self.parameter_levels = {
            f.start: [max((BUILTIN_LEVEL.get(a, UNIFORM) for a in p.attributes), default=UNIFORM) for p in f.parameters]
            for f in self.functions
        }
        self.demands = {}  # name -> the most uniform condition that something inside such a function needs
        self._find_demands()

    def problems(self):
        while any([_Body(self, function).spread() for function in self.functions]):
            pass  # until no call raises a parameter's level
        found = []
        for function in self.functions:
            body = _Body(self, function)
            body.spread()
            found += body.divergent()
        return found

    def call_at(self, i):
        """The parenthesis of the call of the name at i, or 0."""
        source = self.source
        if source.tokens[i].kind != "word":
            return 0
        j = i + 1
        if source[j] == "<":
            j = source.angle_end(j) or i
        return j if source[j] == "(" else 0

    def demand(self, i):
        """The level above which the operation at token i must not be conditional, or None where there is none."""
        if not self.call_at(i):
            return None
        if BARRIER.match(self.source[i]):
            return UNIFORM
        if SIMDGROUP_OPERATION.match(self.source[i]):
            return BY_SIMDGROUP
        return self.demands.get(self.source[i])

    def _find_demands(self):
        changed = True
        while changed:
            changed = False
            for name, overloads in self.by_name.items():
                inside = [self.demand(i) for f in overloads for i in range(f.body, f.end)]
                least = min((level for level in inside if level is not None), default=None)
                if least != self.demands.get(name):
                    self.demands[name] = least
                    changed = True


class _Body:
    """The levels of one function's names, and the conditions over each of its tokens."""

    def __init__(self, analysis, function):
        self.analysis, self.source, self.function = analysis, analysis.source, function
        self.start, self.end = function.body, self.source.pair[function.body]
        # (name, token of its declaration, 0 for parameters), and a member's name behind these -> level
        names = [(p.name, 0) for p in function.parameters]
        self.levels = dict(zip(names, analysis.parameter_levels[function.start]))
        self.scopes = {}  # name -> [(token of its declaration, end of its scope)]
        self.memory = {p.name for p in function.parameters if MEMORY & set(p.words)}
        self.controls = []  # [start, end, level, is a loop]
        for i in range(self.start, self.end):
            if self.source[i] in MEMORY and self.source[i - 1] in (";", "{", "}", "const"):
                j = i
                while self.source[j] not in (";", "=", "["):
                    j += 1
                self.memory.add(self.source[j - 1])
        self._find_scopes(self.start, self.end)

    def _find_scopes(self, start, end):
        """Notes what the block between two braces declares, and what the blocks in it do."""
        source, i = self.source, start + 1
        while i < end:
            if source[i] == "{":
                self._find_scopes(i, source.pair[i])
                i = source.pair[i]
            elif source[i] == "for" and source[i + 1] == "(":
                for k in range(i + 2, source.pair[i + 1]):
                    self._note_declaration(k, self._statement_end(i))
                i = source.pair[i + 1]
            else:
                self._note_declaration(i, end)
            i += 1

    def _note_declaration(self, i, end):
        before, after = self.source.tokens[i - 1], self.source[i + 1]
        plain = before.kind == "word" and before.text not in ("return", "else", "case")
        declares = after in ("=", ";", "[", ",") if plain else after == "=" and before.text in (">", "*", "&")
        if declares and self.source.tokens[i].kind == "word":
            self.scopes.setdefault(self.source[i], []).append((i, end))

    def _resolve(self, i):
        """The variable that the name at i means."""
        name = self.source[i]
        declared = [start for start, end in self.scopes.get(name, ()) if start <= i < end]
        return name, max(declared, default=0)

    def spread(self):
        """Follows assignments and conditions to a fixed point. Did a parameter of another function rise?"""
        before = None
        while before != (self.levels, self.controls):
            before = (dict(self.levels), [list(control) for control in self.controls])
            self._find_controls()
            self._follow_assignments()
        return self._raise_callees()

    def level(self, start, end):
        """How much the expression in a token range varies."""
        level, i = UNIFORM, start
        while i < end:
            if SIMDGROUP_UNIFORM.match(self.source[i]) and self.analysis.call_at(i):
                level = max(level, BY_SIMDGROUP)
                i = self.source.pair[self.analysis.call_at(i)]
            elif VARIES_BY_LANE.match(self.source[i]):
                level = BY_LANE
            elif self.source[i - 1] not in (".", "->"):
                level = max(level, self._level_of(i))
            i += 1
        return level

    def _level_of(self, i):
        """How much the variable at i varies, or only the member of it that is read."""
        variable, member = self._resolve(i), self._member(i)
        keys = [key for key in self.levels if key[:2] == variable and (not member or key[2:] in ((), member))]
        return max((self.levels[key] for key in keys), default=UNIFORM)

    def _member(self, i):
        """The member of the variable at i, as a tuple of one, if it is not a vector's."""
        source = self.source
        named = source[i + 1] == "." and not SWIZZLE.match(source[i + 2]) and source[i + 3] != "("
        return (source[i + 2],) if named else ()

    def control(self, i):
        """How much the conditions over token i vary."""
        return max((level for start, end, level, _ in self.controls if start <= i < end), default=UNIFORM)

    def _statement_end(self, i):
        source = self.source
        if source[i] == "{":
            return source.pair[i] + 1
        if source[i] in ("if", "for", "while", "switch"):
            opening = i + 2 if source[i + 1] == "constexpr" else i + 1
            end = self._statement_end(source.pair[opening] + 1)
            return self._statement_end(end + 1) if source[i] == "if" and source[end] == "else" else end
        while source[i] != ";" and i < self.end:
            i = source.skip(i)
        return i + 1

    def _find_controls(self):
        source = self.source
        self.controls = []
        for i in range(self.start, self.end):
            if source[i] in ("if", "for", "while", "switch"):
                opening = i + 2 if source[i + 1] == "constexpr" else i + 1
                closing = source.pair[opening]
                level = self.level(opening, closing)
                self.controls.append([closing + 1, self._statement_end(i), level, source[i] in ("for", "while")])
            elif source[i] == "do" and source[i + 1] == "{":
                closing = source.pair[i + 1]
                condition = self.level(closing + 2, source.pair[closing + 2])
                self.controls.append([i + 1, closing, condition, True])
            elif source[i] in ("&&", "||", "?"):
                self.controls.append([i + 1, *self._operand(i), False])
        for i in range(self.start, self.end):
            if source[i] in ("break", "continue", "return") and self.control(i):
                level = self.control(i)
                loops = [control for control in self.controls if control[3] and control[0] <= i < control[1]]
                innermost = min(loops, key=lambda control: control[1] - control[0], default=None)
                for loop in loops if source[i] == "return" else [innermost] if loops else []:
                    loop[2] = max(loop[2], level)
                if source[i] == "return":
                    self.controls.append([self._statement_end(i), self.end, level, False])

    def _operand(self, i):
        """The end of what `&&`, `||` or `?` at i evaluates or not, and the level of what stands before it."""
        source, start, end = self.source, i - 1, i + 1
        while source[start] not in ("(", "[", "{", ";", ",", "=", "return") and start > self.start:
            start = source.pair[start] - 1 if source[start] in (")", "]", "}") else start - 1
        while source[end] not in (")", "]", "}", ";", ","):
            end = source.skip(end)
        return end, self.level(start + 1, i)

    def _follow_assignments(self):
        source = self.source
        for i in range(self.start, self.end):
            if source[i] in ASSIGNMENTS:
                target = self._target(i)
                end = i + 1
                while source[end] not in (";", ",", ")", "}"):
                    end = source.skip(end)
                self._raise(target, max(self.level(i + 1, end), self.control(i)))
            elif source[i] in self.analysis.by_name and self.analysis.call_at(i):
                self._follow_outputs(i)

    def _follow_outputs(self, i):
        """What a helper stores through a thread reference varies as much as anything it was given."""
        ranges = self.source.arguments(self.analysis.call_at(i))
        level = max([self.level(*r) for r in ranges] + [self.control(i)])
        for function in self.analysis.by_name[self.source[i]]:
            for (start, end), parameter in zip(ranges, function.parameters):
                if parameter.is_pointer and "thread" in parameter.words and "const" not in parameter.words:
                    k = start
                    while k < end:
                        # An index only says which element it is.
                        k = self.source.pair[k] if self.source[k] == "[" else k
                        self._raise(k, level)
                        k += 1

    def _target(self, equals):
        """The name that `x = `, `x.y = `, `x[i] = ` or `x.elements()[i] = ` changes."""
        source, j = self.source, equals - 1
        while source[j] in ("]", ")") or source[j - 1] in (".", "->"):
            j = source.pair[j] - 1 if source[j] in ("]", ")") else j - 2
        return j

    def _raise(self, i, level):
        if self.source.tokens[i].kind == "word" and self.source[i] not in self.memory:
            key = self._resolve(i) + self._member(i)
            self.levels[key] = max(self.levels.get(key, UNIFORM), level)

    def _raise_callees(self):
        raised = False
        for i in range(self.start, self.end):
            overloads = self.analysis.by_name.get(self.source[i])
            if not overloads or not self.analysis.call_at(i):
                continue
            given = [self.level(start, end) for start, end in self.source.arguments(self.analysis.call_at(i))]
            for callee in (self.analysis.parameter_levels[function.start] for function in overloads):
                for k, level in enumerate(given[: len(callee)]):
                    raised |= level > callee[k]
                    callee[k] = max(callee[k], level)
        return raised

    def divergent(self):
        found = []
        for i in range(self.start, self.end):
            demand = self.analysis.demand(i)
            if demand is not None and self.control(i) > demand:
                by = "lane" if self.control(i) == BY_LANE else "simdgroup"
                message = f"{self.source[i]} under a condition that varies by {by}: not every thread may reach it"
                found.append(self.source.problem(i, message))
        return found

