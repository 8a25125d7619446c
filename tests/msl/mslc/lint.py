"""Rules of the Metal language, and of this repository, that clang cannot know."""
import re

from . import divergence
from .rewrite import threadgroup_names
from .signatures import SPACES

VECTOR_BUILTINS = {
    "thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid",
    "threads_per_threadgroup", "threadgroups_per_grid", "threads_per_grid",
}  # fmt: skip
SCALAR_BUILTINS = {
    "thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup", "threads_per_simdgroup", "thread_execution_width",
}  # fmt: skip
SCALAR_TYPES = ("uint", "ushort")
VECTOR_TYPES = SCALAR_TYPES + ("uint2", "uint3", "ushort2", "ushort3")
PARAMETER_ATTRIBUTES = {"buffer", "threadgroup", "function_constant"} | VECTOR_BUILTINS | SCALAR_BUILTINS
FUNCTION_ATTRIBUTES = {"kernel", "host_name", "max_total_threads_per_threadgroup"}
CONSTANT_TYPES = {"bool", "ushort", "short", "uint", "int", "float"}
LAST_BUFFER = 30
NOT_IN_METAL = {
    "double", "goto", "throw", "try", "catch", "new", "delete", "asm", "virtual", "dynamic_cast", "typeid",
    "thread_local", "register", "wchar_t", "vertex", "fragment", "ray_data", "object_data", "threadgroup_imageblock",
}  # fmt: skip
NARROW_FLOAT = re.compile(r"(half|bfloat)[234]?$")
ARITHMETIC = {"+", "-", "*", "/", "+=", "-=", "*=", "/="}
STATEMENT_START = {";", "{", "}", ")", ":"}


def problems(source, declarations):
    """Every finding, in the order of the file."""
    rules = (
        forbidden_words, program_scope, function_constants, pointers_without_space, kernel_parameters,
        hidden_conversions, function_bodies, local_declarations, kernel_calls, recursion,
        narrow_arithmetic, lookup_tables, attributes_known, kernel_names, atomics, divergence.problems,
    )  # fmt: skip
    return sorted({problem for rule in rules for problem in rule(source, declarations)})


def bodies(declarations):
    return [function for function in declarations.functions if function.body]


def forbidden_words(source, _):
    for i in range(source.size):
        if source.tokens[i].kind == "word" and source[i] in NOT_IN_METAL:
            yield source.problem(i, f"'{source[i]}' is not in Metal, or means something else there")
        if source.texts(i, i + 2) == ["long", "long"]:
            yield source.problem(i, "'long long' is not in Metal: long has 64 bits")
        if source[i - 1] == "." and re.match(r"(lo|hi|even|odd|s[0-9a-fA-F]+)$", source[i]):
            yield source.problem(i, f"swizzle '.{source[i]}' is OpenCL, not Metal")
        if source[i] == "(" and source[i + 1] == "*" and source.texts(i + 3, i + 5) == [")", "("]:
            yield source.problem(i, f"'{source[i + 2]}' is a function pointer: not in Metal")


def program_scope(source, declarations):
    for variable in declarations.variables:
        if variable.is_member:
            continue
        if "threadgroup" in variable.words:
            yield source.problem(variable.start, f"threadgroup variable '{variable.name}' outside a kernel")
        elif "constant" not in variable.words and len(variable.words) > 1:
            yield source.problem(variable.start, f"program-scope variable '{variable.name}' must be constant")


def function_constants(source, declarations):
    seen = {}
    for variable in declarations.function_constants:
        index = variable.attributes["function_constant"]
        if variable.type_name not in CONSTANT_TYPES:
            allowed = ", ".join(sorted(CONSTANT_TYPES))
            yield source.problem(variable.start, f"function constant '{variable.name}' must be one of {allowed}")
        if variable.equals:
            yield source.problem(variable.start, f"function constant '{variable.name}' with an initialiser")
        if index in seen:
            yield source.problem(variable.start, f"function constant index {index} is also '{seen[index]}'")
        seen[index] = variable.name


def attributes_known(source, declarations):
    for function in declarations.functions:
        for name in set(function.attributes) - FUNCTION_ATTRIBUTES:
            yield source.problem(function.opening, f"unknown attribute [[{name}]] of '{function.name}'")


def kernel_names(source, declarations):
    """What the host asks for must be one kernel."""
    plain = [(f.host_name, f.opening) for f in declarations.kernels if not f.is_template]
    templates = {function.name for function in declarations.kernels if function.is_template}
    made = [(entry.host_name, entry.start) for entry in declarations.instantiations if entry.base in templates]
    seen = set()
    for name, place in plain + made:
        if name in seen:
            yield source.problem(place, f"another kernel of the name '{name}'")
        seen.add(name)


def atomics(source, _):
    for i in range(source.size):
        if source[i] == "threadgroup" and "atomic_float" in source.texts(i + 1, i + 3):
            yield source.problem(i, "atomic_float is for device memory only")


def pointers_without_space(source, declarations):
    for function in declarations.functions:
        for parameter in function.parameters:
            text = " ".join(parameter.words)
            if parameter.is_pointer and not SPACES & set(parameter.words):
                yield source.problem(parameter.first, f"pointer or reference without address space: '{text}'")
            if parameter.words.count("*") > 1:
                yield source.problem(parameter.first, f"pointer to pointer: '{text}'")
        if {"*", "&"} & set(function.result) and not SPACES & set(function.result):
            yield source.problem(function.opening, f"'{function.name}' returns a pointer without address space")


def kernel_parameters(source, declarations):
    for function in declarations.kernels:
        if "void" not in function.result:
            yield source.problem(function.opening, f"kernel '{function.name}' must return void")
        seen, widths = set(), set()
        for parameter in function.parameters:
            for message in _parameter_messages(parameter):
                yield source.problem(parameter.first, message)
            for name, argument in parameter.attributes.items():
                if name in ("buffer", "threadgroup"):
                    if (name, argument) in seen:
                        yield source.problem(parameter.first, f"duplicate [[{name}({argument})]]")
                    seen.add((name, argument))
                elif name in VECTOR_BUILTINS:
                    widths.add((parameter.type_words or ["1"])[-1][-1])
        if len({width if width in "23" else "1" for width in widths}) > 1:
            yield source.problem(function.opening, "position and size parameters of different vector widths")


def _parameter_messages(parameter):
    spaces = SPACES & set(parameter.words)
    for name, argument in parameter.attributes.items():
        if name not in PARAMETER_ATTRIBUTES:
            yield f"unknown parameter attribute [[{name}]]"
        elif name == "buffer":
            if argument.isdigit() and int(argument) > LAST_BUFFER:
                yield f"buffer index {argument} is greater than {LAST_BUFFER}"
            if not spaces & {"device", "constant"} or not parameter.is_pointer:
                yield f"buffer '{parameter.name}' must be a device or constant pointer or reference"
        elif name == "threadgroup" and ("threadgroup" not in spaces or not parameter.is_pointer):
            yield f"'{parameter.name}' must be a threadgroup pointer"
        elif name in SCALAR_BUILTINS | VECTOR_BUILTINS:
            allowed = SCALAR_TYPES if name in SCALAR_BUILTINS else VECTOR_TYPES
            if len(parameter.type_words) != 1 or parameter.type_words[0] not in allowed:
                yield f"[[{name}]] must be one of {', '.join(allowed)}"
    if not parameter.attributes and not (parameter.is_pointer and spaces - {"thread"}):
        yield f"kernel parameter '{parameter.name}' is neither a buffer nor has an attribute"


def hidden_conversions(source, declarations):
    """`Traits::Vector(x)`, `(Traits::Vector)x`: clang would take the bits of x if its size is the same."""
    for i in range(source.size):
        if source[i] not in declarations.aliases or source[i - 1] != "::":
            continue
        closed = source[i + 1] == ")" and source[source.pair[i + 1] - 1] not in ("sizeof", "alignof", "decltype")
        if source[i + 1] == "(" or closed and (source.tokens[i + 2].kind in ("word", "number") or source[i + 2] == "("):
            yield source.problem(i, f"conversion to '{source[i]}' through a scope: name the type with 'using' first")


def function_bodies(source, declarations):
    for function in bodies(declarations):
        for i in range(function.body, function.end):
            if source[i] == "[" and source[i - 1] in ("=", "(", ",", "return", "{") and not source.is_attribute(i):
                yield source.problem(i, "lambda: not in Metal before 3.2")
            if source[i] == "static" and not {"constant", "constexpr"} & set(source.texts(i, i + 4)):
                yield source.problem(i, "static variable that is not constant")


def local_declarations(source, declarations):
    for function in bodies(declarations):
        for i in range(function.body, function.end):
            if source[i - 1] not in STATEMENT_START or source.tokens[i].kind != "word":
                continue
            if source[i] == "threadgroup":
                names = threadgroup_names(source, i)
                if names and not function.is_kernel:
                    yield source.problem(i, f"threadgroup variable '{source[names[0]]}' outside a kernel")
                if names and _initialised(source, names[-1]):
                    yield source.problem(i, f"threadgroup variable '{source[names[-1]]}' with an initialiser")
            else:
                yield from _pointer_without_space(source, i)


def _initialised(source, name):
    j = name + 1
    while source[j] == "[":
        j = source.pair[j] + 1
    return source[j] == "="


def _pointer_without_space(source, i):
    """`T* p = ...` or `T& r = ...`."""
    j = i
    while source[j] in ("const", "volatile"):
        j += 1
    if source[j] in SPACES | {"return", "case", "else", "sizeof"} or source.tokens[j].kind != "word":
        return
    j += 1
    while source[j] == "::":
        j += 2
    if source[j] == "<":
        j = source.angle_end(j) or j
    while source[j] == "const":
        j += 1
    declares = source[j] in ("*", "&") and source.tokens[j + 1].kind == "word" and source[j + 2] in ("=", ";")
    if declares and not (source[j + 2] == ";" and source[i - 1] in (")", ":")):
        yield source.problem(i, f"pointer or reference without address space: '{source[j + 1]}'")


def kernel_calls(source, declarations):
    kernels = {function.name for function in declarations.kernels}
    for function in bodies(declarations):
        for i in range(function.body, function.end):
            after = source.angle_end(i + 1) if source[i + 1] == "<" else i + 1
            if source[i] in kernels and after and source[after] == "(" and source[i] != function.name:
                yield source.problem(i, f"call of kernel '{source[i]}'")


def recursion(source, declarations):
    """Cycles of calls between functions that are not overloaded (an overload may well call another)."""
    names = [function.name for function in declarations.functions if function.body]
    single = {function.name: function for function in bodies(declarations) if names.count(function.name) == 1}
    calls = {
        name: {
            source[i]
            for i in range(function.body, function.end)
            if source[i] in single and source[i + 1] == "(" and source[i - 1] not in (".", "->")
        }
        for name, function in single.items()
    }
    for name, function in single.items():
        reached, waiting = set(), [name]
        while waiting:
            fresh = calls[waiting.pop()] - reached
            reached |= fresh
            waiting += fresh
        if name in reached:
            yield source.problem(function.opening, f"recursion through '{name}'")


def narrow_arithmetic(source, declarations):
    """Arithmetic is done in float: a helper may take a half, or what may be one, and converts it at once."""
    for function in bodies(declarations):
        narrow = {
            parameter.name
            for parameter in function.parameters
            if "*" not in parameter.words
            and any(NARROW_FLOAT.match(word) or word in function.template_types for word in parameter.words)
        }
        for i in range(function.body, function.end):
            if source[i] not in narrow or source[i - 1] in (".", "->"):
                continue
            after = i + 1
            while source[after] in (".", "["):
                after = after + 2 if source[after] == "." else source.pair[after] + 1
            if source[i - 1] in ARITHMETIC or source[after] in ARITHMETIC:
                yield source.problem(i, f"arithmetic on the narrow parameter '{source[i]}': convert it to float first")


def lookup_tables(source, declarations):
    """A table in constant memory, indexed by data, serialises the lanes: compute instead."""
    everywhere = {v.name for v in declarations.variables if v.is_array and "constant" in v.words and not v.is_member}
    constants = {v.name for v in declarations.variables if "constant" in v.words or "constexpr" in v.words}
    for function in bodies(declarations):
        fixed, tables = constants | function.template_values, everywhere | _local_tables(source, function)
        for i in range(function.body, function.end):
            if source[i] == "constexpr":
                j = i
                while source[j] not in ("=", ";"):
                    j += 1
                fixed.add(source[j - 1])
        for i in range(function.body, function.end):
            if source[i] in everywhere and source[i + 1] != "[":
                yield source.problem(i, f"constant table '{source[i]}' taken as a pointer: compute it")
            if source[i] in tables and source[i + 1] == "[":
                j = i + 1
                while source[j] == "[":
                    j = source.pair[j] + 1
                varying = sorted(source.words(i + 2, j) - fixed)
                if varying:
                    yield source.problem(i, f"constant table '{source[i]}' indexed by '{varying[0]}': compute it")


def _local_tables(source, function):
    """Arrays of a function's own that are const and full of literals."""
    found = set()
    for i in range(function.body, function.end):
        if source[i] in ("const", "constexpr", "constant", "static") and source[i - 1] in STATEMENT_START:
            j = i
            while source[j] not in (";", "=", "[", "("):
                j += 1
            name = source[j - 1]
            while source[j] == "[":
                j = source.pair[j] + 1
            if source[j - 1] == "]" and source[j] == "=" and not source.words(j, source.skip(j + 1)):
                found.add(name)
    return found
